"""A chat's text in pieces, cut where an assistant's turn begins and ends, found with the chat
template itself.

The template writes the chat up to each turn, once with what asks for the turn and once with the
turn written. Each text must begin with the one before it: else what the model reads in training
would not be what it reads when it answers, and no mask could be right.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from svdtune.data.examples import Chat
from svdtune.errors import SvdtuneError


def chat_pieces(chat: Chat, tokenizer: PreTrainedTokenizerBase, name: str) -> list[tuple[str, bool]]:
    """Texts whose sum is the chat as the template writes it, each with whether it is an assistant's
    turn that is trained on.

    Raises:
        SvdtuneError: if the template cannot write the chat, or writes a turn differently once
            others follow.
    """
    pieces: list[tuple[str, bool]] = []
    written = ""
    for at in _learnt(chat):
        asked, answered = _write(chat, tokenizer, name, at, True), _write(chat, tokenizer, name, at + 1, False)
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


def _learnt(chat: Chat) -> Iterator[int]:
    """Indices of the turns that are trained on."""
    return (at for at, turn in enumerate(chat.messages) if turn["role"] == "assistant" and at >= chat.learn_from)


def _write(chat: Chat, tokenizer: PreTrainedTokenizerBase, name: str, count: int, asking: bool) -> str:
    """The first messages as the template writes them, perhaps with what asks for the next one."""
    given: Any = {"tools": chat.tools or None, "tokenize": False, "add_generation_prompt": asking}
    try:
        return str(tokenizer.apply_chat_template(chat.messages[:count], **given))
    except Exception as error:  # a template raises what it likes: its own words, or jinja's errors
        raise SvdtuneError(f"{name}: the chat template refuses its first {count} messages: {error}") from error


def _tail(shorter: str, longer: str) -> str:
    """What of the shorter text the longer one does not begin with, at most some 60 characters."""
    same = next((at for at, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    return shorter[same : same + 60]
