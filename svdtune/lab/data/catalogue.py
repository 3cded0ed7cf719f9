"""The papers' data sets: the files they come in, their splits, and how a row is asked and answered.

A name such as `svamp` or `gsm8k` stands for its files in the data folder. They lie there as their
publishers have them (`LLM-Adapters/dataset/SVAMP/test.json`) or under a short name
(`sara_math/SVAMP_test.json`).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from svdtune.data.catalogue import CATALOGUE, DataSet, Rows
from svdtune.data.leaks import Questions, leaks
from svdtune.lab.data import e2e

_LLM_ADAPTERS = "git clone https://github.com/AGI-Edgerunners/LLM-Adapters (math_data.json: at 816657208a)"


def _heldout(dataset: DataSet) -> Rows:
    """SARA's held-out rows: those of the test file that its training file, drawn from the same
    rows, does not have."""
    fields = ("instruction", "output", "answer")
    trained = {tuple(row[name] for name in fields) for row in CATALOGUE["sara_math"].read("train") or []}
    return [row for row in dataset.read("all") or [] if tuple(row[name] for name in fields) not in trained]


def _unseen(dataset: DataSet) -> Rows:
    """The held-out rows whose question is not in the training file in other punctuation either."""
    rows = _heldout(dataset)
    trained = Questions.of([row["instruction"] for row in CATALOGUE["sara_math"].read("train") or []])
    leaked = {at for at, _ in leaks(Questions.of([row["instruction"] for row in rows]), trained)}
    return [row for at, row in enumerate(rows) if at not in leaked]


def _adapters(name: str, folder: str, task: str, short: str, **changes: Any) -> DataSet:
    """A test set of LLM-Adapters: its folder there, and `short` for the short path."""
    settings: dict[str, Any] = {
        "files": {"test": (f"LLM-Adapters/dataset/{folder}/test.json", f"{short}/{folder}_test.json")},
        "where": _LLM_ADAPTERS,
        "task": task,
        "template": "llm_adapters_test",
    }
    return DataSet(name, **settings | changes)


def _sara(name: str, folder: str, task: str = "number") -> DataSet:
    files = {"all": (f"LLM-Adapters/dataset/{folder}/test.json", f"sara_math/{folder}_test.json")}
    made = {"heldout": _heldout, "unseen": _unseen}
    return _adapters(name, folder, task, "sara_math", files=files, made=made, test="heldout")


def _commonsense(name: str, folder: str) -> DataSet:
    files = {
        split: (f"LLM-Adapters/dataset/{folder}/{split}.json", f"commonsense/{folder}_{split}.json")
        for split in ("train", "test")
    }
    return _adapters(name, folder, "choice", "commonsense", files=files, max_new_tokens=32)


def _mixed(names: Sequence[str]) -> Rows:
    """The training rows of several sets that none of their test sets asks, shuffled the same way
    every time."""
    rows = [row for name in names for row in CATALOGUE[name].read("train") or []]
    tested = Questions.of([row["instruction"] for name in names for row in CATALOGUE[name].read("test") or []])
    leaked = {at for at, _ in leaks(Questions.of([row["instruction"] for row in rows]), tested)}
    rows = [row for at, row in enumerate(rows) if at not in leaked]
    random.Random(0).shuffle(rows)  # noqa: S311  an order, not a key
    return rows


def _e2e(rows: Rows, split: str) -> Rows:
    """Pairs for training; for testing, one row a meaning with all its references."""
    return e2e.group(e2e.to_pairs(rows)) if split == "test" else e2e.to_pairs(rows)


def _human_eval(rows: Rows, _: str) -> Rows:
    """Put what a completion is graded against into one field."""
    return [
        row | {"reference": {key: row[key] for key in ("task_id", "prompt", "entry_point", "test")}} for row in rows
    ]


_LORA_E2E = "LoRA/examples/NLG/data/e2e/"
_E2E = DataSet(
    "e2e",
    {
        "train": (f"{_LORA_E2E}train.txt", "e2e/lora_train.txt", "e2e-dataset/trainset.csv", "e2e/trainset.csv"),
        "valid": (f"{_LORA_E2E}valid.txt", "e2e/lora_valid.txt", "e2e-dataset/devset.csv", "e2e/devset.csv"),
        "test": (
            f"{_LORA_E2E}test.txt",
            "e2e/lora_test.txt",
            "e2e-dataset/testset_w_refs.csv",
            "e2e/testset_w_refs.csv",
        ),
    },
    "git clone https://github.com/microsoft/LoRA",
    prompt="context",
    completion=" {completion}",
    answer="references",
    task="e2e",
    template="lora_e2e",
    max_new_tokens=64,
    convert=_e2e,
)
_MATH = DataSet(
    "math",
    {"test": ("MATH_test.jsonl", "math/MATH_test.jsonl")},
    "one JSON object a line with problem and solution, made of https://github.com/hendrycks/math",
    prompt="problem",
    completion="solution",
    answer="solution",
    task="math",
    template="sorsa_math",
    max_new_tokens=2048,
)
DATA_SETS = (
    DataSet(
        "sara_math",
        {"train": ("LLM-Adapters/ft-training_set/math_data.json", "sara_math/math_data.json")},
        _LLM_ADAPTERS,
    ),
    _sara("svamp", "SVAMP"),
    _sara("aqua", "AQuA", "letter"),
    _sara("addsub", "AddSub"),
    _sara("multiarith", "MultiArith"),
    _sara("singleeq", "SingleEq"),
    _sara("gsm8k_sara", "gsm8k"),
    DataSet(
        "commonsense_170k",
        {"train": ("LLM-Adapters/ft-training_set/commonsense_170k.json", "commonsense/commonsense_170k.json")},
        _LLM_ADAPTERS,
    ),
    DataSet(
        "commonsense_18k",
        {},
        _LLM_ADAPTERS,
        made={"train": lambda _: _mixed(("arc_challenge", "arc_easy", "boolq", "openbookqa"))},
    ),
    _commonsense("arc_challenge", "ARC-Challenge"),
    _commonsense("arc_easy", "ARC-Easy"),
    _commonsense("boolq", "boolq"),
    _commonsense("winogrande", "winogrande"),
    _commonsense("piqa", "piqa"),
    _commonsense("siqa", "social_i_qa"),
    _commonsense("openbookqa", "openbookqa"),
    _commonsense("hellaswag", "hellaswag"),
    DataSet(
        "gsm8k",
        {
            split: (f"grade-school-math/grade_school_math/data/{split}.jsonl", f"gsm8k/{split}.jsonl")
            for split in ("train", "test")
        },
        "git clone https://github.com/openai/grade-school-math",
        hub=("openai/gsm8k", "main"),
        prompt="question",
        completion="answer",
        task="gsm8k",
        template="sorsa_math",
        max_new_tokens=1024,
    ),
    _MATH,
    replace(
        _MATH,
        name="math500",
        files={"test": ("MATH500.jsonl", "math/MATH500.jsonl")},
        where="MATH-500, from the hub: HuggingFaceH4/MATH-500",
        hub=("HuggingFaceH4/MATH-500", None),
    ),
    DataSet(
        "metamathqa",
        {"train": ("MetaMathQA-395K.json", "metamathqa/MetaMathQA-395K.json")},
        "MetaMathQA-395K.json of meta-math/MetaMathQA on the hub",
        hub=("meta-math/MetaMathQA", None),
        prompt="query",
        completion="response",
    ),
    DataSet(
        "codefeedback",
        {"train": ("CodeFeedback-Filtered-Instruction.jsonl", "codefeedback/CodeFeedback-Filtered-Instruction.jsonl")},
        "CodeFeedback-Filtered-Instruction.jsonl of m-a-p/CodeFeedback-Filtered-Instruction on the hub",
        hub=("m-a-p/CodeFeedback-Filtered-Instruction", None),
        prompt="query",
        completion="answer",
    ),
    DataSet(
        "humaneval",
        {"test": ("human-eval/data/HumanEval.jsonl", "humaneval/HumanEval.jsonl")},
        "git clone https://github.com/openai/human-eval",
        hub=("openai/openai_humaneval", None),
        prompt="prompt",
        completion="canonical_solution",
        answer="reference",
        task="humaneval",
        template="sorsa_humaneval",
        max_new_tokens=2048,
        convert=_human_eval,
    ),
    _E2E,
    replace(_E2E, name="e2e_bleu", task="e2e_bleu"),
)

# What a table of a paper is scored on, in the order of its columns.
MEMBERS = {
    "sara_math": ("svamp", "aqua", "addsub", "multiarith", "singleeq", "gsm8k_sara"),
    "commonsense": ("arc_challenge", "arc_easy", "boolq", "winogrande", "piqa", "siqa", "openbookqa", "hellaswag"),
}
