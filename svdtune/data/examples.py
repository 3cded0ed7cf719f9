"""Examples: what a row says to the model (prompt), what it should answer (completion), and what the
row was."""

import difflib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from svdtune.errors import SvdtuneError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One prompt and its completion.

    Attributes:
        prompt: text, or messages ({"role", "content"} dicts) for the tokenizer's chat template.
        completion: the text to learn; the end token is not part of it, encoding adds it. Empty
            where none is needed.
        row: what it was made from, reference answers included.
        name: where it comes from, for error messages: "train.jsonl row 12".
    """

    prompt: str | Messages
    completion: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)
    name: str = "example"


def to_examples(
    rows: Sequence[Mapping[str, Any]], prompt: str, completion: str | None = None, *, source: str = "the data"
) -> list[Example]:
    """Make one example of each row.

    Args:
        rows: as read by `read_rows`.
        prompt: a field's name ("question"), or a text with fields in braces
            ("{instruction}\\n{input}"). A field may hold a list of messages; if `completion` is
            None the last of them, the assistant's, becomes the completion.
        completion: likewise; None where only prompts are needed.
        source: what to call the data in error messages.

    Raises:
        SvdtuneError: if a row lacks a field or holds no text there. The message names the row and
            the nearest field.
    """
    return [_example(row, prompt, completion, f"{source} row {i}") for i, row in enumerate(rows, 1)]


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
    check_fields(row, fields_of(prompt, completion), name)
    asked = row[prompt] if prompt in row and isinstance(row[prompt], list) else _fill(prompt, row, name)
    answer = "" if completion is None else _fill(completion, row, name)
    if isinstance(asked, list):
        _check_messages(asked, prompt, name)
        if completion is None and asked[-1]["role"] == "assistant":
            asked, answer = asked[:-1], asked[-1]["content"]
    return Example(asked, answer, row, name)


def _fill(spec: str, row: Mapping[str, Any], name: str) -> str:
    values = {key: row[key] for key in fields_of(spec)}
    for key, value in values.items():
        if not isinstance(value, str | int | float):
            raise SvdtuneError(f"{name}: field {key!r} holds {value!r:.60}, expected text or a number")
    return spec.format_map(values) if "{" in spec else str(values[spec])


def _check_messages(messages: list[Any], key: str, name: str) -> None:
    well_formed = messages and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not well_formed:
        raise SvdtuneError(f"{name}: field {key!r} is a list, but not of messages with a text 'role' and 'content'")
