"""Settings as YAML 1.2, read and written by its core schema (YAML 1.2.2, section 10.3.2).

`1e-3` is a number there, `010` is ten, and `no`, `1_000`, `1:30` and `2026-01-02` are texts. Where
YAML 1.1 reads a number, a date or a truth value in these, a setting that is one of them refuses the
text: nothing is one value here and another in the user's other tools, unsaid.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver

from svdtune.errors import SvdtuneError
from svdtune.names import FLOAT, INTEGER
from svdtune.system import explain_read_error, first_line

_MOST_VALUES, _DEEPEST = 100_000, 30
_TAG = "tag:yaml.org,2002:"
# By tag, how a value of it is written, and its first characters. Merge keys are no part of the core
# schema; they are kept since recipes use them.
_CORE = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (INTEGER, [*"-+0123456789"]),
    "float": (FLOAT, [*"-+.0123456789"]),
    "merge": ("<<", ["<"]),
}
_PLAIN = ("str", "map", "seq")  # tags that say nothing about how a value is written


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """By first character, the tags that a value may have, and how it is written then."""
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, (written, first) in _CORE.items():
        for character in first:
            found.setdefault(character, []).append((_TAG + name, re.compile(rf"(?:{written})\Z")))
    return found


_BY_FIRST = _resolvers()


class _CoreSchema(VersionedResolver):
    """Tells what a plain value is by the core schema, in every document."""

    @property
    def versioned_resolver(self) -> Any:
        return _BY_FIRST


def _yaml() -> Any:  # ruamel annotates no setting
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Resolver = _CoreSchema
    return yaml


def write_yaml(settings: dict[str, Any], *, flow: bool | None = False, width: int | None = None) -> str:
    """Settings as YAML 1.2, in their order.

    Args:
        settings: plain values.
        flow: whether sections are written in braces; None for those without sections in them.
        width: of a line; None for ruamel's.
    """
    text, yaml = io.StringIO(), _yaml()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = flow, False, width
    yaml.dump(settings, text)
    return text.getvalue()


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        SvdtuneError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SvdtuneError(f"{path} is not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
    except OSError as error:
        raise SvdtuneError(f"cannot read {path}: {explain_read_error(error)}") from error


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML 1.2.

    Raises:
        SvdtuneError: naming the line; another version of YAML or a tag outside the core schema is
            asked for; or the values are too many or too deep to be settings, as where anchors
            repeat each other.
    """
    try:
        _check_events(_yaml().parse(text), source)
        # Before anything is made of it: merge keys (<<) copy what they name, and a few of them copy
        # for ever.
        count, depth = _size(_yaml().compose(text), {}, source)
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise SvdtuneError(_too_much(source))
        return _yaml().load(text)
    except SvdtuneError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context or "it cannot be parsed").splitlines()[0]
        tab = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        raise SvdtuneError(f"{source}{where} is not valid YAML: {problem}{tab}") from error
    except YAMLError as error:
        raise SvdtuneError(f"{source} is not valid YAML: {first_line(error)}") from error
    except RecursionError as error:
        raise SvdtuneError(f"{source} is not a recipe: its values lie too deep in each other") from error
    # values that look like dates or numbers and are none, by the types of what makes them
    except Exception as error:
        raise SvdtuneError(f"{source} is not valid YAML: {first_line(error):.200}; put texts in quotes") from error


def _check_events(events: Iterator[Event], source: str) -> None:
    """Refuse what is outside the core schema, and values that are more or deeper than settings are:
    while the text is read, since to build a hundred thousand of them takes seconds."""
    count = depth = 0
    for event in events:
        where = f"{source} line {event.start_mark.line + 1}"
        if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
            version = ".".join(map(str, event.version))
            raise SvdtuneError(f"{where} asks for YAML {version}; settings are YAML 1.2: take %YAML {version} out")
        if isinstance(event, ScalarEvent):
            count += 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise SvdtuneError(_too_much(source))
        if isinstance(event, NodeEvent) and (tag := getattr(event, "tag", None)):
            _check_tag(str(tag), getattr(event, "value", ""), where)


def _check_tag(tag: str, value: str, where: str) -> None:
    """Refuse a tag, such as in `!!int 1_000`, that the core schema lacks or whose values it writes
    otherwise."""
    name = tag.removeprefix(_TAG)
    if name in _PLAIN:
        return
    if name not in _CORE or not re.fullmatch(_CORE[name][0], value):
        raise SvdtuneError(
            f"{where} has the tag {name!r:.60}, which is none of YAML 1.2's for a value written {value!r:.60}; take the tag out"
        )


def _size(node: Any, known: dict[int, tuple[int, int]], source: str) -> tuple[int, int]:
    """How many values a node stands for, each alias counted as often as it is used, and how deep
    they lie; too many where it contains itself. Refuses names that are no texts."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1, 0
        inner = node.value if isinstance(node, SequenceNode | MappingNode) else []
        names = [entry[0] for entry in inner if isinstance(entry, tuple)]
        if odd := [name for name in names if name.tag not in (f"{_TAG}str", f"{_TAG}merge")]:
            shown = odd[0].value[:60] if isinstance(odd[0], ScalarNode) else f"that is a {odd[0].id}"
            shown += f" in line {odd[0].start_mark.line + 1}"
            raise SvdtuneError(f"{source}: the name {shown} is not a text; put it in quotes if it is meant")
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes = [_size(part, known, source) for part in parts]
        count = min(1 + sum(count for count, _ in sizes), _MOST_VALUES + 1)
        known[id(node)] = (
            count,
            0 if isinstance(node, ScalarNode) else 1 + max((depth for _, depth in sizes), default=0),
        )
    return known[id(node)]


def _too_much(source: str) -> str:
    return (
        f"{source} is not a recipe: expected at most {_MOST_VALUES:,} values, at most {_DEEPEST} deep; it has more, or "
        "anchors that contain each other"
    )
