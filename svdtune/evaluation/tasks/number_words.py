"""Numbers in words: twenty-five, three hundred and five, two dozen."""

import re

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


def number_in_words(text: str) -> int | None:
    """The number that a sentence opens with, None where it opens with none, or with one that what
    follows makes another: "two and a half", "one of them", "two or three"."""
    text = re.sub(r"^\W*(?:about|around|approximately|roughly|nearly|almost|exactly|only|just)\s+", "", text.lower())
    text, minus = re.subn(r"^\W*(?:minus|negative)\s+", "", text)
    sign = -1 if minus else 1
    # "a million", "half a million"
    text = re.sub(rf"\b(half\s+)?an?\s+(?={'|'.join(MAGNITUDES)})", r"\1one ", text)
    words = re.findall(r"[a-z]+", text)
    halved = words[:2] == ["half", "one"]
    words = words[halved:]
    total, part, read = 0, 0, 0
    for word in words:
        if word in _VALUES:
            part += _VALUES[word]
        elif word in MAGNITUDES and (part or word != "dozen") and read:
            part *= MAGNITUDES[word]
            total, part = (total + part, 0) if MAGNITUDES[word] >= 1000 else (total, part)
        elif not (word == "and" and read):
            break
        read += 1
    rest = words[read:]
    if (
        not read
        or words[read - 1] == "and"
        or any(word in _VALUES for word in rest)
        or rest[:1] in (["half"], ["of"], ["or"], ["more"], ["less"])
    ):
        return None
    return sign * (total + part) // (1 + halved)
