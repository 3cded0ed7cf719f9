"""A chat's text in pieces, cut where an assistant's turn begins and ends, found with the chat
template itself.

The template writes the chat up to each turn, once with what asks for the turn and once with the
turn written. Each text must begin with the one before it: else what the model reads in training
would not be what it reads when it answers, and no mask could be right.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from svdtune.data.examples import Example, Messages
from svdtune.data.standard import MARKS
from svdtune.errors import SvdtuneError

_TOGETHER = 64  # written at a time: a call has its own cost, and the texts of a long chat take memory


class Prefix(NamedTuple):
    """The first messages of a row's chat, to be written, perhaps with what asks for the next."""

    name: str
    messages: Messages
    tools: Sequence[Any] | None
    asking: bool = True


def written(asked: Iterator[Prefix], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each as the chat template writes it, in their order.

    Raises:
        SvdtuneError: if the template cannot write one of them.
    """
    while some := list(islice(asked, _TOGETHER)):
        kinds = [(prefix.asking, id(prefix.tools)) for prefix in some]  # one call has one value of each
        texts = {}
        for kind in dict.fromkeys(kinds):
            texts[kind] = iter(_write([some[at] for at, own in enumerate(kinds) if own == kind], tokenizer))
        yield from (next(texts[kind]) for kind in kinds)


def _write(some: Sequence[Prefix], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prefixes that ask alike and have the same tools, where it can be in one call."""
    _, _, tools, asking = some[0]
    chats = [prefix.messages for prefix in some]
    if len(some) > 1 and all(chats):  # Transformers refuses a chat without messages only where it is alone
        given: Any = {"tools": tools or None, "tokenize": False, "add_generation_prompt": asking}
        with suppress(Exception):  # one alone says what is wrong
            texts = [str(text) for text in tokenizer.apply_chat_template(chats, **given)]
            if not any(map(_has_python, chats, texts)):
                return texts
    return [write_chat(prefix.messages, tools, tokenizer, prefix.name, asking=asking) for prefix in some]


def chat_pieces(example: Example, texts: Iterator[str], end: str | None) -> list[tuple[str, bool]]:
    """Texts whose sum is the example's chat as the template writes it, each with whether it is an
    assistant's turn that is trained on; `texts` are those before and after each, `end` is the end
    token, which some templates write once more behind the whole chat.

    Raises:
        SvdtuneError: if the template writes a turn differently once others follow.
    """
    assert example.chat is not None
    name = example.name
    pieces: list[tuple[str, bool]] = []
    before = ""
    for at in example.chat.learnt:
        asked, answered = next(texts), next(texts)
        if end and before.endswith(end) and not asked.startswith(before) and asked.startswith(before.removesuffix(end)):
            before = before.removesuffix(end)
            pieces[-1] = pieces[-1][0].removesuffix(end), True
        if not answered.startswith(asked) and _is_plain(example):
            # It asks with more than it writes of the answer later, such as what opens its thoughts,
            # which the answer may open itself.
            opening = asked[_same(asked, answered) :]
            answer = example.completion.removeprefix(opening) if opening.strip() else example.completion
            return [(asked, False), (f"{answer}{end or ''}", True)]
        for longer, shorter in ((asked, before), (answered, asked)):
            if not longer.startswith(shorter):
                raise SvdtuneError(
                    f"{name}: the chat template writes what comes before the assistant's turn {at + 1} differently once "
                    f"the turn is there ({_tail(shorter, longer)!r}), so that nothing tells which tokens are the "
                    "assistant's. Give a template that only adds to what it wrote with `model.chat_template`, or train on "
                    "the last turn alone: one row for each, with a prompt and a completion"
                )
        pieces += [(asked[len(before) :], False), (answered[len(asked) :], True)]
        before = answered
    last, content = pieces[-1][0], str(example.chat.messages[-1].get("content", "")).strip()
    closing = last.partition(content)[2] if content else last  # what is written behind the last answer
    if end and closing.endswith(end) and closing.removesuffix(end).rstrip().endswith(end):
        pieces[-1] = last.removesuffix(end), True
    return pieces


def _is_plain(example: Example) -> bool:
    """Whether an example's chat is a prompt and one answer in words."""
    chat, tools = example.chat, example.tools
    assert chat is not None
    called = tools or any(_CALLS in turn for turn in chat.messages)
    one = chat.learnt == [len(chat.messages) - 1]
    return one and not called and chat.messages[-1].keys() <= {"role", "content", *MARKS}


def answer_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the chat template writes before an answer's own, such as an empty place for
    thoughts: a model learns to say them, and they are no part of what it answers."""
    if tokenizer.chat_template is None:
        return []
    asked, answer = [{"role": "user", "content": "?"}], "(answer)"
    with suppress(SvdtuneError):  # of a template that writes no such chat
        before = write_chat(asked, None, tokenizer, "a chat")
        whole = write_chat([*asked, {"role": "assistant", "content": answer}], None, tokenizer, "a chat", asking=False)
        opening, found, _ = whole.removeprefix(before).partition(answer)
        if found and whole.startswith(before):
            return list(tokenizer.encode(opening, add_special_tokens=False))
    return []


def write_chat(
    messages: Messages,
    tools: Sequence[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    asking: bool = True,
) -> str:
    """A chat as the template writes it, with what asks for the next turn where `asking`.

    Raises:
        SvdtuneError: if the template cannot write it.
    """
    given: Any = {"tools": tools or None, "tokenize": False, "add_generation_prompt": asking}
    try:
        text = str(tokenizer.apply_chat_template(messages, **given))
        if not _has_python(messages, text):
            return text
        return str(tokenizer.apply_chat_template(_with_json(messages), **given))
    except Exception as error:  # a template raises what it likes: its own words, or jinja's errors
        with suppress(Exception):
            if (other := _with_json(messages)) != messages:
                return str(tokenizer.apply_chat_template(other, **given))
        calls = any("tool_calls" in turn for turn in messages)
        raise SvdtuneError(
            f"{name}: the chat template refuses its first {len(messages)} messages: {error}. Give another template with "
            f"`model.chat_template`{' (this one may not know of tool calls)' if calls else ''}, or change the rows"
        ) from error


def _has_python(messages: Messages, text: str) -> bool:
    """Whether a text has the arguments of a call as Python writes them: its template takes text."""
    calls = (call.get("function") or call for turn in messages for call in turn.get(_CALLS) or ())
    written = {str(call["arguments"]) for call in calls if _is_object(call) and call["arguments"]}
    return any(text.count(one) > sum(str(turn.get("content")).count(one) for turn in messages) for one in written)


def _with_json(messages: Messages) -> Messages:
    """A chat with the arguments of calls as JSON in a text, which some templates take."""

    def call_with(call: Any) -> Any:
        if call.get("function"):
            return {**call, "function": call_with(call["function"])}
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} if _is_object(call) else call

    return [
        {**turn, _CALLS: [call_with(call) for call in turn[_CALLS]]} if turn.get(_CALLS) else turn for turn in messages
    ]


def _is_object(call: Mapping[str, Any]) -> bool:
    return isinstance(call.get("arguments"), Mapping)


def check_written(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the chat template writes all that the examples' chats hold: what each role
    says, what was thought, tools, and calls of them.

    A template passes over what it does not know, without a word, and a run would train on chats
    that lack it. The first chat that holds a kind of thing tells for all.

    Raises:
        SvdtuneError: naming what is left out.
    """
    known: set[Kind] = set()
    for example in examples:
        messages = example.asked if example.chat is None else example.chat.messages
        whole = None  # written once a chat, and only where it holds something new
        for kind, at in _held(messages, example.tools):
            if kind in known:
                continue
            known.add(kind)
            if whole is None:
                whole = write_chat(messages, example.tools, tokenizer, example.name, asking=False)
            if whole == _written_without(kind, at, messages, example, tokenizer):
                raise SvdtuneError(
                    f"{example.name}: the chat template leaves out {_in_words(kind)}, so that the model would learn "
                    "without. Give a template that writes all of a chat with `model.chat_template`, or change the rows"
                )


_TOOLS, _CALLS = "tools", "tool_calls"
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what a message may hold besides
Kind = tuple[str, str]  # a role and where it speaks, or what is not said: tools, and calls of them


def _held(messages: Messages, tools: Sequence[Any] | None) -> Iterator[tuple[Kind, int]]:
    """The kinds of things that a chat holds, each with the message that has it."""
    if tools:
        yield (_TOOLS, ""), 0
    for at, turn in enumerate(messages):
        if turn.get(_CALLS):
            yield (_CALLS, ""), at
        for thought in _THOUGHTS:
            if turn.get(thought) and at == len(messages) - 1:  # of earlier turns many leave it out
                yield (thought, ""), at
        if turn.get("content"):
            where = "beside a call of tools" if turn.get(_CALLS) else "after the first message" if at else "at first"
            yield (turn["role"], where), at


def _in_words(kind: Kind) -> str:
    called = {_TOOLS: "the tools that may be called", _CALLS: "the assistant's calls of tools"}
    called |= {name: f"what the assistant thought, {name!r}" for name in _THOUGHTS}
    return called.get(kind[0], f"what the role {kind[0]!r} says {kind[1]}")


def _written_without(
    kind: Kind, at: int, messages: Messages, example: Example, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """A chat without one of what it holds, or with other words in its place; None where the
    template refuses that, and so makes a difference."""
    turn, tools = messages[at], None if kind[0] == _TOOLS else example.tools
    if kind[0] == _CALLS:
        turn = {key: value for key, value in turn.items() if key != _CALLS}
    elif kind[0] in _THOUGHTS:
        thought = turn[kind[0]]  # which may stand under several names, of which a template writes one
        turn = {key: f"{value} x" if key in _THOUGHTS and value == thought else value for key, value in turn.items()}
    elif kind[0] != _TOOLS:
        turn = {**turn, "content": f"{turn['content']} x"}
    try:
        return write_chat([*messages[:at], turn, *messages[at + 1 :]], tools, tokenizer, example.name, asking=False)
    except SvdtuneError:
        return None


def _tail(shorter: str, longer: str) -> str:
    """What of the shorter text the longer one does not begin with, at most some 60 characters."""
    same = _same(shorter, longer)
    return shorter[same : same + 60]


def _same(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
