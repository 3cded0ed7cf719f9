"""Rows in the field's formats come to one form, and what is malformed is named."""

from typing import Any

import pytest

from svdtune.data import Example, to_examples
from svdtune.data.examples import has_empty_answer
from svdtune.errors import SvdtuneError

ASK, SAY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


def example(row: dict[str, Any]) -> Example:
    [found] = to_examples([row], "prompt", "completion", source="rows.jsonl")
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [ASK, SAY]},
        {"prompt": [ASK], "completion": [SAY]},
        {"prompt": [ASK], "completion": "4"},
        {"messages": [ASK | {"tool_calls": None}, SAY | {"tool_calls": None}]},
        {"prompt": "2 + 2?", "messages": [ASK, SAY]},
        {"prompt": "2 + 2?", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [ASK | {"content": [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?"}]}, SAY]},
        {"messages": [ASK, SAY | {"content": [{"type": "text", "text": "4", "image": None}]}]},
        {"prompt": [ASK | {"content": ["2 + 2?"]}], "completion": [SAY | {"content": ["4"]}]},
        {"conversations": [{"from": "human", "value": ["2 + 2?"]}, {"from": "gpt", "value": ["4"]}]},
    ],
)
@pytest.mark.family(12)
def test_chats_of_one_answer(row: dict[str, Any]) -> None:
    found = example(row)
    assert (found.prompt, found.completion) == ([ASK], "4")
    by_template = not isinstance(row.get("completion"), str)  # who gives a text says how it is written
    assert (found.chat is not None) == by_template
    assert found.chat is None or ([*map(_bare, found.chat.messages)], found.chat.learnt) == ([ASK, SAY], [1])


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in ("role", "content")}


@pytest.mark.parametrize("system", ["Be brief.", "", None])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_column_system_opens_a_chat_that_has_none(column: str, system: str | None) -> None:
    own = {"role": "system", "content": "Be long."}
    opening = [{"role": "system", "content": system}] if system else []
    assert example({column: [ASK, SAY], "system": system}).prompt == [*opening, ASK]
    assert example({column: [own, ASK, SAY], "system": system}).prompt == [own, ASK]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
BLANK = {"role": "assistant", "content": " \n"}


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        ({"messages": [ASK, SAY]}, False),
        ({"messages": [ASK, BLANK]}, True),
        ({"messages": [ASK, BLANK, ASK, SAY]}, True),
        ({"messages": [ASK, CALL, ASK, SAY]}, False),
        ({"messages": [ASK, CALL]}, False),
        ({"prompt": [ASK, BLANK, ASK], "completion": [SAY]}, False),
        ({"instruction": "Add.", "output": ""}, True),
        ({"text": "\t"}, True),
        ({"prompt": "2 + 2?", "completion": 0}, False),
    ],
)
def test_an_answer_of_white_space_is_told(row: dict[str, Any], empty: bool) -> None:
    assert has_empty_answer(example(row)) == empty


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?", "4"),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "Add.\n\n2, 2", "4"),
        ({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, "Add 2 and 2.", "4"),
        ({"instruction": "Add 2 and 2.", "output": "4"}, "Add 2 and 2.", "4"),
        ({"text": "2 + 2 = 4"}, "", "2 + 2 = 4"),
    ],
)
def test_texts(row: dict[str, Any], prompt: str, completion: str) -> None:
    found = example(row)
    assert (found.prompt, found.completion, found.chat) == (prompt, completion, None)


def test_every_turn_of_the_assistants_is_kept_and_what_follows_the_last_is_not() -> None:
    turns = [ASK, SAY, {"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}]
    found = example({"messages": [*turns, {"role": "user", "content": "thanks"}]})
    assert found.chat is not None
    assert (found.chat.messages, found.chat.learn_from) == (turns, 0)
    assert (found.prompt, found.completion) == (turns[:3], "6")


def test_a_prompt_of_messages_is_not_learnt_where_the_completion_has_several() -> None:
    more = [SAY, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    found = example({"prompt": [ASK, SAY, ASK], "completion": more})
    assert found.chat is not None
    assert found.chat.learn_from == 3


def test_tools_are_handed_on() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    found = example({"messages": [ASK, call], "tools": '[{"name": "add"}]'})
    assert found.chat is not None
    assert (found.tools, found.completion) == ([{"name": "add"}], "")


@pytest.mark.parametrize("row", [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": [ASK], "completion": "4"}])
def test_tools_beside_a_prompt_are_handed_on(row: dict[str, Any]) -> None:
    assert example({**row, "tools": [{"name": "add"}]}).tools == [{"name": "add"}]
    assert example({**row, "tools": ""}).tools is None
    assert example({**row, "tools": " "}).tools is None
    if isinstance(row["prompt"], str):
        for other in ("pan, whisk", ["pan"], 3):  # another column of that name
            assert example({**row, "tools": other}).tools is None
    else:
        with pytest.raises(SvdtuneError, match=r"field 'tools' holds 'hammer'; expected a list .* Rename the column"):
            example({**row, "tools": "hammer"})
    [named] = to_examples([{"q": "use", "tools": "hammer", "a": "ok"}], "{q} {tools}", "a")
    assert (named.prompt, named.tools) == ("use hammer", None), "a field that the prompt names is text"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("form", [("role", "content", "assistant"), ("from", "value", "gpt")])
def test_a_turn_that_is_marked_is_read_and_not_trained_on(mark: dict[str, Any], form: tuple[str, str, str]) -> None:
    role, content, assistant = form
    turns = [{role: "user", content: "2 + 2?"}, {role: assistant, content: "5", **mark}]
    more = [{role: "user", content: "sure?"}, {role: assistant, content: "4", "weight": 1, "train": True}]
    found = example({"messages": [*turns, *more]})
    assert found.chat is not None
    assert (found.completion, found.chat.learnt) == ("4", [3]), "what is left is a prompt and one answer"
    assert [turn["content"] for turn in found.chat.messages] == ["2 + 2?", "5", "sure?", "4"]
    found = example({"messages": [*turns, *more, *more]})
    assert found.chat is not None
    assert found.chat.learnt == [3, 5]
    [last] = to_examples([{"messages": [*more, *turns]}], "messages")
    assert (last.completion, len(last.prompt)) == ("4", 1), "an answer that is not trained on is no prompt of another"
    with pytest.raises(SvdtuneError, match="row 1: every turn of the assistant's has `weight: 0` or `train: false`"):
        example({"messages": turns})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2 + 2?"}, r"row 1 has the columns 'question', which are those of no format .*data\.prompt"),
        ({"Instruction": "a", "output ": "b"}, r"'Instruction', 'output ' would be read if written in small letters"),
        ({"messages": "hi"}, r"field 'messages' holds 'hi'; expected a list of messages"),
        ({"messages": ["hi"]}, "message 1 is 'hi'; expected an object with role and content"),
        ({"messages": [{"role": "user"}]}, r"message 1 has role = 'user'; expected a role and a content"),
        (
            {"messages": [ASK]},
            "no message is the assistant's, so that nothing can be learnt from it; the roles are 'user'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, SAY]}, "expected text alone"),
        ({"messages": [ASK, {**SAY, "weight": 0.5}]}, r"message 2 has weight = 0\.5; expected 1 \(true\)"),
        ({"messages": [ASK, {**SAY, "train": "no"}]}, "message 2 has train = 'no'; expected 1"),
        ({"messages": [ASK, {"role": "assistant", "content": [3]}]}, "message 2 has a part 3; expected text alone"),
    ],
)
def test_what_is_malformed_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        example(row)
