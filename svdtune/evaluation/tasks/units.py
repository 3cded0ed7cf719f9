"""Units of measurement: which words are one, so that 5 cm is not 5 m.

Only units that are written the same way everywhere count. "apples" is none: it says what was
counted. Nothing is converted: a question asks in one unit, and its reference has it.
"""

import re
from typing import NamedTuple

# Canonical name → the ways to write it. A single letter is a unit only where nothing follows it.
_NAMES = {
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm cms centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kms kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yds yard yards",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kgs kilogram kilograms kilo kilos",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "t": "ton tons tonne tonnes",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "d": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "ml": "ml milliliter milliliters millilitre millilitres",
    "l": "l L liter liters litre litres",
    "gal": "gal gallon gallons",
    "qt": "quart quarts",
    "pt": "pint pints",
    "cup": "cup cups",
    "$": "dollar dollars usd bucks",
    "¢": "cent cents ¢",
    "€": "euro euros eur",
    "£": "gbp",
    "%": "% percent",
    "°": "° degree degrees",
    "rad": "rad radian radians",
    "N": "N newton newtons",
    "J": "J joule joules",
    "W": "W watt watts",
    "kW": "kw kilowatt kilowatts",
    "Wh": "wh",
    "kWh": "kwh",
    "kB": "kb kilobyte kilobytes",
    "MB": "mb megabyte megabytes",
    "GB": "gb gigabyte gigabytes",
    "TB": "tb terabyte terabytes",
    "mi/h": "mph",
    "km/h": "kph kmh kmph",
}
_UNITS = {written: name for name, ways in _NAMES.items() for written in ways.split()}
_CURRENCIES = {"$": "$", "£": "£", "€": "€"}
_RAISED = r"\s*\^\s*\(?\{?\d\}?\)?|[²³]"
_UNIT = re.compile(
    rf"\s*(?P<squared>square|sq\.?|cubic|cu\.?)?\s*(?P<unit>[A-Za-z]+|[%°¢])(?P<power>{_RAISED})?"
    r"(?P<scale>\s*(?:C(?:elsius)?|F(?:ahrenheit)?)\b)?"
)
_HOURS = re.compile(r"(?:\s|\s?[-*·]\s?)(?:hours?|hrs?|h)\b")
_PER = re.compile(
    r"\s*(?:/|\bper\b|\ban?\b)\s*(?P<unit>[A-Za-z]+)(?P<power>\s*\^\s*\(?\{?\d\}?\)?|[²³]|\s+(?:squared|cubed)\b)?"
)
_POWERS = {"²": "2", "³": "3", "squared": "2", "cubed": "3"}


class Unit(NamedTuple):
    """A unit as it stands in a text.

    Attributes:
        name: Its canonical name, such as "km/h" or "cm^2".
        end: Where it ends.
    """

    name: str
    end: int


def unit_at(text: str, at: int) -> Unit | None:
    """The unit that stands at a place of a text, None where there is none."""
    found = _UNIT.match(text, at)
    name = found and _UNITS.get(found["unit"].lower() if len(found["unit"]) > 1 else found["unit"])
    if found is None or name is None:
        return None
    scale = found["scale"] if name == "°" else None
    end = found.end() if scale or not found["scale"] else found.start("scale")
    if name in ("W", "kW") and (hours := _HOURS.match(text, end)):
        name, end = f"{name}h", hours.end()
    # "5 in all", "5 a day", "5 m students": one letter, or "in", and a word behind it
    short = len(found["unit"]) == 1 or found["unit"] == "in"
    if short and re.match(r"\s*(?!per\b|and\b)[A-Za-z]", text[end:]):
        return None
    power = _power(found["power"]) or {"s": "2", "c": "3"}.get((found["squared"] or " ")[0], "")
    name = f"{name}^{power}" if power else f"{name}{(scale or '').strip()[:1]}"
    per = _PER.match(text, end)
    below = per and _UNITS.get(per["unit"].lower())
    if per and below:
        return Unit(f"{name}/{below}{'^' if per['power'] else ''}{_power(per['power'])}", per.end())
    return Unit(name, end)


def currency(sign: str) -> str | None:
    """The unit of a currency's sign that stands before a number."""
    return _CURRENCIES.get(sign)


def _power(written: str | None) -> str:
    written = (written or "").strip()
    return _POWERS.get(written) or "".join(c for c in written if c.isdecimal())
