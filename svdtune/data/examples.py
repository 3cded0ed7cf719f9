"""Examples: what a row says to the model (prompt), what it should answer (completion), and what the
row was."""

import difflib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from svdtune.data.standard import (
    before_of,
    chat_column,
    is_learnt,
    is_said,
    messages_of,
    opened,
    standard_row,
    text_of,
    tools_of,
    unrepeated,
)
from svdtune.errors import SvdtuneError

Messages = list[dict[str, Any]]
PROMPT, COMPLETION = "prompt", "completion"  # the fields that are taken where none are named


@dataclass(frozen=True)
class Chat:
    """A chat whose assistant's turns are trained on.

    Attributes:
        messages: up to the last of the assistant's turns that is trained on.
        learn_from: index of the first message that may be trained on.
    """

    messages: Messages
    learn_from: int = 0

    @property
    def learnt(self) -> list[int]:
        """Indices of the messages that are trained on."""
        return [at for at, turn in enumerate(self.messages) if at >= self.learn_from and is_learnt(turn)]


@dataclass(frozen=True)
class Example:
    """One prompt and its completion.

    Attributes:
        prompt: text, or messages ({"role", "content"} dicts) for the tokenizer's chat template.
        before: messages that a text prompt follows; not trained on.
        completion: the text to learn; the end token is not part of it, encoding adds it. Empty
            where none is needed.
        row: what it was made from, reference answers included.
        name: where it comes from, for error messages: "train.jsonl row 12".
        chat: the whole chat, which the chat template writes, where answers are messages.
        tools: their definitions, for the chat template.
    """

    prompt: str | Messages
    completion: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)
    name: str = "example"
    chat: Chat | None = None
    tools: Sequence[Any] | None = None
    before: Messages = field(default_factory=list)

    @property
    def asked(self) -> Messages:
        """The prompt as messages."""
        return [*self.before, {"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def asked_text(self) -> str:
        """The prompt as one text."""
        return "\n\n".join(str(turn.get("content", "")) for turn in self.asked)


def to_examples(
    rows: Sequence[Mapping[str, Any]], prompt: str, completion: str | None = None, *, source: str = "the data"
) -> list[Example]:
    """Make one example of each row.

    Args:
        rows: as read by `read_rows`.
        prompt: a field's name ("question"), or a text with fields in braces
            ("{instruction}\\n{input}"). Rows without a field "prompt" may be of any format in
            `svdtune.data.standard`. A field may hold a chat, whose last message, if it is the
            assistant's, becomes the completion; all of the assistant's turns are trained on.
        completion: likewise; None where only prompts are needed, or where prompts are whole chats.
        source: what to call the data in error messages.

    Raises:
        SvdtuneError: if a row lacks a field or holds no text there. The message names the row and
            the nearest field.
    """
    return [_example(row, prompt, completion, f"{source} row {i}") for i, row in enumerate(rows, 1)]


def has_empty_answer(example: Example) -> bool:
    """Whether an answer that is to be learnt is nothing but white space, and calls no tool."""
    if example.chat is None:
        return not example.completion.strip()
    learnt = [example.chat.messages[at] for at in example.chat.learnt]
    return any(not (str(turn.get("content") or "").strip() or turn.get("tool_calls")) for turn in learnt)


def fields_of(*specs: str | None) -> list[str]:
    """The fields that `prompt` and `completion` specifications refer to, each once.

    Raises:
        SvdtuneError: if a specification with braces is not a valid format string.
    """
    found: list[str] = []
    for spec in specs:
        if spec is None:
            continue
        try:
            found += [name for _, name, _, _ in string.Formatter().parse(spec) if name] if "{" in spec else [spec]
        except ValueError as error:
            raise SvdtuneError(
                f"the template {spec!r} is not valid ({error}); write {{{{ for a literal brace"
            ) from error
    return list(dict.fromkeys(found))


def check_fields(row: Mapping[str, Any], fields: Sequence[str], name: str) -> None:
    """Refuse a row without one of `fields`.

    Raises:
        SvdtuneError: naming the row, what it has, and the field that looks most like the one it
            lacks.
    """
    for wanted in fields:
        if wanted not in row:
            near = difflib.get_close_matches(wanted, list(row), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SvdtuneError(f"{name} has no field {wanted!r}: it has {', '.join(map(repr, row)) or 'none'}{hint}")


def _example(row: Mapping[str, Any], prompt: str, completion: str | None, name: str) -> Example:
    # the chat begins with the prompt
    repeated = completion == COMPLETION and not is_said(row, COMPLETION) and chat_column(row)
    by_columns = prompt == PROMPT and (not is_said(row, PROMPT) or repeated)
    if by_columns:
        row = standard_row({key: value for key, value in row.items() if not (repeated and key == PROMPT)}, name)
    asked = row.get(prompt)
    if isinstance(asked, list | tuple):
        checked = by_columns and chat_column(row)  # `standard_row` has made messages of it
        turns = list(asked) if checked else messages_of(asked, f"{name}: field {prompt!r}")
        turns = opened(turns, row) if prompt == PROMPT else turns
        return _chat_example(row, turns, completion, name)
    check_fields(row, fields_of(prompt, completion), name)
    answer = "" if completion is None else _fill(completion, row, name)
    tools = None if "tools" in fields_of(prompt, completion) else tools_of(row)
    text = _fill(prompt, row, name)
    before = before_of(row, name) if prompt == PROMPT and text else []  # a prompt that is named is all that is asked
    return Example(text, answer, row, name, tools=tools, before=before)


def _chat_example(row: Mapping[str, Any], asked: Messages, completion: str | None, name: str) -> Example:
    """An example of a chat, with what answers it behind it or in a field of its own."""
    whole = completion is None or (completion == COMPLETION and not is_said(row, COMPLETION))
    tools, given = tools_of(row), row.get("tools")
    if tools is None and given and str(given).strip() not in ("", "[]"):
        raise SvdtuneError(
            f"{name}: field 'tools' holds {given!r:.60}; expected a list of definitions of tools, or such a list as JSON. "
            "Rename the column if it holds something else"
        )
    if not whole:
        assert completion is not None
        check_fields(row, fields_of(completion), name)
        answer = row.get(completion)
        if not isinstance(answer, list | tuple):
            return Example(asked, _fill(completion, row, name), row, name, tools=tools)
        answers = messages_of(answer, f"{name}: field {completion!r}")
        chat = Chat([*asked, *unrepeated(answers, asked)], len(asked))
    else:
        chat = Chat(asked)
    turns, learnt = chat.messages, chat.learnt
    if completion is None and turns[-1]["role"] != "assistant":
        return Example(turns, "", row, name, tools=tools)  # it asks, and nothing is to be learnt from it
    if not learnt and any(turn["role"] == "assistant" for turn in turns):
        raise SvdtuneError(
            f"{name}: every turn of the assistant's has `weight: 0` or `train: false`; leave the row out"
        )
    if not learnt:
        roles = ", ".join(dict.fromkeys(repr(turn["role"]) for turn in turns))
        raise SvdtuneError(
            f"{name}: no message is the assistant's, so that nothing can be learnt from it; the roles are {roles}, and "
            "an answer's is 'assistant' (in ShareGPT's chats 'gpt')"
        )
    if learnt[0] == 0:
        raise SvdtuneError(
            f"{name}: the chat begins with a turn of the assistant's, which answers nothing; mark it with `weight: 0`, so "
            "that it is read and not trained on, or put what it answers before it"
        )
    text = turns[learnt[-1]].get("content")
    # As the template writes it: many write more than the content, such as the channel it is in.
    kept = Chat(turns[: learnt[-1] + 1], chat.learn_from)
    return Example(turns[: learnt[-1]], text if isinstance(text, str) else "", row, name, kept, tools)


def _fill(spec: str, row: Mapping[str, Any], name: str) -> str:
    for key in fields_of(spec):
        text_of(row, key, name)
    values = {key: row[key] for key in fields_of(spec)}
    return spec.format_map(values) if "{" in spec else str(values[spec])
