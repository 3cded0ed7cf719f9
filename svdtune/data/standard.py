"""Rows in the formats that the field's tools share, told by their columns and brought to one form.

| columns | format | what becomes of it |
|---|---|---|
| `messages` | OpenAI's chats | `prompt`: the messages |
| `conversations` | ShareGPT's (`from`, `value`), or messages | `prompt`: the messages |
| `prompt`, `completion` | text, or a list of messages each | stays |
| `instruction`, `input`, `output` | Alpaca's | `prompt`: instruction and input, `completion` |
| `text` | plain text | `completion`: the text, after an empty prompt |

`tools` beside a prompt or messages goes to the chat template. `system` beside messages is the first
of a chat that has none; beside a text prompt it is what the prompt follows, as are the turns of
`history`. A content in parts becomes one text. A message of the assistant's with `weight: 0` or
`train: false` is read and not trained on.

A table gives every row every column of any of them, so a column that holds null, or the NaN of
pandas, was not said: it tells no format.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from svdtune.errors import SvdtuneError

Row = Mapping[str, Any]
Message = dict[str, Any]

_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
# In ShareGPT's `from` alone: as a `role` some templates know them by these names.
_SENDERS = _ROLES | {"function_call": "assistant", "observation": "tool", "function_response": "tool"}
MARKS = ("weight", "train")  # of a message: whether it is trained on, in OpenAI's files and in Axolotl's
CHATS = ("messages", "conversations")  # the columns of whole chats
_COLUMNS = {*CHATS, "prompt", "completion", "instruction", "input", "output", "text", "chosen", "rejected", "label"}
_SPOKEN = {*CHATS, "prompt", "completion", "chosen", "rejected", "tools"}  # what a chat template may be given
FORMATS = "messages, conversations, prompt and completion, instruction and output, or text"


def standard_row(row: Row, name: str) -> Row:
    """The row with a `prompt` and, unless its prompt is a whole chat, a `completion`.

    Raises:
        SvdtuneError: if its columns are those of no format, or a chat is malformed.
    """
    if is_said(row, "prompt"):
        return row
    if column := chat_column(row):
        return {**row, "prompt": chat_of(row, column, name)}
    if is_said(row, "instruction") and "output" in row:
        return {**row, "prompt": instruction_of(row, name), "completion": text_of(row, "output", name)}
    if is_said(row, "text"):
        return {**row, "prompt": "", "completion": text_of(row, "text", name)}
    if empty := [column for column in row if column in _COLUMNS and not is_said(row, column)]:
        raise SvdtuneError(
            f"{name}: {', '.join(map(repr, empty))} hold{'s' * (len(empty) == 1)} nothing (null or NaN), and what is left "
            f"is a row of no format ({FORMATS}); fill the row, or take it out"
        )
    raise SvdtuneError(
        f"{name} has the columns {', '.join(map(repr, row)) or 'none'}, which are those of no format ({FORMATS}"
        f"{capitals(row)}); say which hold what is asked and answered: data.prompt and data.completion"
    )


def instruction_of(row: Row, name: str) -> str:
    """What Alpaca's columns ask: instruction and input.

    Raises:
        SvdtuneError: if a column holds no text.
    """
    asked = text_of(row, "instruction", name)
    if given := text_of(row, "input", name).strip() if is_said(row, "input") else "":
        asked = f"{asked}\n\n{given}"
    return asked


def before_of(row: Row, name: str) -> list[Message]:
    """What a text prompt follows: the row's `system`, and its `history` of questions and answers,
    as LLaMA-Factory's files have them, or of messages.

    Raises:
        SvdtuneError: if the history is another list.
    """
    before, history = _system_of(row), row.get("history")
    if not isinstance(history, list | tuple) or not history:
        return before
    if isinstance(history[0], Mapping) and history[0].keys() & {"role", "from"}:
        return before + messages_of(history, f"{name}: field 'history'")
    if not isinstance(history[0], list | tuple):
        return before  # it holds something else than what was said
    if not all(isinstance(one, list | tuple) and len(one) == 2 for one in history):
        raise SvdtuneError(
            f"{name}: field 'history' holds {history!r:.60}; expected pairs of a question and its answer, or messages. "
            "Rename the column if it holds something else"
        )
    said = ((role, text) for one in history for role, text in zip(("user", "assistant"), one, strict=True))
    return before + [{"role": role, "content": str(text)} for role, text in said if text is not None]


def capitals(columns: Iterable[str]) -> str:
    """A hint for columns that would be those of a format but for capital letters and spaces."""
    other = [repr(name) for name in columns if name not in _COLUMNS and name.strip().lower() in _COLUMNS]
    return f"; {', '.join(other)} would be read if written in small letters" if other else ""


def is_said(row: Row, column: str) -> bool:
    """Whether a row holds something in a column, and neither null nor NaN."""
    value = row.get(column)
    return value is not None and value == value


def without_nulls(row: Row) -> Row:
    """A table's row without the fields of its chats and tools that hold null: a table gives every
    message, call and tool every field of any of them."""
    return {key: _said(value) if key in _SPOKEN else value for key, value in row.items()}


def _said(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _said(one) for key, one in value.items() if one is not None}
    return [_said(one) for one in value] if isinstance(value, list) else value


def text_of(row: Row, column: str, name: str) -> str:
    """What a row says in a column, text or a number, as text.

    Raises:
        SvdtuneError: if it is neither.
    """
    value = row[column]
    if not isinstance(value, str | int | float) or value != value:
        raise SvdtuneError(f"{name}: field {column!r} holds {value!r:.60}, expected text or a number")
    return str(value)


def chat_column(row: Row) -> str | None:
    """The column of a row's whole chat, None where it has none."""
    return next((column for column in CHATS if is_said(row, column)), None)


def chat_of(row: Row, column: str, name: str) -> list[Message]:
    """The chat in a column, after the row's `system` where it opens with none.

    Raises:
        SvdtuneError: as `messages_of`.
    """
    return opened(messages_of(row[column], f"{name}: field {column!r}"), row)


def opened(messages: list[Message], row: Row) -> list[Message]:
    """A chat, after the row's `system` where it opens with none."""
    return messages if messages[0]["role"] == "system" else [*_system_of(row), *messages]


def _system_of(row: Row) -> list[Message]:
    """The row's `system` as a message, if it says something there."""
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def is_learnt(message: Message) -> bool:
    """Whether a message is a turn of the assistant's that is trained on: each is, unless it is
    marked with `weight: 0` or `train: false`."""
    return message["role"] == "assistant" and all(message.get(mark, True) for mark in MARKS)


def unrepeated(answer: Sequence[Message], prompt: Sequence[Message]) -> list[Message]:
    """What of a chat is behind the prompt, where it begins with it, perhaps without the system's
    message; else all of it."""
    for repeated in (list(prompt), list(prompt[1:]) if prompt and prompt[0]["role"] == "system" else []):
        if repeated and len(answer) > len(repeated) and list(answer[: len(repeated)]) == repeated:
            return list(answer[len(repeated) :])
    return list(answer)


def unmarked(messages: Iterable[Message]) -> list[Message]:
    """Messages whose marks say nothing: those of answers that are judged."""
    return [{key: value for key, value in message.items() if key not in MARKS} for message in messages]


def tools_of(row: Row) -> Sequence[Any] | None:
    """The definitions of tools in a row, a list of objects or its JSON; None where its column
    `tools` holds something else."""
    found = row.get("tools")
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            return None
    defined = isinstance(found, list | tuple) and all(isinstance(one, Mapping) for one in found)
    return found if found and defined else None


def messages_of(turns: Any, name: str) -> list[Message]:
    """A chat as messages with `role` and `content`.

    Raises:
        SvdtuneError: if it is no list of messages, saying which of them is malformed.
    """
    if not isinstance(turns, list | tuple) or not turns:
        raise SvdtuneError(f"{name} holds {turns!r:.60}; expected a list of messages")
    return [_message(turn, f"{name}, message {at}") for at, turn in enumerate(turns, 1)]


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping):
        raise SvdtuneError(f"{name} is {turn!r:.60}; expected an object with role and content")
    if "from" in turn and "value" in turn:
        more = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {"role": _role(turn["from"], _SENDERS), "content": turn["value"], **more}
    # A table gives every message every column of any of them: what is empty was not said.
    message = {key: value for key, value in turn.items() if value is not None}
    message["role"] = _role(message.get("role"), _ROLES)
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(message.get("role"), str) or not (isinstance(content, str | list) or calls):
        raise SvdtuneError(
            f"{name} has {', '.join(f'{key} = {value!r:.40}' for key, value in message.items()) or 'nothing'}; "
            "expected a role and a content (or tool_calls), or from and value"
        )
    for mark in MARKS:
        if message.get(mark, 1) not in (0, 1):
            raise SvdtuneError(
                f"{name} has {mark} = {message[mark]!r:.40}; expected 1 (true) for a turn that is trained on, or 0 (false)"
            )
    if isinstance(content, list):
        message["content"] = "".join(_text_of(part, name) for part in content)
    if calls:
        message["content"] = message.get("content", "")  # which many templates add to other text
        message["tool_calls"] = _calls_of(calls, name)
    return message


def _role(given: Any, known: Mapping[str, str]) -> Any:
    return known.get(given.strip().lower(), given) if isinstance(given, str) else given


def _calls_of(calls: Any, name: str) -> list[Any]:
    """Calls of tools with their arguments as an object, as templates take them; OpenAI's files have
    them as JSON in a text, which most templates would write as a text in quotes."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise SvdtuneError(
            f"{name} has tool_calls = {calls!r:.60}; expected a list of objects with a name and arguments"
        )
    return [_call(call) for call in calls]


def _call(call: Row) -> Row:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    if isinstance(given := call.get("arguments"), str):
        with suppress(ValueError):
            read = json.loads(given)
            return {**call, "arguments": read} if isinstance(read, dict) else call
    return call


def _text_of(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if not isinstance(text, str):
        raise SvdtuneError(f"{name} has a part {part!r:.60}; expected text alone: {{'type': 'text', 'text': ...}}")
    return text
