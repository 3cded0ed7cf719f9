"""Where each turn of a chat ends in the text that a chat template writes, from one writing of the
whole chat.

Most templates go through the messages once, in order, and close with what asks for an answer. What
such a template writes for some first messages is how its text for all of them begins: a program
that has not looked ahead cannot know what follows. That a template is of this kind is read off its
syntax. It then gets marks where a message's text begins and where the messages end; nothing else
about it changes. Some templates look ahead for messages of one role, as Qwen's for those of tools;
they are of this kind for chats without that role.
"""

import re
import secrets
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import loopcontrols

MARK = f"\x1d{secrets.token_hex(8)}\x1d"  # no text has it
_ASKING = "add_generation_prompt"
# What of a loop does not depend on what is still to come.
_BEHIND = {"first", "index", "index0", "previtem", "depth", "depth0", "cycle", "changed"}
_ELSEWHERE = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)
_TAG = re.compile(r"\{#.*?#\}|\{%[-+]?\s*(for|endfor|generation|endgeneration)\b(.*?)([-+]?%\})", re.DOTALL)


class Marked(NamedTuple):
    """A template that writes `MARK` before the text of each message and after that of the last, and
    the roles of messages for which it may look ahead."""

    template: str
    roles: frozenset[Any]


@lru_cache(maxsize=32)
def marked(template: str) -> Marked | None:
    """A template with marks; None where its syntax does not show that it never looks ahead."""
    # Transformers' own tag, which writes what stands in it
    plain = _TAG.sub(lambda tag: _as_condition(tag) if tag[1] in ("generation", "endgeneration") else tag[0], template)
    try:
        # parsed, never rendered
        tree = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]).parse(plain)  # noqa: S701
    except TemplateError:
        return None
    loops = list(_loops(tree))
    tags = [tag for tag in _TAG.finditer(template) if tag[1] in ("for", "endfor")]
    opening = [at for at, tag in enumerate(tags) if tag[1] == "for"]
    found = _loop_over_turns(tree)
    if found is None or len(opening) != len(loops) or len(tags) != 2 * len(loops):
        return None
    turns, roles = found
    first = opening[next(at for at, loop in enumerate(loops) if loop is turns)]
    open_after = accumulate(1 if tag[1] == "for" else -1 for tag in tags[first:])
    last = first + list(open_after).index(0)
    for tag in (tags[last], tags[first]):
        at = tag.start(3)
        # the new tag ends as the old one, whose end says what becomes of the white space behind it
        template = template[:at] + "%}{% if true %}" + MARK + "{% endif " + template[at:]
    return Marked(template, roles)


def _as_condition(tag: re.Match[str]) -> str:
    return re.sub(r"\bendgeneration\b", "endif", re.sub(r"\bgeneration\b", "if true", tag[0]))


def _loops(node: nodes.Node) -> Iterator[nodes.For]:
    """All loops, as they stand in the template. (`find_all` goes level by level.)"""
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.For):
            yield child
        yield from _loops(child)


def _loop_over_turns(tree: nodes.Template) -> tuple[nodes.For, frozenset[Any]] | None:
    """The one loop over the messages, if nothing in the template depends on messages that the loop
    has not come to, but for messages of some roles; and those roles."""
    aliases = {"messages"} | {
        name.name for node in tree.find_all(nodes.Assign) if _is_rest(node) for name in _names(node.target)
    }
    at = [
        place
        for place, node in enumerate(tree.body)
        if isinstance(node, nodes.For) and isinstance(node.iter, nodes.Name) and node.iter.name in aliases
    ]
    if len(at) != 1 or next(tree.find_all(_ELSEWHERE), None):
        return None
    loop = tree.body[at[0]]
    assert isinstance(loop, nodes.For)
    after = nodes.Template(tree.body[at[0] + 1 :])
    if loop.test or loop.else_ or loop.recursive or next(loop.find_all(nodes.Break), None):
        return None
    branches = list(_of_roles(tree, loop))
    if not _looks_behind(tree, aliases, loop, [branch for branch, _ in branches]) or not _is_constant(tree, after):
        return None
    if _count(tree, _ASKING) != _count(after, _ASKING):
        return None
    return loop, frozenset(role for _, role in branches)


def _of_roles(tree: nodes.Template, loop: nodes.For) -> Iterator[tuple[nodes.If, Any]]:
    """The branches for messages of one role in which something may look ahead, and the roles."""
    if not isinstance(loop.target, nodes.Name):
        return
    turn = loop.target.name
    if sum(name.name == turn and name.ctx == "store" for name in _names(tree)) != 1:
        return
    for node in _own(loop):
        if not isinstance(node, nodes.If) or not isinstance(node.test, nodes.Compare):
            continue
        [compared, *more] = node.test.ops
        if more or compared.op != "eq" or not isinstance(compared.expr, nodes.Const):
            continue
        read = {name.name for inner in node.body for name in _names(inner)}
        if _is_role(node.test.expr, turn) and read & {"messages", "loop"}:
            yield node, compared.expr.value


def _is_role(node: nodes.Node, turn: str) -> bool:
    """Whether it reads the role of the loop's message."""
    if isinstance(node, nodes.Getattr):
        key: Any = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key = node.arg.value
    else:
        return False
    return key == "role" and isinstance(node.node, nodes.Name) and node.node.name == turn


def _is_rest(node: nodes.Assign) -> bool:
    """Whether it gives the messages, or those behind some first ones, another name."""
    target = node.target
    return isinstance(target, nodes.Name) and target.name != "messages" and _is_all_or_rest(node.node)


def _is_all_or_rest(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start, stop, step = node.arg.start, node.arg.stop, node.arg.step
        return _is_all_or_rest(node.node) and stop is None and step is None and _is_count(start)
    return isinstance(node, nodes.Name) and node.name == "messages"


def _is_count(node: nodes.Node | None) -> bool:
    return isinstance(node, nodes.Const) and type(node.value) is int and node.value >= 0


def _looks_behind(tree: nodes.Template, aliases: set[str], loop: nodes.For, branches: list[nodes.If]) -> bool:
    """Whether all messages but the first are read through the loop, and the loop tells nothing of
    what is to come, outside of these branches."""
    passed = {id(name) for branch in branches for node in branch.body for name in _names(node)}
    allowed = {id(loop.iter)} | passed
    for node in tree.find_all(nodes.Assign):
        if _is_rest(node):
            allowed |= {id(name) for name in node.find_all(nodes.Name)}
        elif any(name.name in aliases for name in _names(node.target)):
            return False
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.node, nodes.Name) and item.node.name == "messages" and _is_first(item.arg):
            allowed.add(id(item.node))
    if any(name.name in aliases and id(name) not in allowed for name in _names(tree)):
        return False
    asked = passed | {id(node.node) for node in _own(loop) if isinstance(node, nodes.Getattr) and node.attr in _BEHIND}
    return all(id(node) in asked for node in _own(loop) if isinstance(node, nodes.Name) and node.name == "loop")


def _is_first(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and type(node.value) is int and node.value == 0


def _own(loop: nodes.For) -> Iterator[nodes.Node]:
    """The nodes of a loop's body for which `loop` is this loop."""
    waiting: list[nodes.Node] = list(loop.body)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [node.iter] if isinstance(node, nodes.For) else list(node.iter_child_nodes())


def _is_constant(tree: nodes.Template, after: nodes.Template) -> bool:
    """Whether what stands after the loop writes the same behind any messages."""
    made = {name.name for name in _names(tree) if name.ctx != "load"} | {
        macro.name for macro in tree.find_all(nodes.Macro)
    }
    changing = made | {"messages", "tools", "loop"}
    return not any(name.name in changing for name in _names(after)) and not next(after.find_all(nodes.Call), None)


def _names(node: nodes.Node) -> list[nodes.Name]:
    return [*([node] if isinstance(node, nodes.Name) else []), *node.find_all(nodes.Name)]


def _count(node: nodes.Node, name: str) -> int:
    return sum(one.name == name for one in _names(node))
