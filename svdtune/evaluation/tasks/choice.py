"""Multiple choice: a letter (AQuA), or a named choice such as answer3 or true (the commonsense
sets).

paper   the first capital A to E anywhere, so that "A train ..." answers A; the first choice named
        anywhere
strict  the letter or choice that the text marks as its answer; without a mark, the one that it
        calls right, concludes with or gives reasons for, else the only one it names
"""

import re
from collections.abc import Callable

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.answers import marked_answers, plain_words, without_denied
from svdtune.evaluation.tasks.task import Grade, Reference, Task

_LETTER = re.compile(r"[A-E]")
# "(D)", "D)", "D.", "D:" or "D" alone: a letter that stands for a choice, and not the article "A".
_STANDING = re.compile(
    r"\(([A-E])\)|(?<![\w'])([A-E])(?=[).:,;]|\s*$|\s+(?:and|or|because|since)\b|\s+is[.!]?\s*$)"
    r"|(?<=\band )([A-E])(?![\w'])|(?<=\bor )([A-E])(?![\w'])"
)
_OPENING = re.compile(r"(?:option|choice|letter|answer)?\s*\(?([A-E])(?![\w'])", re.IGNORECASE)
_LATEX = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|mbox|operatorname)\s*\{\s*([^{}]*?)\s*\}|\\[()\[\]]|[$*`\"{}]"
)
_QUOTED = re.compile(r"[\[\"“‘'`]\(?([A-E]|(?i:answer|solution|ending|option)\s?\d|[Tt]rue|[Ff]alse)\)?[\]\"”’'`]")
_LINKS = re.compile(r"(?:[\s,;:]|but\b|rather\b|instead\b|it\s+is\b|it's\b)+", re.IGNORECASE)
_WRONG = (
    r"\s+(?:(?:is|are|was|were|seems?|must\s+be)\s+(?:all\s+|both\s+)?"
    r"(?:not|wrong|incorrect|impossible|excluded|eliminated|ruled\s+out|too|worse)"
    r"|(?:does|do|did|can|could|would|will)\s+not)\b"
)
_RIGHT = (
    r"\s+(?:(?:is|must\s+be|seems)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|true|best|better|left)\b"
    r"|it\s+is\b|(?:remains|fits|works|does)\b(?!\s+not))"
)
_CHOSEN = (
    r"(?:(?:correct|right|best)\s+(?:option|choice|solution|ending|one|letter)\s+(?:is|would\s+be|must\s+be)"
    r"|\b(?:choose|pick|select|prefer|say|choice\s+is|option\s+is|go(?:ing)?\s+with)"
    r"|\b(?:therefore|thus|hence|so)(?:\s+it\s+is|\s+it's)?)"
    r"\s*[:,]?\s*(?:the\s+)?(?:option\s+|choice\s+|answer\s+)?"
)
_REASON = r"\s*(?:over\b|,|;|\.|:|-|–|—|because\b|since\b|as\b|for\b|\bwould\b|$)"

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
    text = plain_words(text)
    for marked in marked_answers(text):
        clause = _links_left(without_denied(_without_latex(marked), r"\(?[A-E]\)?(?![\w'])"))
        clause = clause[:1] + _without_wrong(clause[1:], r"(?-i:(?<![\w'])[A-E](?![\w']))")
        opening = _OPENING.match(clause)
        # "The answer is a number": a small letter is meant as a choice only where nothing follows
        if opening and (opening[1].isupper() or opening.end() == len(clause.rstrip(" ).:"))):
            return None if _others(clause, opening[1].upper()) else opening[1].upper()
        if letters := _standing(clause):
            return letters.pop() if len(letters) == 1 else None
    text = _without_latex(text)
    if alone := re.fullmatch(r"\s*(?:option|choice)?\s*\(?([A-Ea-e])\)?[.:!]?\s*", text, re.IGNORECASE):
        return alone[1].upper()
    return _chosen(text, r"(?-i:[A-E])", _standing)


def _without_latex(text: str) -> str:
    text = _QUOTED.sub(lambda found: f"({found[1]})" if len(found[1]) == 1 else found[1], text)
    return _LATEX.sub(lambda found: found[1] or "", text).strip()


def _links_left(clause: str) -> str:
    """A clause without the words that link it to what was denied before: "not A but C"."""
    found = _LINKS.match(clause)
    return clause[found.end() :] if found else clause


def _chosen(text: str, item: str, named: Callable[[str], set[str]]) -> str | None:
    """The item that a text without a mark chooses: the one that it calls right, that it concludes
    with, that it opens with and gives reasons for, or the only one that it names and does not call
    wrong."""
    bracketed = rf"\(?(?<![\w'])({item})(?![\w'])\)?"
    loose = rf"\(?(?<![\w'])(?:{item})(?![\w'])\)?"
    stated = re.sub(r"(?<![^.!?\n])[^.!?\n]*\?", " ", text)  # "true or false? false"
    kept = _without_wrong(without_denied(stated if named(stated) else text, loose), loose)
    for pattern in (rf"{bracketed}{_RIGHT}", rf"{_CHOSEN}{bracketed}(?={_REASON})(?!\s*(?:and|or)\b)"):
        if found := re.findall(pattern, kept, re.IGNORECASE):
            return str(found[-1])
    if opening := re.match(
        rf"\s*{bracketed}(?=\s*[.):,;]?\s*(?:(?:because|since|as|for)\b|[-–—]\s(?!\(?(?-i:[A-E])\b)))",
        kept,
        re.IGNORECASE,
    ):
        return opening[1]
    left = named(kept)
    return left.pop() if len(left) == 1 else None


def _without_wrong(text: str, item: str) -> str:
    """A text without the items that it calls wrong, and that it says so."""
    joined = rf"(?:options?\s+|choices?\s+)?{item}(?:\s*(?:,|and|or)\s*{item})*"
    return re.sub(joined + _WRONG, " ", text, flags=re.IGNORECASE)


def _standing(text: str) -> set[str]:
    return {next(filter(None, found.groups())) for found in _STANDING.finditer(text)}


def _others(marked: str, letter: str) -> bool:
    """Whether another letter is joined to the first: "A or B"."""
    return (
        re.search(rf"\b{letter}\)?\s*(?:,|/|and|or|&)\s*(?:maybe|perhaps|possibly)?\s*\(?[A-E]\b", marked) is not None
    )


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
    answer = _answer_choice(completion, _family(reference))
    return Grade(answer, answer is not None and answer == str(reference).strip())


def _answer_choice(text: str, family: tuple[str, ...]) -> str | None:
    choice = "|".join(re.sub(r"(?<=[a-z])(?=\d)", r"\\s?", name) for name in family)
    pattern = re.compile(rf"(?<![\w'])(?:{choice})(?![\w'])", re.IGNORECASE)

    def named(part: str) -> set[str]:
        return {found.lower().replace(" ", "") for found in pattern.findall(part)}

    text = plain_words(text)
    for marked in marked_answers(text):
        clause = _links_left(without_denied(_without_latex(marked), rf"(?:{choice})\b"))
        if opening := re.match(
            rf"(?:(?:the|option|choice)\s+)*({choice})(?![\w'])(?!\s*(?:,|/|and|or|&)\s*(?:{choice})\b)",
            clause,
            re.IGNORECASE,
        ):
            return opening[1].lower().replace(" ", "")
        if choices := named(clause):
            return choices.pop() if len(choices) == 1 else None
    found = _chosen(_without_latex(text), choice, named)
    return None if found is None else found.lower().replace(" ", "")


def check_choice(reference: Reference) -> None:
    """Refuse a reference that is no choice of a known kind."""
    if str(reference).strip() not in {choice for family in _FAMILIES.values() for choice in family}:
        raise SvdtuneError(
            f"task 'choice' needs one of {', '.join(f[0] for f in _FAMILIES.values())} and their like as every reference, "
            f"but found {str(reference)[:80]!r}"
        )


def _family(reference: Reference) -> tuple[str, ...]:
    return next(family for family in _FAMILIES.values() if str(reference).strip() in family)


LETTER = Task("letter", letter_strict, letter_paper, check=check_letter)
CHOICE = Task("choice", choice_strict, choice_paper, check=check_choice)
