"""Multiple choice: a letter (AQuA), or a named choice such as answer3 or true (the commonsense
sets).

paper   the first capital A to E anywhere, so that "A train ..." answers A; the first choice named
        anywhere
strict  the letter or choice that the text marks as its answer; without a mark, the only one it
        names
"""

import re

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.answers import boxed, stated
from svdtune.evaluation.tasks.task import Grade, Reference, Task

_LETTER = re.compile(r"[A-E]")
# "(D)", "D)", "D.", "D:" or "D" alone: a letter that stands for a choice, and not the article "A".
_STANDING = re.compile(r"\(([A-E])\)|(?<![\w'])([A-E])(?=[).:,]|\s*$)")
_OPENING = re.compile(r"(?:option|choice)?\s*\(?([A-E])(?![\w'])", re.IGNORECASE)

# What LLM-Adapters looks for in each data set, by the kind of its answers.
_FAMILIES = {
    "true": ("true", "false"),
    "solution": ("solution1", "solution2"),
    "answer": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ending": ("ending1", "ending2", "ending3", "ending4"),
    "option": ("option1", "option2"),
}


def letter_paper(completion: str, reference: Reference) -> Grade:
    """Grade as `evaluate.py` of LLM-Adapters."""
    found = _LETTER.search(completion)
    return Grade(found and found[0], found is not None and found[0] == str(reference).strip())


def letter_strict(completion: str, reference: Reference) -> Grade:
    """Compare the letter that the text gives as its answer."""
    answer = answer_letter(completion)
    return Grade(answer, answer is not None and answer == str(reference).strip())


def answer_letter(text: str) -> str | None:
    """The letter A to E that a text gives as its answer, None where it gives none or more than
    one."""
    for marked in (boxed(text), stated(text)):
        if marked is not None:
            opening = _OPENING.match(marked.lstrip("$*\\{ "))
            # "The answer is a number": a small letter is meant as a choice only where nothing
            # follows it.
            if opening and (opening[1].isupper() or opening.end() == len(marked)):
                return None if _others(marked, opening[1].upper()) else opening[1].upper()
            letters = _standing(marked)
            return letters.pop() if len(letters) == 1 else None
    if alone := re.fullmatch(r"\s*\(?([A-Ea-e])\)?[.:]?\s*", text):
        return alone[1].upper()
    letters = _standing(text)
    return letters.pop() if len(letters) == 1 else None


def _standing(text: str) -> set[str]:
    return {found[1] or found[2] for found in _STANDING.finditer(text)}


def _others(marked: str, letter: str) -> bool:
    """Whether another letter is joined to the first: "A or B"."""
    return re.search(rf"\b{letter}\)?\s*(?:,|/|and|or|&)\s*\(?[A-E]\b", marked) is not None


def check_letter(reference: Reference) -> None:
    """Refuse a reference that is no letter."""
    if not re.fullmatch(r"\s*[A-E]\s*", str(reference)):
        raise SvdtuneError(
            f"task 'letter' needs a letter from A to E as every reference, but found {str(reference)[:80]!r}"
        )


def choice_paper(completion: str, reference: Reference) -> Grade:
    """Grade as `commonsense_evaluate.py` of LLM-Adapters: the first choice named, in any sense."""
    found = re.search("|".join(_family(reference)), completion)
    return Grade(found and found[0], found is not None and found[0] == str(reference).strip())


def choice_strict(completion: str, reference: Reference) -> Grade:
    """Compare the choice that the text gives as its answer."""
    named = re.compile(rf"\b(?:{'|'.join(_family(reference))})\b", re.IGNORECASE)
    marked = stated(completion)
    choices = {choice.lower() for choice in named.findall(completion if marked is None else marked)}
    answer = choices.pop() if len(choices) == 1 else None
    return Grade(answer, answer is not None and answer == str(reference).strip())


def check_choice(reference: Reference) -> None:
    """Refuse a reference that is no choice of a known kind."""
    if str(reference).strip() not in {choice for family in _FAMILIES.values() for choice in family}:
        raise SvdtuneError(
            f"task 'choice' needs one of {', '.join(f[0] for f in _FAMILIES.values())} and their like as every reference, "
            f"but found {str(reference)[:80]!r}"
        )


def _family(reference: Reference) -> tuple[str, ...]:
    return next(family for family in _FAMILIES.values() if str(reference).strip() in family)


LETTER = Task(
    "letter", "the letter given as the answer equals the reference", letter_strict, letter_paper, check=check_letter
)
CHOICE = Task(
    "choice", "the choice given as the answer equals the reference", choice_strict, choice_paper, check=check_choice
)
