"""The prompts of both papers, by name.

LLM-Adapters indents its prompts by 16 spaces, and trains with other white space than it tests with:
both are kept, for a model trained on the one is scored with the other. `{prompt}` is where the
question goes, `{eos}` the tokenizer's end token.
"""

_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INDENT = " " * 16

PROMPTS = {
    # LLM-Adapters, finetune.py, for rows whose input is empty, as all rows of SARA's data are.
    "llm_adapters": (
        f"{_TASK}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{prompt}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
    ),
    # LLM-Adapters, evaluate.py and commonsense_evaluate.py, likewise.
    "llm_adapters_test": f"{_TASK} \n\n{_INDENT}### Instruction:\n{_INDENT}{{prompt}}\n\n{_INDENT}### Response:\n{_INDENT}",
    # The sentence that SARA's appendix A quotes, which LLM-Adapters' code uses only for rows with
    # an input.
    "sara": (
        f"{_TASK_WITH_INPUT}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{prompt}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
    ),
    # The same sentence at test time ("during training and testing"), in the form of its tests.
    "sara_test": f"{_TASK_WITH_INPUT} \n\n{_INDENT}### Instruction:\n{_INDENT}{{prompt}}\n\n{_INDENT}### Response:\n{_INDENT}",
    # SORSA trains on this (its published code) ...
    "sorsa_train": f"{_TASK}\n\n### Instruction:\n{{prompt}}\n\n### Response:",
    # ... and is tested on GSM8K and MATH with this (Listing 1).
    "sorsa_math": f"{_TASK}\n\n### Instruction:\n{{prompt}}\n\n### Response: Let's think step by step.",
    # The same for code: training ...
    "sorsa_code": "@@ Instruction\n{prompt}\n\n@@ Response\n",
    # ... and HumanEval (Listing 2; the quotes of its two fences are those of the published code).
    "sorsa_humaneval": (
        "@@ Instruction\nHere is the given code to do completion:\n```python\n{prompt}\n```\n\n"
        "Please continue to complete the function with python programming language. You are not allowed to modify the "
        "given code and do the completion only.\n\n"
        "Please return all completed codes in one code block.\n"
        "This code block should be in the following format:\n'''python\n# Your codes here\n'''\n\n@@ Response\n"
    ),
    # LoRA's GPT-2 experiments on E2E: meaning, end token, sentence, end token.
    "lora_e2e": "{prompt}{eos}",
}
