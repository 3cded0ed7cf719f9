"""Recipe files on top of others: `extends: base.yaml` takes that file's settings and changes some.

A section is changed setting by setting, but for `method`, which is replaced: the settings of one
method mean nothing to another. With several files the later ones change the earlier ones. Paths are
relative to the file that names them.
"""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import Event, ScalarEvent
from ruamel.yaml.nodes import MappingNode, SequenceNode

from svdtune.errors import SvdtuneError
from svdtune.system import explain_read_error

_REPLACED = "method"
_MOST_VALUES, _DEEPEST = 100_000, 30
_SECTIONS = "model, method, data, training, evaluation, output"


def read_settings(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe file, those of the files that it extends included.

    Args:
        path: the YAML file.
        above: the files that extend it, to find a circle.

    Raises:
        SvdtuneError: if a file is missing, is not YAML, holds no settings, or extends itself.
    """
    if path.resolve() in above:
        raise SvdtuneError(f"{path} extends itself; take the circle out")
    if not path.is_file():
        named = f", which {above[-1]} extends" if above else ""
        raise SvdtuneError(f"there is no recipe {path}{named}")
    settings = read_yaml(read_text(path), str(path))
    if not isinstance(settings, dict):
        raise SvdtuneError(f"{path} holds no settings: expected the sections {_SECTIONS}")
    bases = settings.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SvdtuneError(f"{path}: extends is {bases!r}; expected a file's name, or a list of them")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_settings(path.parent / base, (*above, path.resolve())))
    return merge(merged, settings)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of `base` with `changes`; both stay as they are."""
    merged = dict(base)
    for section, value in changes.items():
        before = merged.get(section)
        if isinstance(before, dict) and isinstance(value, dict) and section != _REPLACED:
            merged[section] = {**before, **value}
        else:
            merged[section] = value
    return merged


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as the text of a YAML file, in their order."""
    text = io.StringIO()
    yaml: Any = YAML(typ="safe", pure=True)  # which annotates no setting
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
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
        SvdtuneError: naming the line; or the values are too many or too deep to be settings, as
            where anchors repeat each other.
    """
    try:
        # counted while it is read, since to build a hundred thousand values takes seconds
        if sum(1 for _ in islice(_scalars(text), _MOST_VALUES + 1)) > _MOST_VALUES:
            raise SvdtuneError(_too_much(source))
        # Before anything is made of it: merge keys (<<) copy what they name, and a few of them copy
        # for ever.
        if _size(YAML(typ="safe", pure=True).compose(text), {}) > _MOST_VALUES:
            raise SvdtuneError(_too_much(source))
        found = YAML(typ="safe", pure=True).load(text)
    except SvdtuneError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context or "it cannot be parsed").splitlines()[0]
        tab = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        raise SvdtuneError(f"{source}{where} is not valid YAML: {problem}{tab}") from error
    except YAMLError as error:
        raise SvdtuneError(f"{source} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise SvdtuneError(f"{source} is not a recipe: its values lie too deep in each other") from error
    # values that look like dates or numbers and are none, by the types of what makes them
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SvdtuneError(f"{source} is not valid YAML: {reason:.200}; put texts in quotes") from error
    _check_shape(found, source)
    return found


def _scalars(text: str) -> Iterator[Event]:
    """The single values of a YAML text, as they are read."""
    return (event for event in YAML(typ="safe", pure=True).parse(text) if isinstance(event, ScalarEvent))


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias counted as often as it is used; too many where
    it contains itself."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1
        inner = node.value if isinstance(node, SequenceNode | MappingNode) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = min(1 + sum(_size(part, known) for part in parts), _MOST_VALUES + 1)
    return known[id(node)]


def _too_much(source: str) -> str:
    return (
        f"{source} is not a recipe: expected at most {_MOST_VALUES:,} values, at most {_DEEPEST} deep; it has more, or "
        "anchors that contain each other"
    )


def _check_shape(found: Any, source: str) -> None:
    """Refuse names that are no texts, and what a few anchors can blow up to: every alias counts as
    often as it is used."""
    waiting, count = [(found, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise SvdtuneError(_too_much(source))
        if isinstance(value, dict):
            if names := [name for name in value if not isinstance(name, str)]:
                raise SvdtuneError(
                    f"{source}: the name {names[0]!r:.60} is not a text; put it in quotes if it is meant"
                )
            waiting += [(inner, depth + 1) for inner in (*value, *value.values())]
        elif isinstance(value, list | tuple | set):
            waiting += [(inner, depth + 1) for inner in value]
