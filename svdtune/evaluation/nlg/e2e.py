"""The five metrics of the E2E challenge, as its official scripts compute them, each with a bootstrap interval.

BLEU and NIST count the texts as they are; METEOR, ROUGE-L and CIDEr those that Stanford's tokenizer makes of them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from svdtune.errors import SvdtuneError
from svdtune.evaluation.interval import Interval, Metric
from svdtune.evaluation.nlg.java import meteor, meteor_counts, tokenize_ptb
from svdtune.evaluation.nlg.ngrams import bleu, bleu_counts, nist, nist_counts, tokenize_13a

RESAMPLES = 1000


def e2e_metrics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Score texts against several references each.

    Args:
        outputs: One text a meaning.
        references: One or more texts for each of them.

    Returns:
        BLEU, NIST, METEOR, ROUGE-L and CIDEr. The intervals are bootstrap intervals: they say how much the draw of the
        meanings matters. NIST's and CIDEr's word statistics stay those of all references given.

    Raises:
        SvdtuneError: If the lists do not match, a meaning has no reference, or Java or pycocoevalcap is missing.
    """
    if not outputs or len(outputs) != len(references) or not all(references):
        raise SvdtuneError(
            f"got {len(outputs)} outputs and {len(references)} lists of references; expected as many of the one as of "
            "the other, at least one, and at least one reference in each list"
        )
    words = [tokenize_13a(output) for output in outputs]
    reference_words = [[tokenize_13a(reference) for reference in refs] for refs in references]
    plain = tokenize_ptb([*outputs, *(reference for refs in references for reference in refs)])
    texts, remaining = plain[: len(outputs)], iter(plain[len(outputs) :])
    reference_texts = [[next(remaining) for _ in refs] for refs in references]
    rouge_l, cider = _coco(texts, reference_texts)
    return {
        "BLEU": bootstrap(bleu_counts(words, reference_words), bleu),
        "NIST": bootstrap(nist_counts(words, reference_words), nist),
        "METEOR": bootstrap(meteor_counts(texts, reference_texts), meteor),
        "ROUGE-L": bootstrap(rouge_l, _mean),
        "CIDEr": bootstrap(cider, _mean),
    }


def bootstrap(counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> Metric:
    """A score of all segments, and its percentile interval over samples of them drawn with replacement.

    Args:
        counts: Shape (segments, …), rows that may be summed.
        score: Takes sums of rows, shape (..., …), to scores, shape (...).
    """
    segments = len(counts)
    drawn = np.random.default_rng(0).multinomial(segments, np.full(segments, 1 / segments), size=RESAMPLES)
    low, high = np.percentile(score(drawn @ counts), [2.5, 97.5])
    return Metric(float(score(counts.sum(axis=0))), Interval(float(low), float(high)))


def _mean(counts: np.ndarray) -> np.ndarray:
    return counts[..., 0] / counts[..., 1]


def _coco(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """ROUGE-L and CIDEr of each segment beside a 1, so that rows add up to a sum and a number: shapes (segments, 2)."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.rouge.rouge import Rouge

    rouge, cider = Rouge(), CiderScorer()
    for output, refs in zip(outputs, references, strict=True):
        cider += (output, list(refs))
    ones = np.ones(len(outputs))
    lcs = [rouge.calc_score([output], list(refs)) for output, refs in zip(outputs, references, strict=True)]
    return np.stack([lcs, ones], axis=1), np.stack([cider.compute_score()[1], ones], axis=1)
