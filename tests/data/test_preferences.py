"""Pairs and labelled answers: what each format becomes, in tokens, and which rows are refused."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from svdtune.data import encode
from svdtune.data.examples import Example
from svdtune.data.preferences import encode_labelled, encode_pairs, to_labelled, to_pairs, token_counts
from svdtune.errors import SvdtuneError

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "Go"))
)
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    return tiny_tokenizer


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "Go"},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go"},
        },
    ],
)
def test_chats_of_every_form_are_the_same_pair(row: dict[str, Any], chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [(chosen, rejected)] = to_pairs([row])
    assert chosen.prompt == rejected.prompt == [USER]
    [pair], _ = encode_pairs([(chosen, rejected)], chat_tokenizer, 64)
    assert {name: chat_tokenizer.decode(ids) for name, ids in pair.items()} == {
        "prompt_ids": "user: Hi<|end|>assistant: ",
        "chosen_ids": "Hello<|end|>",
        "rejected_ids": "Go<|end|>",
    }
    assert token_counts([pair]) == [sum(map(len, pair.values()))]


def test_text_is_encoded_as_sft_encodes_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"question": "1 + 1", "chosen": " 2", "rejected": " 3"}
    pairs = to_pairs([row], "question")
    [pair], _ = encode_pairs(pairs, tiny_tokenizer, 64, "Q: {prompt} A:")
    for answer in ("chosen", "rejected"):
        whole = encode(Example("1 + 1", row[answer]), tiny_tokenizer, 64, template="Q: {prompt} A:")
        assert pair["prompt_ids"] + pair[f"{answer}_ids"] == whole["input_ids"]
    assert tiny_tokenizer.decode(pair["prompt_ids"]) == "Q: 1 + 1 A:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why? A: so it is", "Q: why? A: no", "Q: why? A:"),
        ("A:\nyes", "A:\nyet", "A:\n"),
        ("yes", "no", ""),
        ("so", "so it is", "so"),
    ],
)
def test_the_prompt_is_what_both_texts_begin_with(
    chosen: str, rejected: str, prompt: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = to_pairs([{"chosen": chosen, "rejected": rejected}])
    assert pairs[0][0].prompt == prompt
    [pair], _ = encode_pairs(pairs, tiny_tokenizer, 64)
    assert tiny_tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"]) == f"{chosen}<|end|>"
    assert tiny_tokenizer.decode(pair["prompt_ids"] + pair["rejected_ids"]) == f"{rejected}<|end|>"


def test_labels_are_read_as_files_write_them(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    given = [True, False, 1, 0, "True", "false", "1", " 0"]
    rows = [{"prompt": "Hi", "completion": [GOOD], "label": label} for label in given]
    encoded, _ = encode_labelled(to_labelled(rows), chat_tokenizer, 64)
    assert [row["label"] for row in encoded] == [True, False] * 4
    assert chat_tokenizer.decode(encoded[0]["prompt_ids"]) == "user: Hi<|end|>assistant: "
    assert chat_tokenizer.decode(encoded[0]["completion_ids"]) == "Hello<|end|>"


def test_marks_say_nothing_of_an_answer_that_is_judged(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    good, bad = {**GOOD, "weight": 1}, {**BAD, "weight": 0}
    for row in (
        {"prompt": [USER], "chosen": [good], "rejected": [bad]},
        {"chosen": [USER, good], "rejected": [USER, bad]},
    ):
        rows, _ = encode_pairs(to_pairs([row]), chat_tokenizer, 100)
        plain, _ = encode_pairs(
            to_pairs([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]), chat_tokenizer, 100
        )
        assert list(rows) == list(plain)
    for row in (
        {"prompt": "Hi", "completion": [bad]},
        {"prompt": [USER], "completion": [bad]},
        {"messages": [USER, bad]},
    ):
        labelled, _ = encode_labelled(to_labelled([{**row, "label": False}]), chat_tokenizer, 100)
        assert labelled[0]["completion_ids"] == rows[0]["rejected_ids"]


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("answer", [GOOD, {"from": "gpt", "value": "Hello"}])
def test_a_label_beside_a_chat_judges_its_last_message(answer: dict[str, Any], label: bool) -> None:
    for column in ("messages", "conversations"):
        for asked in ({}, {"prompt": "Hi"}):  # which the chat repeats
            [(found, judged)] = to_labelled([{**asked, column: [USER, BAD, USER, answer], "label": label}])
            assert (found.prompt, found.completion, judged) == ([USER, BAD, USER], "Hello", label)


@pytest.mark.parametrize("label", [None, "good", 0.5, [True]])
def test_a_label_that_is_none_is_refused(label: Any) -> None:
    with pytest.raises(SvdtuneError, match=r"train.jsonl row 1: the label is .*; expected true for an answer"):
        to_labelled([{"prompt": "a", "completion": "b", "label": label}], source="train.jsonl")


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (
            to_pairs,
            {"prompt": "a", "chosen": "b"},
            r"row 1 has no 'rejected': it has 'prompt', 'chosen'\. training.task: dpo",
        ),
        (to_pairs, {"messages": []}, r"has no 'chosen' and no 'rejected'"),
        (
            to_labelled,
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            r"no 'completion' and no 'label'.*choose the task that",
        ),
        (to_pairs, {"chosen": "b", "rejected": [GOOD]}, "one of chosen and rejected is text and the other messages"),
        (to_pairs, {"chosen": [GOOD], "rejected": [BAD]}, "share no first message that would be one; add the column"),
        (to_pairs, {"prompt": "a", "chosen": 3, "rejected": "c"}, "field 'chosen' holds 3; expected text or messages"),
        (to_labelled, {"messages": [USER], "label": True}, "field 'messages' ends with no answer of the assistant's"),
    ],
)
def test_rows_that_lack_something_are_refused(read: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        read([row])


def test_what_is_too_long_is_refused_left_out_or_cut(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = to_pairs(
        [{"prompt": "ab", "chosen": "c", "rejected": "defgh"}, {"prompt": "ab", "chosen": "c", "rejected": "d"}]
    )
    with pytest.raises(SvdtuneError, match=r"row 1: prompt and response are 2 \+ 6 tokens long"):
        encode_pairs(pairs, tiny_tokenizer, 5)
    rows, count = encode_pairs(pairs, tiny_tokenizer, 5, overlong="drop")
    assert (len(rows), count) == (1, 1)
    rows, count = encode_pairs(pairs, tiny_tokenizer, 5, overlong="cut")
    assert (len(rows), count) == (2, 1)
    assert tiny_tokenizer.decode(rows[0]["rejected_ids"]) == "def"
    assert tiny_tokenizer.decode(rows[0]["chosen_ids"]) == "c<|end|>"
    with pytest.raises(SvdtuneError, match="no row is left: all 2 are longer than"):
        encode_pairs(pairs, tiny_tokenizer, 2, overlong="cut")
    labelled = to_labelled([{"prompt": "ab", "completion": "cdef", "label": True}])
    rows, count = encode_labelled(labelled, tiny_tokenizer, 5, overlong="cut")
    assert (tiny_tokenizer.decode(rows[0]["completion_ids"]), count) == ("cde", 1)
    with pytest.raises(SvdtuneError, match="no row is left"):
        encode_labelled(labelled, tiny_tokenizer, 5, overlong="drop")


def test_a_template_that_writes_the_prompt_in_two_ways_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    tool = {"role": "tool", "content": "7"}
    pairs = to_pairs([{"prompt": [USER], "chosen": [tool, GOOD], "rejected": [BAD]}])
    with pytest.raises(SvdtuneError, match="writes the prompt differently before the chosen answer"):
        encode_pairs(pairs, tiny_tokenizer, 64)
