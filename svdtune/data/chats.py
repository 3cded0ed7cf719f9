"""A chat's text in pieces, cut where an assistant's turn begins and ends, found with the chat
template itself.

The template writes the chat up to each turn, once with what asks for the turn and once with the
turn written. Each text must begin with the one before it: else what the model reads in training
would not be what it reads when it answers, and no mask could be right. Where the template's syntax
shows that it does not look ahead (`svdtune.data.turns`), one writing of the chat holds them all.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from svdtune.data.examples import Chat, Messages
from svdtune.data.turns import MARK, marked
from svdtune.errors import SvdtuneError

# What a tokenizer's template writes behind the messages, without and with what asks for a turn; by
# the template and the special tokens that it was given.
_Endings = dict[tuple[Any, ...], tuple[str, str]]
_endings: WeakKeyDictionary[PreTrainedTokenizerBase, _Endings] = WeakKeyDictionary()


def chat_pieces(chat: Chat, tokenizer: PreTrainedTokenizerBase, name: str) -> list[tuple[str, bool]]:
    """Texts whose sum is the chat as the template writes it, each with whether it is an assistant's
    turn that is trained on.

    Raises:
        SvdtuneError: if the template cannot write the chat, or writes a turn differently once
            others follow.
    """
    pieces: list[tuple[str, bool]] = []
    written = ""
    write = _parts(chat, tokenizer) or partial(_write, chat, tokenizer, name)
    for at in _learnt(chat):
        asked, answered = write(at, True), write(at + 1, False)
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


def _parts(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Callable[[int, bool], str] | None:
    """What `_write` gives for this chat, from one writing of it; None where that is not sure."""
    tools: Any = chat.tools or None
    try:
        template = tokenizer.get_chat_template(None, tools)
        found = marked(template)
        if found is None or any(turn["role"] in found.roles for turn in chat.messages):
            return None
        texts = _rendered(chat.messages, found.template, tokenizer, tools, False).split(MARK)
        key = template, *sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
        endings = _endings.setdefault(tokenizer, {})
        if key not in endings:
            asking = _rendered(chat.messages, found.template, tokenizer, tools, True)
            endings[key] = texts[-1], asking.rpartition(MARK)[2]
        ending = endings[key]
    except Exception:  # it is written again, which says what is wrong
        return None
    first = len(chat.messages) - (len(texts) - 2)  # before it are messages that are written otherwise
    if first < 0:
        return None
    whole = "".join(texts[:-1])
    ends = list(accumulate(map(len, texts[:-1])))

    def write(count: int, asking: bool) -> str:
        return whole[: ends[count - first]] + ending[asking]

    return write if first < next(_learnt(chat)) else None


def _write(chat: Chat, tokenizer: PreTrainedTokenizerBase, name: str, count: int, asking: bool) -> str:
    try:
        return _rendered(chat.messages[:count], None, tokenizer, chat.tools or None, asking)
    except Exception as error:  # a template raises what it likes: its own words, or jinja's errors
        raise SvdtuneError(f"{name}: the chat template refuses its first {count} messages: {error}") from error


def _rendered(
    messages: Messages, template: str | None, tokenizer: PreTrainedTokenizerBase, tools: Any, asking: bool
) -> str:
    text = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=asking
    )
    assert isinstance(text, str)
    return text


def _tail(shorter: str, longer: str) -> str:
    """What of the shorter text the longer one does not begin with, at most some 60 characters."""
    same = next((at for at, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    return shorter[same : same + 60]
