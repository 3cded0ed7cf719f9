"""Encoding: the end token is always trained on, the prompt only if asked, padding never."""

from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerFast

from svdtune.data import Collator, Example, encode, encode_all, prompt_ids
from svdtune.data.encoding import IGNORED
from svdtune.errors import SvdtuneError

EXAMPLE = Example("ask: ", "say", name="a.json row 7")


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = None


def test_the_response_and_the_end_token_are_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(EXAMPLE, tokenizer, 32)
    assert tokenizer.decode(encoded["input_ids"]) == "ask: say<|end|>"
    assert encoded["labels"] == [-100] * 5 + encoded["input_ids"][5:]
    assert encoded["labels"][-1] == tokenizer.eos_token_id


def test_loss_on_all_trains_on_the_prompt_too(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(EXAMPLE, tokenizer, 32, loss_on="all")
    assert encoded["labels"] == [IGNORED, *encoded["input_ids"][1:]]  # nothing predicts the first token
    with pytest.raises(SvdtuneError, match="loss_on is 'both'; expected response or all"):
        encode(EXAMPLE, tokenizer, 32, loss_on="both")


def test_training_and_generation_see_the_same_prompt_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = prompt_ids(EXAMPLE, tokenizer, "Q {prompt}A")
    assert tokenizer.decode(prompt) == "Q ask: A"
    assert encode(EXAMPLE, tokenizer, 32, template="Q {prompt}A")["input_ids"][: len(prompt)] == prompt


def test_chat_templates(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SvdtuneError, match=r"a\.json row 7: the tokenizer has no chat template"):
        prompt_ids(EXAMPLE, tokenizer, "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '>' + m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant>{% endif %}"
    )
    assert tokenizer.decode(prompt_ids(EXAMPLE, tokenizer, "chat")) == "user>ask: <|end|>assistant>"
    turns = Example([{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}])
    assert tokenizer.decode(prompt_ids(turns, tokenizer)) == "system>be<|end|>user>hi<|end|>assistant>"


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    class Closing:
        eos_token, eos_token_id, chat_template = tokenizer.eos_token, tokenizer.eos_token_id, None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return tokenizer.encode(text) + [tokenizer.eos_token_id] * add_special_tokens

    assert encode(EXAMPLE, Closing(), 32) == encode(EXAMPLE, tokenizer, 32)


def test_a_prompt_longer_than_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SvdtuneError, match=r"a\.json row 7: the prompt is 5 tokens long, and max_length is 5"):
        encode(EXAMPLE, tokenizer, 5)


def test_an_example_that_does_not_fit_is_refused_or_dropped_but_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(encode(EXAMPLE, tokenizer, 9)["input_ids"]) == 9
    with pytest.raises(SvdtuneError, match=r"are 5 \+ 4 tokens long, and max_length is 8"):
        encode(EXAMPLE, tokenizer, 8)
    short = Example("a", "b")
    encoded, dropped = encode_all([EXAMPLE, short], tokenizer, 8, overlong="drop")
    assert (list(encoded), dropped) == ([encode(short, tokenizer, 8)], 1)
    with pytest.raises(SvdtuneError, match="no example is left: all 1 are longer than max_length = 8"):
        encode_all([EXAMPLE], tokenizer, 8, overlong="drop")


def test_a_template_without_a_place_for_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SvdtuneError, match=r"has no \{prompt\} in it"):
        prompt_ids(EXAMPLE, tokenizer, "Q:")


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_padding_is_masked_and_the_end_token_is_not(tokenizer: PreTrainedTokenizerFast, pad_is_end: bool) -> None:
    pad = tokenizer.eos_token_id if pad_is_end else tokenizer.pad_token_id
    rows = [encode(Example("p", "long answer"), tokenizer, 32), encode(Example("p", "a"), tokenizer, 32)]
    batch = Collator(pad, multiple_of=8)(rows)
    assert batch["input_ids"].shape == (2, 16)
    for row, ids, mask, labels in zip(
        rows, *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        n = len(row["input_ids"])
        assert ids.tolist() == row["input_ids"] + [pad] * (16 - n)
        assert mask.tolist() == [1] * n + [0] * (16 - n)
        assert labels.tolist() == row["labels"] + [-100] * (16 - n)
        assert labels[n - 1] == tokenizer.eos_token_id


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_are_padded_for_tensor_cores_where_there_are_some(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda *_: gpu)
    row = encode(Example("p", "long answer"), tokenizer, 32)
    assert 8 < len(row["input_ids"]) < 16
    assert Collator(0)([row])["input_ids"].shape[1] == (16 if gpu else len(row["input_ids"]))


def test_cutting_ends_an_example_without_an_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded, cut = encode_all([EXAMPLE, Example("a", "b")], tokenizer, 7, overlong="cut")
    whole = encode(EXAMPLE, tokenizer, 32)
    assert cut == 1
    assert encoded[0] == {key: values[:7] for key, values in whole.items()}
    assert encoded[1] == encode(Example("a", "b"), tokenizer, 7)
    left, cut = encode_all([EXAMPLE, Example("a", "b")], tokenizer, 5, overlong="cut")
    assert (list(left), cut) == ([encoded[1]], 1)


def test_prompts_of_the_papers_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    indent = " " * 16
    expected = {
        "llm_adapters": f"{task}  \n\n{indent}### Instruction:\n{indent}ask: \n{indent}\n{indent}### Response:\n{indent}",
        "llm_adapters_test": f"{task} \n\n{indent}### Instruction:\n{indent}ask: \n\n{indent}### Response:\n{indent}",
        "sorsa_train": f"{task}\n\n### Instruction:\nask: \n\n### Response:",
        "sorsa_math": f"{task}\n\n### Instruction:\nask: \n\n### Response: Let's think step by step.",
        "sorsa_code": "@@ Instruction\nask: \n\n@@ Response\n",
        "lora_e2e": "ask: <|end|>",
    }
    for name, text in expected.items():
        assert tokenizer.decode(prompt_ids(EXAMPLE, tokenizer, name)) == text
    code = tokenizer.decode(prompt_ids(EXAMPLE, tokenizer, "sorsa_humaneval"))
    assert code.startswith(
        "@@ Instruction\nHere is the given code to do completion:\n```python\nask: \n```\n\nPlease continue"
    )
    assert code.endswith("in the following format:\n'''python\n# Your codes here\n'''\n\n@@ Response\n")
    for name, usual in (("sara", "llm_adapters"), ("sara_test", "llm_adapters_test")):
        quoted = tokenizer.decode(prompt_ids(EXAMPLE, tokenizer, name))
        context = ", paired with an input that provides further context."
        assert quoted == expected[usual].replace("a task.", f"a task{context}", 1)


def test_the_end_token_in_a_prompt_is_not_taken_for_a_closed_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Example("{eos}", " b"), tokenizer, 32, template="lora_e2e")
    assert tokenizer.decode(encoded["input_ids"]) == "{eos}<|end|> b<|end|>"
    assert encoded["labels"][:6] == [-100] * 6
