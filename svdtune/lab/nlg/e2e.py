"""The five metrics of the E2E challenge, as its official scripts compute them, each with a
bootstrap interval.

BLEU and NIST count the texts as they are; METEOR, ROUGE-L and CIDEr those that Stanford's tokenizer
makes of them.
"""

from collections.abc import Sequence

from svdtune.errors import SvdtuneError
from svdtune.evaluation.interval import Metric, bootstrap, bootstrap_mean
from svdtune.lab.nlg.java import meteor, meteor_counts, tokenize_ptb
from svdtune.lab.nlg.ngrams import bleu, bleu_counts, nist, nist_counts, tokenize_13a


def e2e_metrics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Score texts against several references each.

    Returns:
        BLEU, NIST, METEOR, ROUGE-L and CIDEr. The intervals are bootstrap intervals: they say how
        much the draw of the meanings matters. NIST's and CIDEr's word statistics stay those of all
        references given.

    Raises:
        SvdtuneError: If the lists do not match, a meaning has no reference, or Java or
            pycocoevalcap is missing.
    """
    found = bleu_and_nist(outputs, references)
    plain = tokenize_ptb([*outputs, *(reference for refs in references for reference in refs)])
    texts, remaining = plain[: len(outputs)], iter(plain[len(outputs) :])
    reference_texts = [[next(remaining) for _ in refs] for refs in references]
    rouge_l, cider = _coco(texts, reference_texts)
    return {
        **found,
        "METEOR": bootstrap(meteor_counts(texts, reference_texts), meteor),
        "ROUGE-L": bootstrap_mean(rouge_l),
        "CIDEr": bootstrap_mean(cider),
    }


def bleu_and_nist(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """The two of the five metrics that need no Java; arguments, intervals and errors as of
    `e2e_metrics`."""
    if not outputs or len(outputs) != len(references) or not all(references):
        raise SvdtuneError(
            f"got {len(outputs)} outputs and {len(references)} lists of references; expected as many of the one as of "
            "the other, at least one, and at least one reference in each list"
        )
    words = [tokenize_13a(output) for output in outputs]
    reference_words = [[tokenize_13a(reference) for reference in refs] for refs in references]
    return {
        "BLEU": bootstrap(bleu_counts(words, reference_words), bleu),
        "NIST": bootstrap(nist_counts(words, reference_words), nist),
    }


def _coco(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[float], list[float]]:
    """ROUGE-L and CIDEr of each text."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.rouge.rouge import Rouge

    rouge, cider = Rouge(), CiderScorer()
    for output, refs in zip(outputs, references, strict=True):
        cider += (output, list(refs))
    rouge_l = [rouge.calc_score([output], list(refs)) for output, refs in zip(outputs, references, strict=True)]
    return rouge_l, list(cider.compute_score()[1])
