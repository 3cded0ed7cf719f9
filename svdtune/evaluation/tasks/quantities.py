r"""Numbers as people write them, read exactly: 1,234.5, 1 000, 1½, \frac{3}{4}, 1.5 million,
3 × 10^5, 0.\overline{3}, 5 + 3 = 8 apples, in texts that `notation.plain` has gone over.

What stands between numbers decides what they are. A range (10-15, "10 to 15"), a ratio or a time
(3:1), a date, a list, an interval, a multiple of a letter (2x, 2π) is no number, and so is no
answer where a number is asked for.

- An expression is its value: "5 + 3" is 8, and neither 5 nor 3. Of a chain of equations the last
  side counts.
- "10-15" without spaces is a range where the second is the larger, else a difference: 15-10 is 5.
- "about 5" and "at least 5" are 5: worded arithmetic asks for the least or most as a number. "more
  than 5" is no number.
- A word of magnitude multiplies: "2 dozen" is 24, "$3M" and "3 million dollars" three million.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

from svdtune.evaluation.tasks.number_words import MAGNITUDES, number_in_words
from svdtune.evaluation.tasks.units import currency, unit_at

_GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)|[1-9]\d{0,2}(?:[ '’]\d{3})+(?![\d'’]| \d)|\d+"
_NUMBER = re.compile(
    rf"(?P<currency>[$£€]\s?)?(?P<minus>(?<=[$£€])-)?"
    rf"(?:(?P<whole>\d+)\s+(?P<top>\d+)/(?P<bottom>\d+)(?![\d/])"
    rf"|(?P<digits>[1-9]\d{{0,2}}(?:\.\d{{3}}){{2,}}(?!\.?\d)|(?:{_GROUPED})(?:\.\d+|\.(?=\\overline))?|\.\d+)"
    rf"(?P<repeat>\\overline\s?\(?\d+\)?|(?<=\.\d)\(\d+\)(?=\W|$)|(?<=\.\d\d)\(\d+\)(?=\W|$)|\.\.+)?"
    rf"(?P<power>[eE][-+]?\d{{1,3}}(?![\w]))?)"
)
_SHORT = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_SHORT_MONEY = {**_SHORT, "m": 10**6, "mn": 10**6, "bn": 10**9, "b": 10**9}
_MAGNITUDE = re.compile(rf"\s*(?:(?P<word>{'|'.join(MAGNITUDES)})s?|(?P<short>k|K|mn|bn|[mMbB]))(?![\w^])")
_PART = re.compile(rf"\s+(?:and\s+)?(\d[\d,]*)\s+({'|'.join(MAGNITUDES)})s?\b")
_START = re.compile(r"(?:[$£€]\s?-?)?\.?\d|\((?=[-+]?[$£€]?[\d.(])|\\sqrt|√")
_OPERATOR = re.compile(r"\s*(?P<sign>[-+*/^]|(?<=\d)\s*x\s*(?=\d))\s*")
_EQUALS = re.compile(r"\s*(?:=|≈)\s*")
# "5 apples + 6 apples": words that say what is counted, before a sign; not "5 when x = 3".
_COUNTED = re.compile(
    r"(?:\s+(?!(?:when|if|where|with|for)\b)[A-Za-z]+){0,2}\s+[A-Za-z]{2,}"
    r"(?=(?:\s*[+*=]|\s+/\s|\s*-\s)\s*[-$£€(]?\s*[\d(])"
)
_EITHER = re.compile(r"\s*(?:\bor\b|\bto\b|\band\b)\s*")
_OR = re.compile(r"[\s,(]*\bor\s+")
_AND_LETTER = re.compile(r"\s*(?:,|;|and|or|,\s*and)?\s*[A-Za-z]\s*=\s*")
_FEW_WORDS = 5  # of a text that is a number in words and nothing else
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)"
)
# "200 people by 2020", "20 miles by 5 pm", "8 by 50%": no sizes
_WHEN = (
    r"\s+(?:(?:1[89]|20)\d\d\b|\d{1,2}(?::\d|\s*[ap]\.?m\b|\s+o'clock)"
    r"|[\d.]+\s*(?:%|percent|(?:hour|day|week|month|year)s?\b))"
)
_JOINED = re.compile(
    rf"(?:\s+[A-Za-z]+){{0,2}}\s*(?:,|;|\band\b|\bor\b|&|\bto\b|\bthrough\b|\bby\b(?!{_WHEN})"
    r"|\bmod\b|\bremainder\b|\bR\b|±|\+-|:(?=\d)|–)"
    r"\s*(?:about\s+)?[$£€]?[-−]?\(?\.?\d"
)
_CONTINUED = re.compile(
    rf"\s*(?:\*\s*)?(?:[xyzniπ√∞](?![a-z])|\\(?:pi|sqrt|infty|theta))|[a-dxyzn]\b(?=\s*[-+*/^=)])"
    rf"|(?:st|nd|rd|th)?(?:\s+of)?\s*{_MONTH}\b|'\s?\d"
    r"|\s*pi\b|\s*\\?(?:log|ln|sin|cos|tan)(?=\s*[\d(\\_]|\s+[a-z]\b)|\s+times\s+(?!a\b)[a-z]\b"
)
_COMPARED = re.compile(
    r"(?:\b(?:more|less|fewer|greater|larger|smaller|other)\s+than"
    r"|\b(?:over|under|above|below|between|except|log|ln|sin|cos|tan)"
    r"|[<>≤≥±]|\\(?:le|ge|lt|gt|leq|geq|pm))\s*$"
)
_RANGED = re.compile(r"\bfrom\s*$", re.IGNORECASE)
_DEEPEST = 20  # brackets in brackets
_LARGEST_POWER, _LARGEST_BASE = 400, 10**30


@dataclass(frozen=True)
class Quantity:
    """A number that a text holds.

    Attributes:
        written: As the text has it, without separators, signs of currency and units; the value
            where the text has an expression.
        value: What it is, None for what looks like a number and is none: a range, a ratio, 1/0.
        unit: Its unit of measurement by `units`, None without one.
        start: Where it starts in the text.
        end: Where it and its unit end.
    """

    written: str
    value: Fraction | None
    unit: str | None
    start: int
    end: int


def quantities(text: str) -> list[Quantity]:
    """All numbers of a text by `plain`, from left to right; expressions and equations are one."""
    found, at = [], 0
    while (start := _START.search(text, at)) is not None:
        quantity = _chain(text, max(at, _signed(text, start.start())))
        found.append(quantity)
        at = max(quantity.end, start.start() + 1)
    return found


def first_quantity(text: str) -> Quantity | None:
    """The first number of a sentence that gives an answer, its value None where another is joined
    to it; None without any digit."""
    found = quantities(text)
    if not found:
        return _in_words(text)
    first = found[0]
    if len(found) > 1 and first.value == found[1].value and _OR.fullmatch(text[first.end : found[1].start]):
        return first  # "3/4 or 0.75"
    if _JOINED.match(text, first.end) or _RANGED.search(text[: first.start]):
        return _no_number(text, first.start, first.end)
    if len(found) > 1 and one_of_two(text, first, found[1]):
        return _no_number(text, first.start, first.end)
    return first


def last_quantity(text: str) -> Quantity | None:
    """The last number of a text, its value None where it is half of what two say; a number in words
    where the text is nothing else."""
    found = quantities(text)
    if not found:
        return _in_words(text) if len(text.split()) <= _FEW_WORDS else None
    if len(found) > 1 and one_of_two(text, found[-2], found[-1]):
        return _no_number(text, found[-2].start, found[-1].end)
    return found[-1]


def one_of_two(text: str, one: Quantity, other: Quantity) -> bool:
    """Whether two neighbours say one thing: "5 or 6", "5 ft 3 in", "x = 5, y = 6"."""
    between = text[one.end : other.start]
    if one.unit and other.unit and text[other.start] != "(" and re.fullmatch(r"(?:\s|,|\band\b)*", between):
        return one.unit != other.unit
    return _EITHER.fullmatch(between) is not None or _AND_LETTER.fullmatch(between) is not None


def _signed(text: str, at: int) -> int:
    # a minus sign right after a digit, a letter or a bracket subtracts
    before = re.search(r"(?<![\w)\]])[-+]\s?$", text[:at])
    return before.start() if before else at


def _no_number(text: str, start: int, end: int) -> Quantity:
    return Quantity(text[start:end].strip(), None, None, start, end)


def _chain(text: str, at: int) -> Quantity:
    """The expression at a place, and those that it is set equal to: the last of them."""
    if date := _DATE.match(text, at):
        return _no_number(text, at, date.end())
    side = _Expression(text, at)
    quantity = side.quantity()
    while (equals := _EQUALS.match(text, quantity.end)) and re.match(
        r"[-+]?\(*[-+]?[$£€]?\s?\.?\d|\\sqrt|√", text[equals.end() :]
    ):
        following = _Expression(text, equals.end()).quantity()
        quantity = Quantity(following.written, following.value, following.unit or quantity.unit, at, following.end)
    continued = quantity.unit is None and _CONTINUED.match(text, quantity.end)
    if continued or _COMPARED.search(text[:at]) or re.search(rf"\b{_MONTH}\s*$|\d:$", text[:at], re.IGNORECASE):
        return _no_number(text, at, continued.end() if continued else quantity.end)
    return quantity


class _Expression:
    """Reads one arithmetic expression by its precedences, units between its parts left out."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.start, self.at = text, at, at
        self.unit: str | None = None
        self.parts: list[str] = []  # the numbers as they are written
        self.spread = False  # a range
        self.evaluated = False
        self.depth = 0

    def quantity(self) -> Quantity:
        value = self._sum()
        if self.spread or re.match(r"\s*:\s*\d", self.text[self.at :]):
            ratio = re.match(r"\s*:\s*\d+", self.text[self.at :])
            return _no_number(self.text, self.start, self.at + (ratio.end() if ratio else 0))
        written = self.parts[0] if len(self.parts) == 1 and not self.evaluated else str(value)
        return Quantity(written, value, self.unit, self.start, self.at)

    def _sum(self) -> Fraction | None:
        value = self._product()
        while (operator := self._operator("+-")) is not None:
            value = _combined(operator, value, self._product())
        return value

    def _product(self) -> Fraction | None:
        value = self._factor()
        while (operator := self._operator("*/x")) is not None:
            value = _combined(operator, value, self._factor())
        return value

    def _factor(self) -> Fraction | None:
        base = self._signed()
        if self._operator("^") is not None:
            return _combined("^", base, self._factor())
        return base

    def _signed(self) -> Fraction | None:
        if sign := re.compile(r"[-+](?=\s?[$£€.\d(√\\])\s?").match(self.text, self.at):
            self.at = sign.end()
            mark = len(self.parts)
            value = self._factor()  # -2^2 is -4
            if sign[0].strip() == "-" and len(self.parts) > mark:
                self.parts[mark] = f"-{self.parts[mark]}"
            return value if value is None or sign[0].strip() == "+" else -value
        return self._primary()

    def _primary(self) -> Fraction | None:
        if root := re.compile(r"(?:\\sqrt|√)\s*(?=[\d(])").match(self.text, self.at):
            self.at, self.evaluated = root.end(), True
            return _root(self._primary())
        if self.text.startswith("(", self.at):
            self.at += 1
            self.depth += 1
            value = self._sum() if self.depth < _DEEPEST else None
            self.depth -= 1
            if not self.text.startswith(")", self.at):
                closing = re.compile(r"[^()]*[)\]]").match(self.text, self.at)
                self.at, self.evaluated = closing.end() if closing else self.at, True
                return None  # a tuple or an interval
            self.at += 1
            self._after()
            return value
        number = _NUMBER.match(self.text, self.at)
        if number is None or not number[0]:
            self.at, self.evaluated = self.at + 1, True
            return None
        return self._number(number)

    def _number(self, number: re.Match[str]) -> Fraction | None:
        self.at = number.end()
        value, written = _literal(number)
        if number["currency"]:
            self.unit = currency(number["currency"].strip())
        magnitude = _MAGNITUDE.match(self.text, self.at)
        if magnitude and value is not None:
            short = _SHORT_MONEY if number["currency"] else _SHORT
            times = MAGNITUDES.get(magnitude["word"] or "") or short.get(magnitude["short"] or "", 0)
            if times and not (magnitude["short"] and magnitude[0] != magnitude["short"] and not number["currency"]):
                value, self.at = value * times, magnitude.end()
                while more := re.compile(rf"\s*({'|'.join(MAGNITUDES)})s?\b").match(self.text, self.at):
                    value, self.at = value * MAGNITUDES[more[1]], more.end()
                if part := _PART.match(self.text, self.at):  # 1 million 200 thousand
                    smaller = int(part[1].replace(",", "")) * MAGNITUDES[part[2]]
                    value, self.at = (value + smaller, part.end()) if smaller < times else (value, self.at)
                written = str(value)
        self.parts.append(written)
        self._after()
        return value

    def _after(self) -> None:
        """Step over a unit, or over what is counted where the expression goes on behind it."""
        if unit := unit_at(self.text, self.at):
            self.unit, self.at = unit.name, unit.end
        if counted := _COUNTED.match(self.text, self.at):
            self.at = counted.end()

    def _operator(self, signs: str) -> str | None:
        found = _OPERATOR.match(self.text, self.at)
        if found is None or found["sign"].strip() not in signs:
            return None
        if not re.match(r"[-+]?\s?\(*[-+]?[$£€]?\s?\.?\d|\\sqrt|√", self.text[found.end() :]):
            return None
        sign = found["sign"].strip()
        if sign == "-" and found[0] == "-":
            ends = re.compile(r"(\d[\d,.]*)-[$£€]?(\d[\d,.]*)(?!\s*[=\d*/^+])").match(
                self.text, _number_start(self.text, self.at)
            )
            self.spread |= ends is not None and _amount(ends[1]) < _amount(ends[2])
        self.at, self.evaluated = found.end(), True
        return "*" if sign == "x" else sign


def _number_start(text: str, end: int) -> int:
    found = re.search(r"\d[\d,.]*$", text[:end])
    return found.start() if found else end


def _amount(written: str) -> Fraction:
    return Fraction(written.replace(",", "").rstrip(".") or 0)


def _literal(number: re.Match[str]) -> tuple[Fraction | None, str]:
    sign = -1 if number["minus"] else 1
    minus = "-" if number["minus"] else ""
    if number["whole"]:
        written = f"{minus}{number['whole']} {number['top']}/{number['bottom']}"
        bottom = int(number["bottom"])
        return (sign * (int(number["whole"]) + Fraction(int(number["top"]), bottom)) if bottom else None), written
    digits = re.sub(r"[, '’]", "", number["digits"])
    digits = digits.replace(".", "") if digits.count(".") > 1 else digits  # 1.234.567
    repeat = number["repeat"] or ""
    written = f"{minus}{digits}{repeat}{number['power'] or ''}"
    value = repeating(digits, re.sub(r"\D", "", repeat), ".." in repeat)
    if value is None:
        return None, written
    return sign * value * (Fraction(10) ** int(number["power"][1:]) if number["power"] else 1), written


def repeating(digits: str, period: str = "", dots: bool = False) -> Fraction | None:
    r"""0.1\overline{6}, 0.1(6) and 0.166... are 1/6; dots after no repetition (3.14159...) leave a
    number open."""
    whole, point, decimals = digits.partition(".")
    if dots:
        again = re.search(r"(\d+?)\1+$", decimals)
        if not again:
            return None if point else Fraction(digits)  # "5...": dots of a sentence
        period, decimals = again[1], decimals[: again.start()]
    if not period:
        return Fraction(digits)
    if not point:
        return None
    shift = Fraction(1, 10 ** len(decimals))
    return Fraction(int((whole or "0") + decimals)) * shift + Fraction(int(period), 10 ** len(period) - 1) * shift


def _combined(operator: str, one: Fraction | None, other: Fraction | None) -> Fraction | None:
    if one is None or other is None:
        return None
    if operator == "+":
        return one + other
    if operator == "-":
        return one - other
    if operator == "*":
        return one * other
    if operator == "/":
        return one / other if other else None
    small = abs(other) <= _LARGEST_POWER and max(abs(one.numerator), one.denominator) <= _LARGEST_BASE
    if other.denominator != 1 or not small or (one == 0 and other <= 0):
        return None
    return one ** int(other)


def _root(value: Fraction | None) -> Fraction | None:
    if value is None or value < 0:
        return None
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    return root if root * root == value else None


def _in_words(text: str) -> Quantity | None:
    """A number in words ("twenty-five apples"), where the sentence opens with it."""
    value = number_in_words(text)
    return None if value is None else Quantity(str(value), Fraction(value), None, 0, len(text))
