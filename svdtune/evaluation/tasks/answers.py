"""Where a text marks its final answer, for every task that grades strictly.

The marks are a box, the line after "####", the sentence after "the answer is" or "answer:", and
what stands before "is the answer". The last mark of a text counts, so that an answer taken back is
none. What a sentence denies ("not 5 but 6") is no answer.
"""

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_HASHES = re.compile(r"####\s*")
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
_FORMULA = re.compile(r"(?<!\\)\$(?:[^$\n]|\n(?!\n))+?(?<!\\)\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
_CHECKED = re.compile(
    r"\b(?:check|verify|confirm)\w*\s+(?:\w+\s+){0,2}$", re.IGNORECASE
)  # "We check our answer: 2 + 3 = 5"
_NO_CLAIM = re.compile(r"(?:not|never|neither|no\s+longer|hardly)\b", re.IGNORECASE)
_WRONG_ONE = re.compile(r"\b(?:wrong|incorrect|false|tempting)\s+$", re.IGNORECASE)
# An answer, of one task or another; "A train" is none.
_ONE = (
    r"(?:(?:the|option|choice|about|exactly)\s+)*[(\"'*]*"
    r"(?:[-−]?[$£€]?[-−]?\.?\d|[\\$]|[a-z]\s*=|(?:answer|solution|ending|option)\s?\d"
    r"|(?:true|false)\b|(?-i:[A-E])(?=[).,;:!?\"'*]|\s*$|\s*\n|\s+(?:is|fits|works|because|since|as|instead|not)\b))"
)
_WRONG = r"(?:is|are|was|were|does|do|did|can|could|would|will|has|have)\s+(?:not|wrong|incorrect|impossible|too)\b"
# "No, 15", "Sorry, I meant B", "That is wrong: it is true"; a remark ("No, A is wrong",
# "Sorry, that took 3 steps") takes nothing back.
_TAKEN_BACK = re.compile(
    r"[.!?]?"
    r"(?:\s+(?:but\s+|oh,?\s+|wait,?\s+|actually,?\s+)*(?:no\b(?=[,.])|wait|scratch\s+that|correction|oops|sorry"
    r"|I\s+(?:made\s+an?|was\s+wrong|mis[a-z]+)[a-z\s]*(?=[.:;,!])"
    r"|(?:that|this|it)(?:\s+(?:is|was)|'s)\s+(?:wrong|incorrect|not\s+(?:right|correct))(?=\s*[.:;,!–—-]))[,.:;!–—-]*)+"
    r"\s+(?:but\s+|actually,?\s+|rather\s+|make\s+(?:it|that)\s+|I\s+meant?\s+|we\s+(?:get|have)\s+"
    r"|(?:(?:it|this|that|the\s+(?:total|result|sum|right\s+one|correct\s+one))\s*)?"
    rf"(?:\b(?:is|was|should\s+be|must\s+be|has\s+to\s+be)|'s)\s+)*"
    rf"(?=(?:not\s+{_ONE}[^\n]*?(?:[,;.]\s|\bbut\b)[^\n]*)?{_ONE})"
    rf"(?![^\s,.;:]*(?:\s+[a-z]+){{0,4}}?\s+{_WRONG})",
    re.IGNORECASE,
)


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, or the token after a \boxed without braces;
    None without any, and where the text ends inside it."""
    found = list(_BOX.finditer(text))
    return _box(text[found[-1].end() :]) if found else None


def _box(rest: str) -> str | None:
    if not rest.startswith("{"):
        return re.split(r"[\s$.,]", rest, maxsplit=1)[0] or None
    depth = 0
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:at].strip()
    return None  # the completion was cut inside the box


def plain_words(text: str) -> str:
    """A text without Markdown's bold, and with "isn't" and its like written in two words."""
    text = re.sub(r"(?<![\d)\s])\*\*|\*\*(?![\d(\s])|(?<!\w)__|__(?!\w)|^\*\*|\*\*$", "", text.replace("’", "'"))
    text = re.sub(r"\*\*(?=\s*[:.])|(?<=[:.\s])\*\*|(?<=\w)\*\*(?=\s|$)", "", text)
    return re.sub(r"\b(can)(?:not|'t)\b", r"\1 not", re.sub(r"\b(?!can)(\w+)n't\b", r"\1 not", text))


def marked_answers(text: str) -> Iterator[str]:
    """The answers that a text marks, the last one first; nothing where it marks none.

    A sentence that only denies ("The answer is not 5. It is 6.") is followed by the next one.
    """
    text = plain_words(text)
    marks = [(found.start(), found.end(), "box") for found in _BOX.finditer(text)]
    marks += [(found.start(), found.end(), "hashes") for found in _HASHES.finditer(text)]
    marks += [
        (found.start(), found.end(), "stated")
        for found in _STATED.finditer(text)
        if not _CHECKED.search(text[: found.start()]) and not _WRONG_ONE.search(text[: found.start()])
    ]
    marks += [(found.start("answer"), found.end("answer"), "before") for found in _IS_THE_ANSWER.finditer(text)]
    for start, end, kind in sorted(marks, reverse=True):
        rest = text[end:]
        if kind == "before":
            answer: str | None = text[start:end]
        elif kind == "box":
            answer = _box(rest)
        else:
            answer = rest.strip().split("\n")[0] if kind == "hashes" else _sentence(rest)
        if answer:
            yield answer


def _sentence(rest: str) -> str:
    rest = rest.lstrip()
    formulas = [found.span() for found in _FORMULA.finditer(rest)]
    ends = [end.start() for end in _SENTENCE_END.finditer(rest)]
    ends = [end for end in ends if not any(start < end < stop for start, stop in formulas)]  # a formula is taken whole
    for at, end in enumerate(ends):
        # "12? No, 15.", "12. Scratch that, 15."
        if back := _TAKEN_BACK.match(rest, end):
            return _sentence(rest[back.end() :])
        sentence = rest[:end]
        # "not 5. It is 6.": the next sentence says it
        if at or not _NO_CLAIM.match(sentence) or re.search(r"\bbut\b|[,;]", sentence):
            return sentence.strip()
    return rest.strip()


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
