"""Markdown that shows any label as it is written: escaping, tables, code."""

import re
from collections.abc import Iterable, Sequence


def escape(text: object) -> str:
    """One line of plain text: nothing in it is markup, HTML, a cell's end or the start of a list or
    heading."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # within a word it is plain
    return re.sub(r"^(\d*)([-+=#.)])", r"\1\\\2", line)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of ready cells, the first `left` columns aligned to the left, the others to the
    right."""
    rule = ["---" if at < left else "---:" for at in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def code(text: str) -> str:
    """Text in code type within a line."""
    line = " ".join(text.split())
    fence = "`" * (1 + _longest_run(line))
    room = " " if "`" in line else ""
    return f"{fence}{room}{line}{room}{fence}"


def block(text: str, language: str = "") -> str:
    """Text as a block of code."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
