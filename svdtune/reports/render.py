"""The page: one HTML file that holds its style, its code and its numbers, and asks the network for
nothing."""

import html
import json
import math
import re
from importlib.resources import files
from typing import Any

# In this order: each file uses what those before it define.
_SCRIPTS = ("dom.js", "chart.js", "frame.js", "sections.js", "page.js")


def render(data: dict[str, Any]) -> str:
    """The page of some data, from `gather`.

    Whatever the data holds (names of runs, data sets, modules) stays text: it travels as JSON in
    which no `<` or `&` is left, and the page's code only ever sets text, never markup.
    """
    folder = files("svdtune.reports") / "page"
    scripts = "\n".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    parts = {
        "title": html.escape(data["title"]),
        "css": (folder / "page.css").read_text("utf-8"),
        "js": scripts,
        "data": as_json(data),
    }
    # One pass: what a part holds is never looked through for the next.
    return re.sub(r"@(title|css|js|data)@", lambda found: parts[found[1]], (folder / "page.html").read_text("utf-8"))


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element; numbers that JSON has no word for become
    null."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return re.sub("[<>&\u2028\u2029]", lambda found: escaped[found[0]], text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
