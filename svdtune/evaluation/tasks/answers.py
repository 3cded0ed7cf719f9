"""Where a text states its final answer: in a box, after "####", or after "the answer is". Strict
grading looks there first."""

import re

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_STATED = re.compile(r"\banswer(?:\s+(?:choice|option))?\s*(?:(?:is|are|was)\b|[:=])\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|(?<!\\)[.!?](?=\s|$)")


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, or the token after a \boxed without braces;
    None without any."""
    found = list(_BOX.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$.,]", rest, maxsplit=1)[0] or None
    depth = 0
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:at].strip()
    return None  # the completion was cut inside the box


def after_hashes(text: str) -> str | None:
    """The line after the last "####", GSM8K's mark."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().split("\n")[0] if mark else None


def stated(text: str) -> str | None:
    """The sentence after the last "the answer is" or "answer:", up to its end."""
    found = list(_STATED.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].lstrip()
    return _SENTENCE_END.split(rest, maxsplit=1)[0].strip() or None


def final_answer(text: str) -> str | None:
    """The answer that a text marks as its last word, None where it marks none."""
    for find in (boxed, after_hashes, stated):
        if (answer := find(text)) is not None:
            return answer
    return None
