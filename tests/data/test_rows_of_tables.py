"""Rows as tables and scripts write them: null and NaN in place of what was not said, roles in any
letters, calls of tools with their arguments as text, answers that repeat the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from svdtune.data import Example, prompt_ids, read_rows, to_examples
from svdtune.data.preferences import to_labelled, to_pairs
from svdtune.errors import SvdtuneError

ASK, SAY, WRONG = (
    {"role": role, "content": text} for role, text in [("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")]
)
NAN = float("nan")


def example(row: dict[str, Any]) -> Example:
    [found] = to_examples([row], "prompt", "completion", source="rows.jsonl")
    return found


@pytest.mark.parametrize("nothing", [None, NAN])
def test_columns_that_hold_nothing_tell_no_format(nothing: float | None) -> None:
    def said(**row: Any) -> tuple[Any, str]:
        columns = ("prompt", "completion", "messages", "conversations", "instruction", "input", "output", "text")
        found = example(dict.fromkeys(columns, nothing) | row)
        return found.prompt, found.completion

    assert said(messages=[ASK, SAY]) == said(conversations=[ASK, SAY]) == ([ASK], "4")
    assert said(prompt="2 + 2?", completion="4") == said(instruction="2 + 2?", output="4") == ("2 + 2?", "4")
    assert said(text="2 + 2 = 4") == ("", "2 + 2 = 4")
    row = {"prompt": nothing, "completion": nothing, "messages": [ASK, SAY], "label": True}
    [(judged, label)] = to_labelled([row])
    assert (judged.prompt, judged.completion, label) == ([ASK], "4", True)
    [(chosen, rejected)] = to_pairs([{"prompt": nothing, "chosen": [ASK, SAY], "rejected": [ASK, WRONG]}])
    assert (chosen.prompt, chosen.completion, rejected.completion) == ([ASK], "4", "5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Add.", "output": NAN}, "field 'output' holds nan, expected text or a number"),
        (
            {"instruction": "Add.", "output": None, "text": "Add."},
            "field 'output' holds None, expected text or a number",
        ),
        (
            {"instruction": "Add.", "input": ["2", "2"], "output": "4"},
            r"field 'input' holds \['2', '2'\], expected text",
        ),
        ({"prompt": "2 + 2?", "completion": NAN}, "field 'completion' holds nan, expected text or a number"),
        ({"prompt": NAN, "completion": "4"}, r"'prompt' holds nothing \(null or NaN\).* fill the row, or take it out"),
        ({"text": None, "messages": None}, "'text', 'messages' hold nothing"),
    ],
)
def test_what_was_not_said_is_no_text(row: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdtuneError, match=f"rows.jsonl row 1: {message}"):
        example(row)


def test_a_number_is_an_input_too() -> None:
    assert example({"instruction": "Double.", "input": 0, "output": 0}).prompt == "Double.\n\n0"
    assert example({"instruction": "Double 0.", "input": NAN, "output": 0}).prompt == "Double 0."


@pytest.mark.parametrize("role", ["user", "User", "HUMAN", " human"])
@pytest.mark.parametrize(("who", "what"), [("role", "content"), ("from", "value")])
def test_a_role_is_one_in_any_letters(role: str, who: str, what: str) -> None:
    found = example({"messages": [{who: role, what: "2 + 2?"}, {who: "GPT", what: "4"}]})
    assert (found.prompt, found.completion) == ([ASK], "4")


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}], **more}


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_arguments_of_a_call_are_an_object(arguments: Any) -> None:
    found = example({"messages": [ASK, call(arguments, content=None)]})
    assert found.chat is not None
    assert found.chat.messages[1] == call({"a": 2}, content="")
    bare = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": arguments}]}
    found = example({"messages": [ASK, bare]})
    assert found.chat is not None
    assert found.chat.messages[1]["tool_calls"] == [{"name": "add", "arguments": {"a": 2}}]


def test_calls_that_are_no_list_are_refused() -> None:
    with pytest.raises(SvdtuneError, match=r"message 2 has tool_calls = '.*; expected a list of objects"):
        example({"messages": [ASK, {"role": "assistant", "tool_calls": json.dumps([{"name": "add"}])}]})


def test_a_table_says_of_tools_what_each_of_them_has(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    calls = [ASK, call({"a": 2}, content=None), {"role": "tool", "content": "4"}, call({"b": "x"}, content=None)]
    tools = [
        {"function": {"name": name, "parameters": {"properties": {argument: {"type": kind}}}}}
        for name, argument, kind in [("add", "a", "integer"), ("say", "b", "string")]
    ]
    row = {"messages": calls, "tools": tools, "seen": {"at": None}}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    [read] = read_rows(tmp_path / "rows.parquet")
    assert read["tools"] == tools
    assert read["seen"] == {"at": None}, "what no template is given stays"
    found = example(read)
    assert found.chat is not None
    called = [turn["tool_calls"][0]["function"]["arguments"] for turn in found.chat.messages if "tool_calls" in turn]
    assert called == [{"a": 2}, {"b": "x"}]


@pytest.mark.parametrize("asked", [{"prompt": [ASK]}, {"messages": [ASK, SAY]}, {"messages": [ASK]}])
def test_answers_that_repeat_the_prompt_do_not_ask_twice(asked: dict[str, Any]) -> None:
    [(chosen, rejected)] = to_pairs([{**asked, "chosen": [ASK, SAY], "rejected": [ASK, WRONG]}])
    assert (chosen.prompt, chosen.completion) == ([ASK], "4")
    assert (rejected.prompt, rejected.completion) == ([ASK], "5")
    assert example({"prompt": [ASK], "completion": [ASK, SAY]}).prompt == [ASK]


def test_a_chat_that_begins_with_the_assistant_is_refused_with_what_to_do() -> None:
    with pytest.raises(SvdtuneError, match=r"begins with a turn of the assistant's, .* mark it with `weight: 0`"):
        example({"messages": [SAY, ASK, SAY]})
    found = example({"messages": [{**SAY, "weight": 0}, ASK, SAY]})
    assert found.chat is not None
    assert found.chat.learnt == [2]


SYSTEM = {"role": "system", "content": "Be brief."}


HISTORY = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("completion", ["completion", "output"])
@pytest.mark.parametrize("history", [[["1 + 1?", "2"]], HISTORY])
def test_alpacas_system_and_history_are_what_the_prompt_follows(completion: str, history: Any) -> None:
    row = {"instruction": "2 + 2?", "input": "", "output": "4", "system": "", "history": []}
    for given, before in (({}, []), ({"system": "Be brief.", "history": history}, [SYSTEM, *HISTORY])):
        [found] = to_examples([row | given], "prompt", completion)
        assert (found.prompt, found.completion, found.asked) == ("2 + 2?", "4", [*before, ASK])
    [named] = to_examples([row | {"system": "Be brief."}], "instruction", completion="output")
    assert named.asked == [ASK], "a prompt that is named is all that is asked"


def test_histories_that_are_none() -> None:
    row = {"instruction": "2 + 2?", "output": "4", "history": [["1 + 1?", None]]}
    assert example(row).asked == [HISTORY[0], ASK]
    for other in (["x", "y"], [{"date": "1999"}], "long"):
        assert example(row | {"history": other}).asked == [ASK]
    with pytest.raises(SvdtuneError, match=r"field 'history' holds \[\['1 \+ 1\?'\]\]; expected pairs of a question"):
        example(row | {"history": [["1 + 1?"]]})


def test_one_template_writes_the_rows_with_a_system_and_those_without(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "2 + 2?", "completion": "4"}
    texts = [
        tiny_tokenizer.convert_tokens_to_string(
            tiny_tokenizer.convert_ids_to_tokens(prompt_ids(example(row | more), tiny_tokenizer, "Q: {prompt} A: "))
        )
        for more in ({}, {"system": "Be brief."})
    ]
    assert texts == ["Q: 2 + 2? A: ", "Q: Be brief.\n\n2 + 2? A: "]
    assert example({"text": "2", "system": "Be brief."}).before == []


def test_pairs_take_what_alpacas_columns_ask() -> None:
    row = {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"}
    [(chosen, rejected)] = to_pairs([row])
    assert (chosen.prompt, chosen.completion, rejected.completion) == ("Add.\n\n2, 2", "4", "5")
    [(chosen, _)] = to_pairs([row | {"system": "Be brief."}])
    assert chosen.asked == [SYSTEM, {"role": "user", "content": "Add.\n\n2, 2"}]


def test_pairs_are_not_trained_on_without_what_was_asked() -> None:
    row = {"system": "Be brief.", "question": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}
    with pytest.raises(SvdtuneError, match=r"has no 'prompt', but 'question'; rename .* data\.prompt: question"):
        to_pairs([row])
    [(named, _)] = to_pairs([row], "{system}\n{question}")
    assert named.prompt == "Be brief.\n2 + 2?"


def test_a_system_beside_a_text_and_messages_opens_the_chat() -> None:
    row = {"prompt": "2 + 2?", "system": "Be brief.", "chosen": [SAY], "rejected": [WRONG]}
    [(chosen, rejected)] = to_pairs([row])
    assert chosen.prompt == rejected.prompt == [SYSTEM, ASK]
    [(judged, _)] = to_labelled([{"prompt": "2 + 2?", "system": "Be brief.", "completion": [SAY], "label": 1}])
    assert judged.prompt == [SYSTEM, ASK]


@pytest.mark.parametrize("prompt", [[ASK], [SYSTEM, ASK], "2 + 2?"])
def test_answers_that_repeat_the_prompt_keep_the_system(prompt: Any) -> None:
    row = {"system": "Be brief.", "chosen": [ASK, SAY], "rejected": [ASK, WRONG]}
    columns = [{"prompt": prompt}, {}] + ([{"messages": prompt}] if isinstance(prompt, list) else [])
    for given in columns:
        [(chosen, rejected)] = to_pairs([row | given])
        assert chosen.asked == rejected.asked == [SYSTEM, ASK]
        assert (chosen.completion, rejected.completion) == (SAY["content"], WRONG["content"])
    [(judged, _)] = to_labelled([{"prompt": prompt, "system": "Be brief.", "completion": [ASK, SAY], "label": 1}])
    assert judged.asked == [SYSTEM, ASK]
    assert example({"prompt": [SYSTEM, ASK], "completion": [ASK, SAY]}).asked == [SYSTEM, ASK]


def test_a_shared_beginning_is_the_prompt_whatever_other_columns_there_are() -> None:
    row = {"user": "u123", "question": "an id", "chosen": "Human: hi\n\nA: 4", "rejected": "Human: hi\n\nA: 5"}
    [(chosen, rejected)] = to_pairs([row])
    assert chosen.prompt == rejected.prompt == "Human: hi\n\nA:"


def test_a_role_that_a_template_may_know_stays() -> None:
    turns = [ASK, {"role": "observation", "content": "4"}, SAY]
    assert [turn["role"] for turn in example({"messages": turns}).asked] == ["user", "observation"]
    sent = [{"from": "Human", "value": "2 + 2?"}, {"from": "Observation", "value": "4"}, {"from": "gpt", "value": "4"}]
    assert [turn["role"] for turn in example({"conversations": sent}).asked] == ["user", "tool"]
