"""E2E: a sentence for a meaning representation, scored by the challenge's five metrics against all
references together."""

from collections.abc import Sequence

from svdtune.errors import SvdtuneError
from svdtune.evaluation.interval import Metric
from svdtune.evaluation.tasks.task import Reference, Task
from svdtune.lab.nlg import bleu_and_nist, e2e_metrics, require_java


def check_e2e(reference: Reference) -> None:
    """Refuse references that are no texts, and systems without the Java programs, before an hour of
    generating."""
    _texts(reference)
    require_java()


def score_e2e(completions: Sequence[str], references: Sequence[Reference]) -> dict[str, Metric]:
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr of the completions' first paragraphs."""
    return e2e_metrics([first_paragraph(text) for text in completions], [_texts(one) for one in references])


def score_without_java(completions: Sequence[str], references: Sequence[Reference]) -> dict[str, Metric]:
    """BLEU and NIST alone of the same texts."""
    return bleu_and_nist([first_paragraph(text) for text in completions], [_texts(one) for one in references])


def first_paragraph(completion: str) -> str:
    """The text up to the first empty line, on one line: what LoRA's decoding script keeps."""
    return " ".join(completion.strip().split("\n\n")[0].split())


def _texts(reference: Reference) -> list[str]:
    """Raise `SvdtuneError` for what is no reference."""
    texts = [reference] if isinstance(reference, str) else reference
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise SvdtuneError(
            f"task 'e2e' needs a sentence or a list of sentences to compare with, got {reference!r:.80}; "
            "name the field that holds them with --answer"
        )
    return texts


E2E = Task("e2e", strict=None, metrics=score_e2e, check=check_e2e)
E2E_BLEU = Task("e2e_bleu", strict=None, metrics=score_without_java, check=_texts)
