"""Rows that judge answers, told by their columns: pairs of a chosen and a rejected answer, and
single answers with a label.

| task | columns |
|---|---|
| dpo, reward | `prompt`, `chosen`, `rejected` |
| kto | `prompt`, `completion`, `label`; or a chat that ends with the answer, and `label` |
| grpo | `prompt`, and whatever the rewards look at |

Prompts and answers are text, or messages. Where `chosen` and `rejected` hold whole chats or texts,
with `conversations` or `messages` before them or nothing, the prompt is what they begin with in
common.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from svdtune.data.columns import Columns
from svdtune.data.encoding import IGNORED, PLAIN, encode_all
from svdtune.data.examples import COMPLETION, PROMPT, Example, to_examples
from svdtune.data.standard import (
    before_of,
    chat_column,
    chat_of,
    instruction_of,
    is_said,
    messages_of,
    opened,
    unmarked,
)
from svdtune.errors import SvdtuneError

Row = Mapping[str, Any]
CHOSEN, REJECTED, LABEL = "chosen", "rejected", "label"
COLUMNS = {
    "dpo": (PROMPT, CHOSEN, REJECTED),
    "reward": (PROMPT, CHOSEN, REJECTED),
    "kto": (PROMPT, COMPLETION, LABEL),
    "grpo": (PROMPT,),
}
_ASKS = ("question", "query", "input", "problem")  # columns that ask, where no format says so
_TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
_FITS = "chosen and rejected are for dpo and reward, completion and label for kto, completion or messages alone for sft"
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # a CSV file has texts


def to_pairs(
    rows: Sequence[Row], prompt: str = PROMPT, *, task: str = "dpo", source: str = "the data"
) -> list[tuple[Example, Example]]:
    """Make of each row the prompt with its chosen answer, and with its rejected one.

    Raises:
        SvdtuneError: if a row lacks a column or holds no text there; it is named.
    """
    explicit = []
    for at, row in enumerate(rows, 1):
        name = f"{source} row {at}"
        _check_columns(row, (CHOSEN, REJECTED), task, name)
        explicit.append(_with_prompt(row, name) if prompt == PROMPT else row)
    chosen = to_examples(explicit, prompt, CHOSEN, source=source)
    return list(zip(chosen, to_examples(explicit, prompt, REJECTED, source=source), strict=True))


def to_labelled(
    rows: Sequence[Row], prompt: str = PROMPT, completion: str = COMPLETION, *, source: str = "the data"
) -> list[tuple[Example, bool]]:
    """Make of each row the prompt with its answer, and whether that is a good one.

    Raises:
        SvdtuneError: if a row lacks a column, or its label is neither true nor false; it is named.
    """
    labels, asked = [], []
    for at, row in enumerate(rows, 1):
        name = f"{source} row {at}"
        row = _with_answer(row, name) if (prompt, completion) == (PROMPT, COMPLETION) else row
        own = [column for column in (prompt, completion) if column in (PROMPT, COMPLETION)]
        _check_columns(row, (*own, LABEL), "kto", name)
        label = label_of(row[LABEL])
        if label is None:
            raise SvdtuneError(
                f"{name}: the label is {row[LABEL]!r:.40}; expected true for an answer as it should be, or false"
            )
        labels.append(label)
        if isinstance(row.get(completion), list | tuple):
            row = {**row, completion: _answer(row[completion], f"{name}: field {completion!r}")}
            if prompt == PROMPT and isinstance(row[PROMPT], str):
                row[PROMPT] = _asked(row[PROMPT], row, name)
        asked.append(row)
    return list(zip(to_examples(asked, prompt, completion, source=source), labels, strict=True))


def label_of(value: Any) -> bool | None:
    """Whether a label calls its answer good, None where it says neither."""
    if not isinstance(value, str | int | float):
        return None
    return _LABELS.get(value.strip().lower() if isinstance(value, str) else value)


def encode_pairs(
    pairs: Sequence[tuple[Example, Example]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str = PLAIN,
    *,
    overlong: str = "error",
) -> tuple[Columns, int]:
    """Encode pairs as `encode` does each answer; return rows of `prompt_ids`, `chosen_ids` and
    `rejected_ids`, and how many pairs were too long.

    Args:
        pairs: of `to_pairs`.
        tokenizer, max_length, template, overlong: as for `encode_all`; a pair is too long if either
            of its answers is.

    Raises:
        SvdtuneError: as `encode_all`; if the prompt reads differently before the two answers.
    """
    both = [_tokens([pair[at] for pair in pairs], tokenizer, max_length, template, overlong) for at in (0, 1)]
    rows, overlong_count = [], 0
    for (example, _), chosen, rejected in zip(pairs, *both, strict=True):
        size, other = _prompt_size(chosen), _prompt_size(rejected)
        if size == other == 1 and chosen["input_ids"][0] != rejected["input_ids"][0]:
            size = other = 0  # there is no prompt
        ids, others = chosen["input_ids"], rejected["input_ids"]
        if ids[:size] != others[:other]:
            raise SvdtuneError(
                f"{example.name}: the chat template writes the prompt differently before the chosen answer and before the "
                "rejected one, so that they do not answer the same; give both as one assistant's message each"
            )
        if max(len(ids), len(others)) > max_length:
            overlong_count += 1
            if overlong == "drop" or size >= max_length:
                continue
        rows.append(
            {"prompt_ids": ids[:size], "chosen_ids": ids[size:max_length], "rejected_ids": others[size:max_length]}
        )
    _check_any(rows, overlong_count, max_length)
    return Columns.of(rows), overlong_count


def encode_labelled(
    labelled: Sequence[tuple[Example, bool]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str = PLAIN,
    *,
    overlong: str = "error",
) -> tuple[Columns, int]:
    """Encode labelled answers; return rows of `prompt_ids`, `completion_ids` and `label`, and how
    many were too long. Arguments and errors as for `encode_pairs`."""
    encoded = _tokens([example for example, _ in labelled], tokenizer, max_length, template, overlong)
    rows, overlong_count = [], 0
    for (_, label), row in zip(labelled, encoded, strict=True):
        ids, size = row["input_ids"], _prompt_size(row)
        if len(ids) > max_length:
            overlong_count += 1
            if overlong == "drop" or size >= max_length:
                continue
        rows.append({"prompt_ids": ids[:size], "completion_ids": ids[size:max_length], "label": label})
    _check_any(rows, overlong_count, max_length)
    return Columns.of(rows), overlong_count


def token_counts(rows: Sequence[Row]) -> list[int]:
    """How many tokens each row has, of any task."""
    if isinstance(rows, Columns):
        counts: list[int] = rows.sizes().tolist()
        return counts
    return [sum(len(row[name]) for name in _TOKENS if name in row) for row in rows]


def _tokens(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, template: str, overlong: str
) -> Columns:
    """The rows of all examples; one that is too long is refused if it is to be, and else whole."""
    limit = max_length if overlong == "error" else sys.maxsize
    return encode_all(examples, tokenizer, limit, template=template)[0]


def _prompt_size(row: Row) -> int:
    return next((at for at, label in enumerate(row["labels"]) if label != IGNORED), 0)


def _check_any(rows: list[Any], overlong_count: int, max_length: int) -> None:
    if not rows:
        raise SvdtuneError(f"no row is left: all {overlong_count} are longer than max_length = {max_length} tokens")


def _check_columns(row: Row, columns: Sequence[str], task: str, name: str) -> None:
    if missing := [column for column in columns if column not in row]:
        raise SvdtuneError(
            f"{name} has no {' and no '.join(map(repr, missing))}: it has {', '.join(map(repr, row)) or 'nothing'}. "
            f"training.task: {task} learns from {', '.join(COLUMNS[task])}; rename the columns, or choose the task that "
            f"fits them ({_FITS})"
        )


def _with_answer(row: Row, name: str) -> Row:
    """The row with its chat in two: the last message, which is judged, and those before it."""
    column = chat_column(row)
    if column is None or is_said(row, COMPLETION):
        return row
    chat = chat_of(row, column, name)
    if chat[-1]["role"] != "assistant" or len(chat) == 1:
        raise SvdtuneError(
            f"{name}: field {column!r} ends with no answer of the assistant's that the label would judge"
        )
    return {**row, PROMPT: chat[:-1], COMPLETION: chat[-1:]}


def _with_prompt(row: Row, name: str) -> Row:
    """The row with a prompt of its own: the column, the chat before the answers, or what both
    answers begin with."""
    prompt = row[PROMPT] if is_said(row, PROMPT) else None
    if prompt is None and (column := chat_column(row)):
        prompt = chat_of(row, column, name)
    elif isinstance(prompt, list | tuple):
        prompt = opened(messages_of(prompt, f"{name}: field {PROMPT!r}"), row)
    elif prompt is None and is_said(row, "instruction"):
        prompt = instruction_of(row, name)
    chosen, rejected = (_answer(row[column], f"{name}: field {column!r}") for column in (CHOSEN, REJECTED))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise SvdtuneError(f"{name}: one of chosen and rejected is text and the other messages; give both alike")
    begin = _shared(chosen, rejected)
    turns = prompt if isinstance(prompt, list) else []
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    if begin and chosen[:1] in (unmarked(turns[:1]), unmarked(turns[len(system) :][:1])):
        prompt = None  # the answers repeat it
    if isinstance(prompt, list) or (isinstance(prompt, str) and isinstance(chosen, str)):
        return {**row, PROMPT: prompt, CHOSEN: chosen, REJECTED: rejected}
    if not begin and isinstance(prompt, str):
        return {**row, PROMPT: _asked(prompt, row, name), CHOSEN: chosen, REJECTED: rejected}
    # What two texts begin with may be their prompt, as a transcript, or their first words.
    told = isinstance(chosen, str) and "\n" not in chosen[:begin]
    if told and (columns := [column for column in _ASKS if is_said(row, column)]):
        raise SvdtuneError(
            f"{name} has no 'prompt', but {' and '.join(map(repr, columns))}; rename the column that is asked to 'prompt', "
            f"or name it with data.prompt: {columns[0]}"
        )
    if not begin and not isinstance(chosen, str):
        raise SvdtuneError(
            f"{name} has no 'prompt', and chosen and rejected share no first message that would be one; add the column"
        )
    shared = chosen[:begin]
    if not isinstance(shared, str):
        shared = opened(shared, {"system": system[0]["content"]} if system else row)
    return {**row, PROMPT: shared, CHOSEN: chosen[begin:], REJECTED: rejected[begin:]}


def _asked(text: str, row: Row, name: str) -> list[dict[str, Any]]:
    """A text as the user's message, after the row's `system` and `history`."""
    return [*before_of(row, name), {"role": "user", "content": text}]


def _answer(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, str | list | tuple):
        raise SvdtuneError(f"{name} holds {value!r:.60}; expected text or messages")
    return value if isinstance(value, str) else unmarked(messages_of(value, name))


def _shared(chosen: Any, rejected: Any) -> int:
    """How much two answers begin with in common; of texts up to a word's start, of chats without
    the last message."""
    size = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if not isinstance(chosen, str):
        return min(size, len(chosen) - 1, len(rejected) - 1)
    while size and not (chosen[size - 1].isspace() or size == min(len(chosen), len(rejected))):
        size -= 1
    return size - 1 if size and chosen[size - 1] == " " else size
