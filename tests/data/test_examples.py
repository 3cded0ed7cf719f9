"""Examples: fields and templates into prompts and completions."""

import pytest

from svdtune.data import to_examples
from svdtune.errors import SvdtuneError

ROW = {"instruction": "Add.", "input": "1 and 2", "output": "3", "n": 3, "none": None}


def test_a_field_or_a_text_with_fields() -> None:
    [plain] = to_examples([ROW], "instruction", "output")
    assert (plain.prompt, plain.completion, plain.row) == ("Add.", "3", ROW)
    [filled] = to_examples([ROW], "{instruction}\n{input} {{}}", "= {n}", source="a.json")
    assert (filled.prompt, filled.completion, filled.name) == ("Add.\n1 and 2 {}", "= 3", "a.json row 1")


def test_messages_whose_last_is_the_answer() -> None:
    turns = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    [example] = to_examples([{"messages": turns}], "messages")
    assert (example.prompt, example.completion) == (turns[:1], "3")


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("instructions", "output", "the data row 1 has no field 'instructions': .* did you mean 'instruction'"),
        ("instruction", "{outputs}", "has no field 'outputs': .* did you mean 'output'"),
        ("none", "output", "field 'none' holds None, expected text or a number"),
        ("{instruction", "output", "is not valid .*; write {{ for a literal brace"),
    ],
)
def test_what_is_wrong_is_named(prompt: str, completion: str, message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        to_examples([ROW], prompt, completion)


@pytest.mark.parametrize("messages", [[], ["hi"], [{"role": "user"}]])
def test_a_list_that_is_not_messages(messages: list[object]) -> None:
    with pytest.raises(SvdtuneError, match=r"field 'messages'.* expected (a list of messages|an object|a role and)"):
        to_examples([{"messages": messages}], "messages")
