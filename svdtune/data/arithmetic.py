"""Worded arithmetic, made offline: two-step problems with a worked answer.

The templates of the two splits are disjoint: `train` draws from TRAIN, `test` from TEST, so that no
held-out item, and no held-out wording, ever occurs in training. Names, things and the ranges of the
numbers are shared. Items do not repeat within a split.

    Maria has 43 apples. Tom gives Maria 28 more, and then Maria sells 16.
    How many apples does Maria have now?
    43 + 28 = 71
    71 - 16 = 55
    #### 55
"""

import random
from dataclasses import dataclass

from svdtune.errors import SvdtuneError

# fmt: off
_NAMES = ("Maria", "Tom", "Aisha", "Ben", "Chloe", "David", "Elena", "Frank", "Grace", "Hugo", "Ines", "Jack", "Kenji",
          "Laura", "Mina", "Nils", "Olga", "Peter", "Rosa", "Sam")
_THINGS = ("apples", "books", "pens", "stamps", "marbles", "stickers", "coins", "cards", "shells", "buttons", "candles",
           "cookies")
# fmt: on


@dataclass(frozen=True)
class Template:
    """A problem over names {n} and {m}, a thing {t}, and numbers {a}, {b}, {c}, solved in two
    steps.

    The first step joins a and b by `first`; the second joins that result and c by `second`.
    """

    text: str
    first: str
    second: str


TRAIN = tuple(
    Template(text, *steps.split())
    for steps, text in [
        ("+ -", "{n} has {a} {t}. {m} gives {n} {b} more, and then {n} sells {c}. How many {t} does {n} have now?"),
        (
            "+ -",
            "A shop has {a} {t} on Monday and receives {b} on Tuesday. It sells {c} of them. How many {t} are left?",
        ),
        ("+ +", "{n} collects {a} {t} in May, {b} in June and {c} in July. How many {t} does {n} collect in total?"),
        ("+ +", "One shelf holds {a} {t}, another {b}, and a third {c}. How many {t} are on the three shelves?"),
        ("- -", "{n} had {a} {t}. {n} gave {b} to {m} and lost {c}. How many {t} does {n} have left?"),
        ("- -", "Of {a} {t} in a store, {b} were sold in the morning and {c} in the afternoon. How many {t} remain?"),
        ("- +", "{n} had {a} {t}, gave away {b}, and later bought {c} more. How many {t} does {n} have?"),
        ("- +", "A box held {a} {t}. {n} took out {b} and {m} put in {c}. How many {t} does the box hold now?"),
        ("* +", "{n} buys {a} packs of {b} {t} each, and already has {c} {t}. How many {t} does {n} have altogether?"),
        ("* +", "There are {a} bags with {b} {t} in each bag, and {c} more {t} on the table. How many {t} are there?"),
        ("* -", "{n} has {a} boxes with {b} {t} in each box and gives {c} {t} to {m}. How many {t} are left?"),
        ("* -", "A factory fills {a} crates with {b} {t} each. {c} {t} are broken. How many {t} are not broken?"),
    ]
)
TEST = tuple(
    Template(text, *steps.split())
    for steps, text in [
        (
            "+ -",
            "On Friday {n} found {a} {t} and on Saturday {b}. On Sunday {m} borrowed {c} of them. How many stayed with {n}?",
        ),
        ("+ +", "{n} owns {a} {t}, {m} owns {b}, and their friend owns {c}. How many {t} do all three own together?"),
        (
            "- -",
            "{n} starts the day with {a} {t}, lends out {b} and throws away {c}. How many {t} does {n} end with?",
        ),
        (
            "- +",
            "There were {a} {t} in a jar. {b} were used up, and {c} new ones were added. How many {t} are in the jar?",
        ),
        ("* +", "Each of {a} children brings {b} {t}. The teacher adds {c} {t}. What is the total number of {t}?"),
        ("* -", "{n} packs {t} into {a} rows of {b}. Then {m} removes {c} {t}. How many {t} are still packed?"),
    ]
)
SPLITS = {"train": TRAIN, "test": TEST}


def rows(split: str, size: int, seed: int = 0) -> list[dict[str, str]]:
    """Make `size` different problems of one split: dicts of question, solution (worked, ending
    "#### N") and answer.

    The same split, size and seed give the same rows on every machine.

    Raises:
        SvdtuneError: if the split is unknown.
    """
    if split not in SPLITS:
        raise SvdtuneError(f"the task 'arithmetic' has no split {split!r}: expected one of {', '.join(SPLITS)}")
    draw = random.Random(f"arithmetic/{split}/{seed}")
    made: dict[str, dict[str, str]] = {}
    while len(made) < size:
        row = _row(draw.choice(SPLITS[split]), draw)
        made.setdefault(row["question"], row)
    return list(made.values())


def _row(template: Template, draw: random.Random) -> dict[str, str]:
    a, b, c = _numbers(template, draw)
    n, m = draw.sample(_NAMES, 2)
    question = template.text.format(n=n, m=m, t=draw.choice(_THINGS), a=a, b=b, c=c)
    between = _join(a, template.first, b)
    answer = _join(between, template.second, c)
    solution = f"{a} {template.first} {b} = {between}\n{between} {template.second} {c} = {answer}\n#### {answer}"
    return {"question": question, "solution": solution, "answer": str(answer)}


def _numbers(template: Template, draw: random.Random) -> tuple[int, int, int]:
    """Numbers that leave at least 2 after every step."""
    while True:
        a, b = (
            (draw.randint(2, 9), draw.randint(2, 9))
            if template.first == "*"
            else (draw.randint(10, 50), draw.randint(2, 20))
        )
        c = draw.randint(2, 20)
        between = _join(a, template.first, b)
        if between >= 2 and _join(between, template.second, c) >= 2:
            return a, b, c


def _join(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]
