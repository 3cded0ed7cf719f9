"""Rows in the formats that the field's tools share, told by their columns and brought to one form.

| columns | format | what becomes of it |
|---|---|---|
| `messages` | OpenAI's chats | `prompt`: the messages |
| `conversations` | ShareGPT's (`from`, `value`), or messages | `prompt`: the messages |
| `prompt`, `completion` | text, or a list of messages each | stays |
| `instruction`, `input`, `output` | Alpaca's | `prompt`: instruction and input, `completion` |
| `text` | plain text | `completion`: the text, after an empty prompt |

`tools` beside a prompt or messages goes to the chat template; `system` beside messages is the first
of a chat that has none. A content in parts becomes one text. A message of the assistant's with
`weight: 0` or `train: false` is read and not trained on.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svdtune.errors import SvdtuneError

Row = Mapping[str, Any]
Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
MARKS = ("weight", "train")  # of a message: whether it is trained on, in OpenAI's files and in Axolotl's
CHATS = ("messages", "conversations")  # the columns of whole chats
_COLUMNS = {*CHATS, "prompt", "completion", "instruction", "input", "output", "text", "chosen", "rejected", "label"}
FORMATS = "messages, conversations, prompt and completion, instruction and output, or text"


def standard_row(row: Row, name: str) -> Row:
    """The row with a `prompt` and, unless its prompt is a whole chat, a `completion`.

    Raises:
        SvdtuneError: if its columns are those of no format, or a chat is malformed.
    """
    if "prompt" in row:
        return row
    if column := chat_column(row):
        return {**row, "prompt": chat_of(row, column, name)}
    if "instruction" in row and "output" in row:
        given = str(row.get("input") or "").strip()
        prompt = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
        return {**row, "prompt": prompt, "completion": row["output"]}
    if "text" in row:
        return {**row, "prompt": "", "completion": row["text"]}
    raise SvdtuneError(
        f"{name} has the columns {', '.join(map(repr, row)) or 'none'}, which are those of no format ({FORMATS}"
        f"{capitals(row)}); say which hold what is asked and answered: data.prompt and data.completion"
    )


def capitals(columns: Iterable[str]) -> str:
    """A hint for columns that would be those of a format but for capital letters and spaces."""
    other = [repr(name) for name in columns if name not in _COLUMNS and name.strip().lower() in _COLUMNS]
    return f"; {', '.join(other)} would be read if written in small letters" if other else ""


def chat_column(row: Row) -> str | None:
    """The column of a row's whole chat, None where it has none."""
    return next((column for column in CHATS if column in row), None)


def chat_of(row: Row, column: str, name: str) -> list[Message]:
    """The chat in a column, after the row's `system` where it opens with none.

    Raises:
        SvdtuneError: as `messages_of`.
    """
    messages, system = messages_of(row[column], f"{name}: field {column!r}"), row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def is_learnt(message: Message) -> bool:
    """Whether a message is a turn of the assistant's that is trained on: each is, unless it is
    marked with `weight: 0` or `train: false`."""
    return message["role"] == "assistant" and all(message.get(mark, True) for mark in MARKS)


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
        turn = {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"], **more}
    # A table gives every message every column of any of them: what is empty was not said.
    message = {key: value for key, value in turn.items() if value is not None}
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
    return message


def _text_of(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if not isinstance(text, str):
        raise SvdtuneError(f"{name} has a part {part!r:.60}; expected text alone: {{'type': 'text', 'text': ...}}")
    return text
