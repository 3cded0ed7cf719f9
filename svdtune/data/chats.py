"""A chat's text in pieces, cut where an assistant's turn begins and ends, found with the chat
template itself.

The template writes the chat up to each turn, once with what asks for the turn and once with the
turn written. Each text must begin with the one before it: else what the model reads in training
would not be what it reads when it answers, and no mask could be right.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from svdtune.data.examples import Example, Messages
from svdtune.errors import SvdtuneError


def chat_pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Texts whose sum is the example's chat as the template writes it, each with whether it is an
    assistant's turn that is trained on.

    Raises:
        SvdtuneError: if the template cannot write the chat, or writes a turn differently once
            others follow.
    """
    assert example.chat is not None
    messages, name = example.chat.messages, example.name
    pieces: list[tuple[str, bool]] = []
    written = ""
    for at in example.chat.learnt:
        asked = write_chat(messages[:at], example.tools, tokenizer, name)
        answered = write_chat(messages[: at + 1], example.tools, tokenizer, name, asking=False)
        for longer, shorter in ((asked, written), (answered, asked)):
            if not longer.startswith(shorter):
                raise SvdtuneError(
                    f"{name}: the chat template writes what comes before the assistant's turn {at + 1} differently once "
                    f"the turn is there ({_tail(shorter, longer)!r}), so that nothing tells which tokens are the "
                    "assistant's. Give a template that only adds to what it wrote with `model.chat_template`, or train on "
                    "the last turn alone: one row for each, with a prompt and a completion"
                )
        pieces += [(asked[len(written) :], False), (answered[len(asked) :], True)]
        written = answered
    return pieces


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
        return str(tokenizer.apply_chat_template(messages, **given))
    except Exception as error:  # a template raises what it likes: its own words, or jinja's errors
        calls = any("tool_calls" in turn for turn in messages)
        raise SvdtuneError(
            f"{name}: the chat template refuses its first {len(messages)} messages: {error}. Give another template with "
            f"`model.chat_template`{' (this one may not know of tool calls)' if calls else ''}, or change the rows"
        ) from error


def check_written(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the chat template writes all that the examples' chats hold: what each role
    says, tools, and calls of them.

    A template passes over what it does not know, without a word, and a run would train on chats
    that lack it. The first chat that holds a kind of thing tells for all.

    Raises:
        SvdtuneError: naming what is left out.
    """
    known = {"user", "assistant"}  # without these no template is one
    for example in examples:
        messages = _messages(example)
        held = {str(turn["role"]) for turn in messages if turn.get("content")}
        held |= {_CALLS for turn in messages if turn.get(_CALLS)} | ({_TOOLS} if example.tools else set())
        for kind in sorted(held - known):
            known.add(kind)
            if _is_left_out(kind, messages, example, tokenizer):
                what = _CALLED.get(kind, f"what the role {kind!r} says")
                raise SvdtuneError(
                    f"{example.name}: the chat template leaves out {what}, so that the model would learn without. Give "
                    "a template that writes all of a chat with `model.chat_template`, or change the rows"
                )


_TOOLS, _CALLS = "tools", "tool_calls"
_CALLED = {_TOOLS: "the tools that may be called", _CALLS: "the assistant's calls of tools"}


def _messages(example: Example) -> Messages:
    if example.chat is not None:
        return example.chat.messages
    return [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt


def _is_left_out(kind: str, messages: Messages, example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat reads the same without one kind of what it holds, or with other words in a
    role's place."""
    if kind == _CALLS:
        other = [{key: value for key, value in turn.items() if key != _CALLS} for turn in messages]
    else:
        other = [{**turn, "content": f"{turn.get('content')} x"} if turn["role"] == kind else turn for turn in messages]
    whole = write_chat(messages, example.tools, tokenizer, example.name)
    try:
        return whole == write_chat(other, None if kind == _TOOLS else example.tools, tokenizer, example.name)
    except SvdtuneError:  # it makes a difference
        return False


def _tail(shorter: str, longer: str) -> str:
    """What of the shorter text the longer one does not begin with, at most some 60 characters."""
    same = next((at for at, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    return shorter[same : same + 60]
