"""E2E: meanings and sentences in the form that LoRA's GPT-2 experiments train on, and several
references a meaning.

    name[Blue Spice], eatType[coffee shop], area[city centre]
    →  name : Blue Spice | Type : coffee shop | area : city centre
    Blue Spice isn't in the city.                              →  Blue Spice is n't in the city .

The published text files have a line for each pair, `context||completion`; the original CSV files
(`mr`, `ref`) are converted. Of the 9,365 rows of the published test and validation files, the
conversion gives every context and over 99 % of the completions exactly; the rest differ in how a
hyphen or an odd contraction is split.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from svdtune.errors import SvdtuneError

_SLOTS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SLOT = re.compile(r"(?:^|, )([^\[\]]+?)\[(.*?)\]")
_SPACED = (
    (r'([,!?;:()"£%*]|--)', r" \1 "),
    (r"(?<=[^\W\d])-(?=[^\W\d])|(?<=\d)-(?=\d)", " - "),
    (r"(\d) , (\d{3})", r"\1,\2"),
    (r"(\.+)(?=\s|$)", r" \1 "),
    (r"(?i)(\w)(n['’]t)\b", r"\1 \2"),
    (r"(?i)(\w)(['’](?:s|ll|re|ve|m|d))\b", r"\1 \2"),
    (r"'(?=\s|$)", " ' "),
    (r"(?<=\s)'(?=\w)(?!(?:s|ll|re|ve|m|d)\b)", "' "),
)


def linearise(meaning: str) -> str:
    """The context that LoRA's files have for a meaning representation of the original ones."""
    return " | ".join(f"{_SLOTS.get(slot, slot)} : {separate(value)}" for slot, value in _SLOT.findall(meaning))


def separate(sentence: str) -> str:
    """Put spaces around punctuation and before contractions, as LoRA's files have them."""
    for pattern, replacement in _SPACED:
        sentence = re.sub(pattern, replacement, sentence)
    return " ".join(sentence.split())


def to_pairs(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows with context and completion, from either form.

    Raises:
        SvdtuneError: if a line of the text form does not have its two parts.
    """
    return [_pair(row, at) for at, row in enumerate(rows, 1)]


def _pair(row: Mapping[str, Any], at: int) -> dict[str, str]:
    if "mr" in row:
        return {"context": linearise(row["mr"]), "completion": separate(row["ref"])}
    context, *completions = row["text"].split("||")
    if len(completions) != 1:
        raise SvdtuneError(f"e2e row {at} is {row['text']!r:.60}; expected a meaning, || and one sentence")
    return {"context": context.strip(), "completion": completions[0].strip()}


def group(pairs: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """One row a meaning, in the order of first occurrence: context, completion (the first
    reference), references (all)."""
    grouped: dict[str, list[str]] = {}
    for pair in pairs:
        grouped.setdefault(pair["context"], []).append(pair["completion"])
    return [{"context": c, "completion": found[0], "references": found} for c, found in grouped.items()]
