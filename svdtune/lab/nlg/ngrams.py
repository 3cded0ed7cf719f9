"""BLEU and NIST as mteval-13a computes them, from counts of each segment that add up to those of
any sample of segments.

Lower-cased, n-gram counts clipped by the reference that has the most of each, any number of
references a segment: what e2e-metrics reports with `-p`, the option that the GPT-2 experiments of
LoRA and SARA use.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

Tokens = tuple[str, ...]

BLEU_ORDER, NIST_ORDER = 4, 5
# exp(-beta·ln²(ratio)) is ½ where the output is two thirds as long as the references.
_NIST_BETA = math.log(0.5) / math.log(1.5) ** 2
_NO_MATCH = 1e-15  # keeps BLEU defined where no n-gram of an order matches
_NO_LENGTH = 1e-9

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_PUNCTUATION = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokenize_13a(text: str) -> Tokens:
    """Split a text into lower-cased tokens by the rules of mteval-v13a for Western languages.

    Periods and commas stay within numbers, and a hyphen is split off behind a digit only.
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _PUNCTUATION:
        text = pattern.sub(replacement, text)
    # mteval takes an empty text for one empty token
    return tuple(text.lower().split()) or ("",)


def _ngrams(tokens: Tokens, n: int) -> list[Tokens]:
    return [tokens[i : i + n] for i in range(len(tokens) - n + 1)]


def _matches(output: Tokens, references: Sequence[Tokens], n: int) -> Counter[Tokens]:
    """The n-grams of `output`, each counted as often as the reference that has it most often
    allows."""
    allowed: Counter[Tokens] = Counter()
    for reference in references:
        allowed |= Counter(_ngrams(reference, n))
    return Counter(_ngrams(output, n)) & allowed


def bleu_counts(outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """What BLEU adds up, one row a segment.

    Returns:
        Shape (segments, 9): matches of orders 1 to 4, n-grams of orders 1 to 4, length of the
            reference that is closest
        in length, the shorter of two.
    """
    rows = []
    for output, refs in zip(outputs, references, strict=True):
        matches = [_matches(output, refs, n).total() for n in range(1, BLEU_ORDER + 1)]
        closest = min(map(len, refs), key=lambda length: (abs(length - len(output)), length))
        rows.append([*matches, *(len(output) - n for n in range(BLEU_ORDER)), closest])
    return np.array(rows, dtype=float)


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU of summed counts.

    Args:
        counts: Shape (..., 9), sums of rows of `bleu_counts`.

    Returns:
        Shape (...), in [0, 1].

    Source: Papineni et al., "BLEU: a method for automatic evaluation of machine translation"
    (2002).
    """
    matches, lengths, reference = counts[..., :4], counts[..., 4:8], counts[..., 8]
    precision = np.maximum(matches, _NO_MATCH) / np.maximum(lengths, _NO_LENGTH)
    brevity = np.minimum(0.0, 1 - reference / np.maximum(lengths[..., 0], 1e-5))
    return np.exp(brevity + np.log(precision).mean(axis=-1))


def nist_counts(outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """What NIST adds up, one row a segment; an n-gram's information is taken from all references
    given.

    Returns:
        Shape (segments, 11): information of the matches of orders 1 to 5, n-grams of orders 1 to 5,
            mean length of the
        references.
    """
    information = _information(reference for refs in references for reference in refs)
    rows = []
    for output, refs in zip(outputs, references, strict=True):
        gained = [
            sum(information[ngram] * count for ngram, count in _matches(output, refs, n).items())
            for n in range(1, NIST_ORDER + 1)
        ]
        mean = sum(map(len, refs)) / len(refs)
        rows.append([*gained, *(len(output) - n for n in range(NIST_ORDER)), mean])
    return np.array(rows, dtype=float)


def _information(references: Iterable[Tokens]) -> dict[Tokens, float]:
    """log₂(how often the first n−1 words occur / how often all n do), for each n-gram of the
    references."""
    counts: Counter[Tokens] = Counter()
    for reference in references:
        counts[()] += len(reference)
        for n in range(1, NIST_ORDER + 1):
            counts.update(_ngrams(reference, n))
    return {ngram: math.log2(counts[ngram[:-1]] / count) for ngram, count in counts.items() if ngram}


def nist(counts: np.ndarray) -> np.ndarray:
    """NIST of summed counts.

    Args:
        counts: Shape (..., 11), sums of rows of `nist_counts`.

    Returns:
        Shape (...), at least 0.

    Source: Doddington, "Automatic evaluation of machine translation quality using n-gram
    co-occurrence statistics" (2002), with the length penalty of mteval-13a.
    """
    gained, lengths, reference = counts[..., :5], counts[..., 5:10], counts[..., 10]
    ratio = np.clip(lengths[..., 0] / reference, 1e-300, 1.0)
    return np.exp(_NIST_BETA * np.log(ratio) ** 2) * (gained / np.maximum(lengths, _NO_LENGTH)).sum(axis=-1)
