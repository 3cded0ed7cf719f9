"""Plain exact match: the whole completion must equal the whole reference, but for white space at
its ends."""

from svdtune.evaluation.tasks.task import Grade, Reference, Task


def grade_exact(completion: str, reference: Reference) -> Grade:
    """Compare both texts, stripped of white space at the ends; case and punctuation count."""
    answer = completion.strip()
    return Grade(extracted=answer, correct=answer == str(reference).strip())


EXACT = Task("exact", grade_exact)
