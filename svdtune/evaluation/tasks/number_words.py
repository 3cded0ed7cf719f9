"""Numbers in words: twenty-five, three hundred and five, two dozen, two and a half."""

import re
from fractions import Fraction
from math import gcd

MAGNITUDES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: n for n, word in enumerate(_WORDS)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}


def number_in_words(text: str) -> Fraction | None:
    """The number that a sentence opens with, None where it opens with none, or with one that what
    follows makes another: "one of them", "two or three"."""
    text = re.sub(r"^\W*(?:about|around|approximately|roughly|nearly|almost|exactly|only|just)\s+", "", text.lower())
    text, minus = re.subn(r"^\W*(?:minus|negative)\s+", "", text)
    # "a million", "half a million"
    text = re.sub(rf"\b(half\s+)?an?\s+(?={'|'.join(MAGNITUDES)})", r"\1one ", text)
    words = re.findall(r"[a-z]+", text)
    halved = words[:2] == ["half", "one"]
    part, rest = _part(words)
    value = part
    if part is None:
        whole, rest = _whole(words[halved:])
        value = None if whole is None else Fraction(whole, 1 + halved)
    if part is None and value is not None and rest[:1] == ["and"]:  # "two and a half", "two and three quarters"
        part, rest = _part(["one", *rest[2:]] if rest[1:2] == ["a"] else rest[1:])
        value = None if part is None else value + part
    if (
        value is None
        or any(word in _VALUES for word in rest)
        or rest[:1] in (["half"], ["of"], ["or"], ["more"], ["less"])
    ):
        return None
    return -value if minus else value


def _whole(words: list[str]) -> tuple[int | None, list[str]]:
    """The whole number that words open with, and the words after it."""
    total, part, read = 0, 0, 0
    for at, word in enumerate(words):
        if word in _VALUES:
            part += _VALUES[word]
        elif word in MAGNITUDES and (part or word != "dozen") and at:
            part *= MAGNITUDES[word]
            total, part = (total + part, 0) if MAGNITUDES[word] >= 1000 else (total, part)
        elif word != "and" or not at or words[at - 1] not in MAGNITUDES:
            break
        read = at + 1 if word != "and" else read
    return total + part if read else None, words[read:]


def _part(words: list[str]) -> tuple[Fraction | None, list[str]]:
    """The "three quarters" or "one half" that words open with, and the words after it. "twenty
    fifth" is none, nor are "two quarters", which are coins."""
    times, rest = _whole(words)
    name = rest[0] if rest else ""
    parts = _PARTS.get(name if times == 1 else name.removesuffix("s") if name.endswith("s") else "", 0)
    if times is None or not 0 < times < parts or gcd(times, parts) != 1:
        return None, words
    return Fraction(times, parts), rest[1:]
