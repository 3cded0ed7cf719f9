"""Where a text marks its final answer, for every task that grades strictly.

The marks are a box, the line after "####", what stands between <answer> and </answer>, the
sentence after "the answer is" or "answer:", and what stands before "is the answer". The last mark
of a text counts, so that an answer taken back is none. What a sentence denies ("not 5 but 6") is
no answer. Boxes side by side are one answer where "and" or "or" joins them; where a comma alone
does, the grader says whether they are a list, or the last of them counts.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_HASHES = re.compile(r"####\s*")
_TAG = re.compile(r"<answer>\s*", re.IGNORECASE)
_ABOUT = r"(?:\s+(?:choice|option|here))?(?:\s+(?:to|of|for)\s[^.:=\n]{1,80}?)?"
_IS = r"(?:\b(?:is|are|was|equals|would\s+be|will\s+be|must\s+be|should\s+be|comes\s+to)(?![\w'])|[:=])"
_STATED = re.compile(
    rf"\banswers?{_ABOUT}\s*{_IS}(?:\s+(?:then|therefore|thus|simply|just))?\s*[:=]?\s*", re.IGNORECASE
)
_IS_THE_ANSWER = re.compile(
    r"(?P<answer>\\boxed\{[^{}]*\}|\$[^$\n]+\$|(?<![\w'])\(?[A-E]\)?"
    r"|(?<![\w'])(?:answer|solution|ending|option)\s?\d|\b(?:true|false)"
    r"|(?<![\w.,])[-−]?[$£€]?\d[\w.,/:^%]*(?:\s[a-z]+){0,2}?)"
    r"\s+is\s+(?:indeed\s+)?(?:the|my|our)\s+(?:final\s+|correct\s+|right\s+)*answer\b(?!\s+(?:to|choice))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|(?<![.\\])[.!?](?=\s|$)")
_PAUSE = re.compile(r"\n|[.!?](?=\s|$)|[,;:](?=\s)|\s[(–—-]|[–—…](?=\s)")
_FORMULA = re.compile(r"(?<!\\)\$(?:[^$\n]|\n(?!\n))+?(?<!\\)\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
_CHECKED = re.compile(
    r"\b(?:check|verify|confirm)\w*\s+(?:\w+\s+){0,2}$", re.IGNORECASE
)  # "We check our answer: 2 + 3 = 5"
_NO_CLAIM = re.compile(r"(?:not|never|neither|no\s+longer|hardly)\b", re.IGNORECASE)
_WRONG_ONE = re.compile(r"\b(?:wrong|incorrect|false|tempting)\s+$", re.IGNORECASE)
_EARLIER = re.compile(r"\b(?:first|initial|original|previous|earlier)\s+$", re.IGNORECASE)
_PAST = re.compile(r"\b(?:was|were)\b", re.IGNORECASE)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,[\s$]*)?(?:(?:\\text\s*\{\s*)?(and|or))?[\s$}]*")  # "\\boxed{3} and \\boxed{5}"
_NAME = re.compile(r"^[A-Za-z]\s*=\s*")
_MOST_BOXES = 20  # of one answer; a model that never ends writes thousands
# An answer, of one task or another; "A train" is none.
_ONE = (
    r"(?:(?:the|option|choice|about|exactly)\s+)*[(\"'*]*"
    r"(?:[-−]?[$£€]?[-−]?\.?\d|[\\$]|[a-z]\s*=|(?:answer|solution|ending|option)\s?\d"
    r"|(?:true|false)\b|(?-i:[A-E])(?=[).,;:!?\"'*]|\s*$|\s*\n|\s+(?:is|fits|works|because|since|as|instead|not)\b))"
)
_WRONG = r"(?:is|are|was|were|does|do|did|can|could|would|will|has|have)\s+(?:not|wrong|incorrect|impossible|too)\b"
# "Wait, 3 of them are bad" is a remark: a new answer has a unit, a reason or nothing behind it.
_REMARK = (
    r"[,.:;!–—-]*\s+[-−]?[$£€]?[-−]?\.?\d(?:[\w.,/:^%]*[\w%])?[ \t]+(?=[a-z])"
    r"(?!(?:because|since|as|is\s+(?:it|(?:the\s+)?(?:right|correct|answer)))\b"
    r"|(?:(?:and|or)\s+(?:a\s+)?\S+?|(?:(?:square|cubic)\s+)?[a-z]+(?:\s+per\s+[a-z]+)?)[ \t]*(?:[^\w\s']|\n|$))"
)
# "No, 15", "Sorry, I meant B", "That is wrong: it is true", in a sentence too (", no wait, 15"); a
# remark ("No, A is wrong", "Sorry, that took 3 steps", "Actually, 3 are left") takes nothing back.
# What is read is never read again another way (`(?>`, `++`): models go on with "wait wait wait".
_TAKEN_BACK = re.compile(
    r"(?:[.!?,;:…–—]|\s[(–—-])?(?>\s*(?<![\w'])(?:but\s+|oh,?\s+|hmm,?\s+|actually,?\s+)*"
    rf"(?:(?:no\b(?=[,.:]|\s+wait\b)|wait|hold\s+on|oops|sorry)(?!{_REMARK})|scratch\s+that|correction|or\s+rather"
    r"|but(?=\s+the\s+(?:right|correct)\s+one\s+(?:is|was)\b)"
    r"|let\s+me\s+(?:correct|fix)\s+(?:that|this|it|myself)|I\s+meant?(?=\s)"
    r"|actually,?(?=\s+(?:(?:it|that)(?:\s+is|'s)\s+\S+(?:\s+\w+)?|\S+)\s*(?:[.!](?:\s|$)|\n|$))"
    r"|I\s+(?:made\s+an?|was\s+wrong|mis[a-z]+)[a-z\s]*(?=[.:;,!])"
    r"|(?:that|this|it)(?:\s+(?:is|was)|'s)\s+(?:wrong|incorrect|not\s+(?:right|correct))(?=\s*[.:;,!–—-]))"
    r"[,.:;!–—-]*)++"
    r"\s+(?:but\s+|actually,?\s+|rather\s+|make\s+(?:it|that)\s+|I\s+meant?\s+|we\s+(?:get|have)\s+"
    r"|(?:(?:it|this|that|the\s+(?:total|result|sum|right\s+one|correct\s+one))\s*)?"
    rf"(?:\b(?:is|was|should\s+be|must\s+be|has\s+to\s+be)|'s)\s+)*"
    rf"(?=(?:not\s+{_ONE}(?>[^\n]*?(?:[,;.]\s|\bbut\b))[^\n]*)?{_ONE})"
    rf"(?![^\s,.;:]*(?:\s+[a-z]+){{0,4}}?\s+{_WRONG})",
    re.IGNORECASE,
)


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, or the token after a \boxed without braces;
    None without any, and where the text ends inside it."""
    found = list(_BOX.finditer(text))
    return _box(text, found[-1].end(), _closings(text))[0] if found else None


class Boxes(NamedTuple):
    r"""Boxes side by side.

    Attributes:
        start: Where the last of them starts.
        whole: What all of them hold: "3\text{ and }5" for \boxed{3} and \boxed{5}.
        alone: What counts where one answer is expected: all where "and" or "or" joins them, else
            the last.
    """

    start: int
    whole: str | None
    alone: str | None


def joined_boxes(text: str) -> list[Boxes]:
    """The boxes of a text, those side by side as one; what says the same again is left out."""
    closings = _closings(text)
    runs: list[Boxes] = []
    told: list[str] = []  # by the boxes of the last run
    worded, closed = False, len(text)
    for found in _BOX.finditer(text):
        held, end = _box(text, found.end(), closings)
        joint = _BETWEEN_BOXES.fullmatch(text, closed, found.start())
        closed = end
        if held and 0 < len(told) < _MOST_BOXES and joint and joint[0].strip(" $"):
            whole = runs.pop().whole
            if not any(held in (one, _NAME.sub("", one)) or _NAME.sub("", held) == one for one in told):
                told.append(held)
                worded |= joint[1] is not None
                whole = f"{whole}\\text{{ {joint[1]} }}{held}" if joint[1] else f"{whole}, {held}"
            runs.append(Boxes(found.start(), whole, whole if worded else held))
        else:
            told, worded = [held] if held else [], False
            runs.append(Boxes(found.start(), held, held))
    return runs


def _closings(text: str) -> dict[int, int]:
    """Where each brace that is closed opens, and where it closes."""
    opened: list[int] = []
    closings = {}
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closings[opened.pop()] = brace.start()
    return closings


def _box(text: str, at: int, closings: dict[int, int]) -> tuple[str | None, int]:
    """What a box holds, and where it ends: nowhere before the text's end without braces."""
    if not text.startswith("{", at):
        return re.split(r"[\s$.,]", text[at:], maxsplit=1)[0] or None, len(text)
    end = closings.get(at)
    return (None, len(text)) if end is None else (text[at + 1 : end].strip(), end + 1)


def plain_words(text: str) -> str:
    """A text without Markdown's bold and bullets, and with "isn't" and its like in two words."""
    text = re.sub(r"(?<=\n)[ \t]*[-*•–][ \t]+(?=\S)", "", text)
    text = re.sub(r"(?<![\d)\s])\*\*|\*\*(?![\d(\s])|(?<!\w)__|__(?!\w)|^\*\*|\*\*$", "", text.replace("’", "'"))
    text = re.sub(r"\*\*(?=\s*[:.])|(?<=[:.\s])\*\*|(?<=\w)\*\*(?=\s|$)", "", text)
    return re.sub(r"\b(can)(?:not|'t)\b", r"\1 not", re.sub(r"\b(?!can)(\w+)n't\b", r"\1 not", text))


def marked_answers(text: str, several: bool = False) -> Iterator[str]:
    """The answers that a text marks, the last one first; nothing where it marks none.

    A sentence that only denies ("The answer is not 5. It is 6.") is followed by the next one. "My
    first answer is 5" comes behind all others.

    Args:
        text: A completion.
        several: Whether boxes that commas join are one answer; else the last of them is.
    """
    text = plain_words(text)
    boxes = {run.start: run.whole if several else run.alone for run in joined_boxes(text)}
    marks = [(True, start, start, "box") for start in boxes]
    marks += [(True, found.start(), found.end(), "hashes") for found in _HASHES.finditer(text)]
    marks += [(True, found.start(), found.end(), "tag") for found in _TAG.finditer(text)]
    for found in _STATED.finditer(text):
        before = text[max(0, found.start() - 60) : found.start()]
        early = _EARLIER.search(before) is not None
        if not (_CHECKED.search(before) or _WRONG_ONE.search(before) or (early and _PAST.search(found[0]))):
            marks.append((not early, found.start(), found.end(), "stated"))
    marks += [(True, found.start("answer"), found.end("answer"), "before") for found in _IS_THE_ANSWER.finditer(text)]
    for _, start, end, kind in sorted(marks, reverse=True):
        rest = text[end:]
        if kind == "before":
            answer: str | None = text[start:end]
        elif kind == "box":
            answer = boxes[start]
        elif kind == "tag":
            answer = re.split(r"</?answer>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip()
        else:
            answer = rest.strip().split("\n")[0] if kind == "hashes" else _sentence(rest)
        if answer:
            yield answer


def _sentence(rest: str) -> str:
    """The sentence that states the answer, behind all that it takes back ("12, no wait, 15")."""
    rest = rest.lstrip()
    formulas = _FORMULA.finditer(rest)
    formula = next(formulas, None)
    start = ends = 0
    for found in _PAUSE.finditer(rest):
        end = found.start()
        while formula and formula.end() <= end:
            formula = next(formulas, None)
        if end < start or (formula and formula.start() < end):  # a formula is taken whole
            continue
        # "12? No, 15.", "12, no wait, 15"
        if back := _TAKEN_BACK.match(rest, end):
            start, ends = back.end(), 0
            continue
        if not _SENTENCE_END.match(rest, end):
            continue
        ends += 1
        sentence = rest[start:end]
        # "not 5. It is 6.": the next sentence says it
        if ends > 1 or not _NO_CLAIM.match(sentence) or re.search(r"\bbut\b|[,;]", sentence):
            return sentence.strip()
    return rest[start:].strip()


def without_denied(text: str, item: str) -> str:
    """A text without the items that it denies: "not 5 but 6" is "but 6".

    Args:
        text: A sentence of `marked_answers`, or a whole text by `plain_words`.
        item: The pattern of an item, without groups that count.
    """
    filler = r"(?:(?:be|option|choice|answer|the|exactly|equal\s+to|either)\s+)*"
    denied = r"\b(?:not|never|neither|hardly|no\s+longer|anything\s+but|nor|instead\s+of|rather\s+than|over)"
    more, last = rf"(?:\s*,\s*{item})", rf"(?:,?\s*\b(?:and|or|nor)\s+{item})"
    listed = rf"{more}{{2,}}(?=\s*(?:[.;:\n]|$))"
    for opening, others in (  # "not A, B" and "rule out A, B" say B, "none of A, B" neither
        (r"none\s+of", rf"{more}*{last}?"),
        (r"(?:rule[sd]?\s+out|eliminate[sd]?)", rf"(?:{more}*{last}|{listed})?"),
    ):
        text = re.sub(rf"\b{opening}\s+{filler}{item}{others}", " ", text, flags=re.IGNORECASE)
    return re.sub(rf"{denied}\s+{filler}{item}(?:\s+(?:or|nor)\s+{item})*", " ", text, flags=re.IGNORECASE)
