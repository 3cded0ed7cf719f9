r"""Ways to write numbers, brought to one: LaTeX, Unicode, separators, and operations in words ("3
times 4", "half of 10", "10 to the power of 3")."""

import re
from typing import Any

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_HALVES = {
    "½": "1/2",
    "⅓": "1/3",
    "⅔": "2/3",
    "¼": "1/4",
    "¾": "3/4",
    "⅕": "1/5",
    "⅛": "1/8",
    "⅜": "3/8",
    "⅝": "5/8",
    "⅞": "7/8",
}
_AMOUNT = r"\d(?:[\d,./]*\d)?"
_ENDS = r"(?=\s*(?:[.,;:=+*/)-]|$)|\s+(?:is|equals|plus|minus)\b)"  # "5 squared units" are none of this
_IN_WORDS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern, re.IGNORECASE), sign)
    for pattern, sign in (
        (r"(?<=[\d)])\s+(?:times|multiplied\s+by)\s+(?=[\d(])", "*"),
        (r"(?<=[\w)])\s+divided\s+by\s+(?=[$£€]?[\d(])", " / "),
        (r"(?<=[\w)])\s+plus\s+(?=[$£€]?[\d(])", " + "),
        (rf"(?<=\d)\s+to\s+the\s+(?:power\s+(?:of\s+)?(\d+)\b|(\d+)(?:st|nd|rd|th)(?:\s+power\b|\b{_ENDS}))", r"^\1\2"),
        (rf"(?<=[\d)])\s+squared\b{_ENDS}", "^2"),
        (rf"(?<=[\d)])\s+cubed\b{_ENDS}", "^3"),
        (
            rf"\b(?:(?:(?P<times>one|an?|two|three|four|five)\s+)?"
            rf"(?P<part>half|third|quarter|fourth|fifth)s?\s+of|(?P<double>twice|double|triple)"
            rf"|(?P<percent>{_AMOUNT})\s*(?:%|percent)\s+of|(?P<plus>{_AMOUNT})\s+more\s+than"
            rf"|(?P<minus>{_AMOUNT})\s+(?:less|fewer)\s+than)"
            rf"\s+(?P<of>[$£€]?{_AMOUNT})",
            lambda found: _of_another(found),
        ),
        (r"\b(?:the\s+)?square\s+root\s+of\s+(?=\d)", "√"),
        (
            r"(?:\$\s?(\d[\d,]*)(?:\s+dollars?)?|\b(\d[\d,]*)\s+dollars?)\s+and\s+(\d{1,2})\s+cents?\b",
            lambda found: f"${found[1] or found[2]}.{int(found[3]):02}",
        ),
        (r"(?<=\d)\s+and\s+(?:a|one)\s+half\b", " 1/2"),
        (r"(?<=\d)\s+and\s+(?=\d/\d\b)", " "),
        (r"(?<![\\a-z])sqrt\s*(?=\()", "√"),
        (r"(?<=\d)\s*~\s*(?=[$£€]?\d)", "–"),
        (r"\|([\d\s.()+*/−-]{0,20}[-−+*/][\d\s.()+*/−-]{0,20}\d[\d\s)]{0,20})\|", r"√((\1)^2)"),
        (r"(?<![\w.,])(\d{1,3}(?:_\d{3})+)(?!\w)", lambda found: found[1].replace("_", "")),
        (
            r"(?<![\w.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,])",
            lambda found: f"{found[1].replace('.', '')}.{found[2]}",
        ),
        # 2(3 + 4) and (1 + 2)(3 + 4), and not "8 (2 * 4 = 8)"
        (r"(?<=[\d)])\((?=\s*[-+]?\s*\d[\d.\s]*[-+*/][^()=]*\))", "*("),
    )
]


def plain(text: str) -> str:
    """A text with LaTeX's and Unicode's ways to write numbers as ASCII has them."""
    for sign, written in _HALVES.items():
        text = text.replace(sign, f" {written}")
    text = re.sub(
        r"[⁰¹²³⁴-⁹⁻]+",
        lambda found: f"^({found[0].translate(SUPERSCRIPTS)})" if _digit_before(found) else found[0],
        text,
    )
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    while (made := re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", _fraction, text)) != text:
        text = made
    text = re.sub(
        r"(?<=\d)\{,\}(?=\d)|(?<=\d),?\\[,!;:](?:\s*)(?=\d{3})|(?<=\d)\\[,!]",
        lambda f: "," if "," in f[0] else "",
        text,
    )
    text = re.sub(r"(?<=\d)\\(?:ldots|dots|cdots)(?![A-Za-z])", "...", text)
    text = re.sub(r"\\(?:left|right|[,!;:]|quad|displaystyle)(?![A-Za-z])|[{}](?=\s*\\overline)", " ", text)
    text = re.sub(r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∙]", "*", re.sub(r"\\div(?![A-Za-z])|÷", "/", text))
    text = re.sub(r"(?<=\d)\s*\*\*\s*(?=[\d(])", "^", text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree", "°", text).replace("\\%", "%").replace("…", "...")
    text = re.sub(r"\\overline\s*\{(\d+)\}", r"\\overline(\1)", text).replace("{", "(").replace("}", ")")
    text = re.sub(r"\$([^$]*)\$", r" \1 ", text.replace("\\$", "＄")).replace("＄", "$")
    text = re.sub(r"\\[\[\]()]", " ", text).replace("\u202f", " ").replace("\u00a0", " ").replace("\u2009", " ")
    text = re.sub(
        r"\b(?:negative|minus)\s+(?=[$£€]?\d)",
        "-",
        re.sub(r"(?<=\d)\s*–\s*(?=[$£€]?\d)", "–", text),
        flags=re.IGNORECASE,
    )
    for pattern, sign in _IN_WORDS:
        text = pattern.sub(sign, text)
    text = re.sub(r"(?<![^\s($:=])–(?=[$£€]?\.?\d)", "-", text)  # a dash for a minus sign
    return re.sub(r"(?<![\w)\]])-\s+(?=[$\d(])", "-", text.replace("−", "-"))


def _digit_before(found: re.Match[str]) -> bool:
    return bool(re.search(r"[\d)]$", found.string[: found.start()]))


def _of_another(found: re.Match[str]) -> str:
    """ "half of 24", "20% of 50", "3 less than 10" as an expression, or a word where it explains a
    number ("12, half of 24") or is another beside it ("12 and half of 24")."""
    if re.search(r"\d[^.!?\n]*(?:[,:;(–—]|\s-|\band)\s*$", found.string[: found.start()]):
        return "half"
    of = found["of"]
    if found["part"]:
        parts = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5}
        times = {"two": 2, "three": 3, "four": 4, "five": 5}.get((found["times"] or "").lower(), 1)
        return f"{times}/{parts[found['part'].lower()]}*{of}"
    if found["double"]:
        return f"{3 if found['double'].lower() == 'triple' else 2}*{of}"
    if found["percent"]:
        return f"{found['percent']}/100*{of}"
    return f"{found['plus']} + {of}" if found["plus"] else f"({of} - {found['minus']})"


def _fraction(found: re.Match[str]) -> str:
    top, bottom = (side.strip() for side in found.groups())
    if re.fullmatch(r"\d+", top) and re.fullmatch(r"\d+", bottom):
        return (
            f" {top}/{bottom} " if not re.search(r"\^\s*\{?$", found.string[: found.start()]) else f"({top}/{bottom})"
        )
    return f"(({top})/({bottom}))"
