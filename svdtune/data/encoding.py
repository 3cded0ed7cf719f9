"""Tokens and the loss mask: the prompt is masked, the response and its end token are trained on,
padding never is.

The mask is built from lengths, not from token ids, so that a padding token that is also the end
token does no harm. Prompt and completion are tokenized apart: generation then sees exactly the
prompt tokens that training saw.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from svdtune.data.chats import Prefix, chat_pieces, check_written, written
from svdtune.data.columns import Columns
from svdtune.data.cores import in_chunks
from svdtune.data.examples import Example, Messages
from svdtune.data.prompts import TEMPLATES, template_names
from svdtune.errors import SvdtuneError
from svdtune.registry import lab_note

IGNORED = -100  # the label that torch's cross entropy leaves out
PLAIN, CHAT = "plain", "chat"
Encoded = dict[str, list[int]]


@dataclass(frozen=True)
class _Piece:
    """A part of an example's text.

    Attributes:
        text: as it is tokenized.
        special: whether the tokenizer adds its own tokens, as to the start of a text.
        learnt: whether it is trained on.
        before: the text in front of it; empty where it begins one.
    """

    text: str
    special: bool = False
    learnt: bool = False
    before: str = ""


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, template: str = PLAIN) -> list[int]:
    """Tokens of the prompt, up to where the model has to go on.

    Args:
        example: messages always go through the chat template.
        tokenizer: with a chat template if that is asked for.
        template: "plain" (the prompt as it is), "chat" (as the user's message in the tokenizer's
            chat template), a name in `svdtune.data.prompts.TEMPLATES`, or a text with "{prompt}" in
            it, and perhaps "{eos}" for the end token.

    Raises:
        SvdtuneError: if a chat template is asked for and the tokenizer has none, or the template
            has no "{prompt}".
    """
    piece = _prompt(example, tokenizer, template, written(_asked(replace(example, chat=None), template), tokenizer))
    if written_turns(example, template) is not None:
        check_written([example], tokenizer)
    return _tokens([piece], tokenizer)[0]


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: str = "response",
    template: str = PLAIN,
) -> Encoded:
    """Return {"input_ids", "labels"} of one example: prompt, completion, end token.

    Of a chat with several turns, each of the assistant's is trained on up to its end token. The
    first token has no label: nothing comes before it that could predict it.

    Args:
        example: what to encode.
        tokenizer: its end token closes every example and is always trained on.
        max_length: the longest sequence allowed, in tokens.
        loss_on: "response" masks the prompt; "all" trains on it too.
        template: see `prompt_ids`.

    Raises:
        SvdtuneError: if the example does not fit: a cut response would teach the model to stop
            anywhere. If a chat template leaves open what the assistant says.
    """
    [row] = _rows([example], tokenizer, loss_on, template)
    _check_length(row, example, max_length)
    return row


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: str = "response",
    template: str = PLAIN,
    *,
    overlong: str = "error",
) -> tuple[Columns, int]:
    """Encode many examples on all cores, as `encode` does each; return them and the number of those
    that were too long.

    Args:
        examples: what to encode.
        tokenizer: as in `encode`, like `max_length`, `loss_on` and `template`.
        overlong: "error" refuses an example that does not fit, "drop" leaves it out, and "cut" cuts
            it off, end token included, as the papers' code does: it then teaches no end.

    Raises:
        SvdtuneError: as `encode`; with "drop" and "cut" only if no example is left.
    """
    work = partial(_encode_some, tokenizer, max_length, loss_on, template, overlong)
    parts = list(in_chunks(work, examples))
    overlong_count = sum(count for _, count in parts)
    encoded = Columns.join(rows for rows, _ in parts)
    if not encoded:
        raise SvdtuneError(f"no example is left: all {overlong_count} are longer than max_length = {max_length} tokens")
    return encoded, overlong_count


def _encode_some(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: str,
    template: str,
    overlong: str,
    examples: Sequence[Example],
) -> tuple[Columns, int]:
    encoded, overlong_count = [], 0
    for example, row in zip(examples, _rows(examples, tokenizer, loss_on, template), strict=True):
        if overlong == "error":
            _check_length(row, example, max_length)
        if len(row["input_ids"]) > max_length:
            overlong_count += 1
            row = {key: values[:max_length] for key, values in row.items()}
            # What is left must hold something to learn; where only the prompt fits, it does not.
            if overlong == "drop" or all(label == IGNORED for label in row["labels"]):
                continue
        encoded.append(row)
    return Columns.of(encoded), overlong_count


def _rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, loss_on: str, template: str
) -> list[Encoded]:
    if loss_on not in ("response", "all"):
        raise SvdtuneError(f"loss_on is {loss_on!r}; expected response or all")
    texts = written((prefix for example in examples for prefix in _asked(example, template)), tokenizer)
    pieces = [_pieces(example, tokenizer, template, texts) for example in examples]
    check_written((example for example in examples if written_turns(example, template) is not None), tokenizer)
    tokens = iter(_tokens([piece for one in pieces for piece in one], tokenizer))
    return [
        _row(example, [(piece, next(tokens)) for piece in one], tokenizer.eos_token_id, loss_on)
        for example, one in zip(examples, pieces, strict=True)
    ]


def _row(example: Example, parts: list[tuple[_Piece, list[int]]], end: int, loss_on: str) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    for piece, tokens in parts:
        learnt = 0
        if piece.learnt and example.chat is None:
            tokens = [*tokens, end]
            learnt = len(tokens)
        elif piece.learnt:
            learnt = _through_end(tokens, end, example)
            if piece is parts[-1][0]:
                tokens = tokens[:learnt]
        ids += tokens
        labels += tokens if loss_on == "all" else tokens[:learnt] + [IGNORED] * (len(tokens) - learnt)
    labels[0] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _through_end(tokens: list[int], end: int, example: Example) -> int:
    """How many tokens of an assistant's turn there are up to its end token, that included."""
    if end not in tokens:
        raise SvdtuneError(
            f"{example.name}: the chat template does not close an assistant's turn with the end token {end}, so that the "
            "model would not learn to stop; name the token that it writes there with `model.end_token`"
        )
    return len(tokens) - tokens[::-1].index(end)


def _check_length(row: Encoded, example: Example, max_length: int) -> None:
    size = len(row["input_ids"])
    if size <= max_length:
        return
    prompt = next(at for at, label in enumerate([*row["labels"], 0]) if label != IGNORED)
    if prompt >= max_length:
        raise SvdtuneError(
            f"{example.name}: the prompt is {prompt} tokens long, and max_length is {max_length}, so that no room is "
            f"left for a response; raise max_length (up to the model's context), or shorten or drop the row"
        )
    raise SvdtuneError(
        f"{example.name}: prompt and response are {prompt} + {size - prompt} tokens long, and max_length is "
        f"{max_length}; raise it, or leave such rows out with `data.overlong: drop`"
    )


def _asked(example: Example, template: str) -> Iterator[Prefix]:
    """What the chat template has to write of an example."""
    if example.chat is not None:
        for at in example.chat.learnt:
            yield Prefix(example.name, example.chat.messages[:at], example.tools)
            yield Prefix(example.name, example.chat.messages[: at + 1], example.tools, asking=False)
    elif (turns := written_turns(example, template)) is not None:
        yield Prefix(example.name, turns, example.tools)


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase, template: str, texts: Iterator[str]) -> list[_Piece]:
    """An example's pieces; `texts` begin with what the chat template has to write of it."""
    if example.chat is None:
        prompt = _prompt(example, tokenizer, template, texts)
        return [prompt, _Piece(example.completion, learnt=True, before=prompt.text)]
    _check_chat_template(tokenizer, example.name)
    pieces = chat_pieces(example, texts, tokenizer.eos_token)
    befores = ["", *(text for text, _ in pieces)]
    return [_Piece(text, learnt=learnt, before=before) for (text, learnt), before in zip(pieces, befores, strict=False)]


def written_turns(example: Example, template: str) -> Messages | None:
    """The prompt as messages, where the chat template writes it; None of a text that it does not.

    Args:
        example: its messages always go through the chat template.
        template: see `prompt_ids`.
    """
    return None if isinstance(example.prompt, str) and template != CHAT else example.asked


def _prompt(example: Example, tokenizer: PreTrainedTokenizerBase, template: str, texts: Iterator[str]) -> _Piece:
    if written_turns(example, template) is not None:
        _check_chat_template(tokenizer, example.name)
        return _Piece(next(texts))
    if example.tools:
        raise SvdtuneError(
            f"{example.name}: the row has tools, and the template {template!r} writes none; use `template: chat`, or take "
            "the column out"
        )
    form = "{prompt}" if template == PLAIN else TEMPLATES.get(template, template)
    if "{prompt}" not in form:
        raise SvdtuneError(
            f"the template {template!r} has no {{prompt}} in it; expected such a text, or one of "
            f"{', '.join(template_names())}{lab_note()}"
        )
    return _Piece(
        form.replace("{eos}", tokenizer.eos_token or "").replace("{prompt}", example.asked_text), special=True
    )


def _check_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.chat_template is None:
        raise SvdtuneError(f"{name}: the tokenizer has no chat template; use `template: plain` and text prompts")


def _tokens(pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each piece; a fast tokenizer's backend takes all texts of a kind at once."""
    found: list[list[int]] = [[]] * len(pieces)
    backend = _backend(tokenizer)
    for special in (False, True):
        places = [at for at, piece in enumerate(pieces) if piece.special == special]
        texts = [pieces[at].text for at in places]
        if backend is not None and len(texts) > 1:
            tokenizer(texts[0])  # sets the backend to cut and pad nothing, as for every text
            many = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=special)]  # no offsets
        else:
            many = [tokenizer.encode(text, add_special_tokens=special) for text in texts]
        for at, text, ids in zip(places, texts, many, strict=True):
            ended = special and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
            # some tokenizers close every text; the response is still to come
            found[at] = ids[:-1] if ended else ids
    _behind(pieces, found, tokenizer)
    return found


def _behind(pieces: Sequence[_Piece], tokens: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokens of pieces inside a text what they are there.

    Tokenizers of SentencePiece's kind put a space before every text, and would put one before each
    piece, which generation never sees. So a piece is read behind what ends the text before it: a
    token of its own, such as the end of a turn, or a line's end, which merges with nothing.
    """
    inside = [at for at, piece in enumerate(pieces) if piece.before and piece.text]
    if not inside:
        return
    alone = {text: tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "a", "\na")}
    if alone["\na"] == alone["\n"] + alone["a"]:
        return
    added = tuple(tokenizer.get_added_vocab())
    fronts = [_front(pieces[at].before, added) for at in inside]
    known = {front: tokenizer.encode(front, add_special_tokens=False) for front in dict.fromkeys(fronts)}
    texts = [_Piece(front + pieces[at].text) for at, front in zip(inside, fronts, strict=True)]
    for at, front, ids in zip(inside, fronts, _tokens(texts, tokenizer), strict=True):
        size = len(known[front])
        if ids[:size] == known[front]:
            tokens[at] = ids[size:]


def _front(before: str, added: tuple[str, ...]) -> str:
    """What a piece is read behind."""
    return max((token for token in added if before.endswith(token)), key=len) if before.endswith(added) else "\n"


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A fast tokenizer's backend; None of a class that makes more of a text, as Code Llama's."""
    calls = ("__call__", "encode", "_encode_plus", "_batch_encode_plus")  # the last in Transformers 4
    plain = all(getattr(type(tokenizer), name, 0) is getattr(PreTrainedTokenizerFast, name, 0) for name in calls)
    return tokenizer.backend_tokenizer if plain and isinstance(tokenizer, PreTrainedTokenizerFast) else None


def length_multiple() -> int:
    """What a batch's length is rounded up to: 8 for a GPU's tensor cores. A CPU would only compute
    the padding."""
    return 8 if torch.accelerator.is_available() else 1


@dataclass(frozen=True)
class Collator:
    """Pad a batch on the right to a common length, a multiple of `multiple_of`.

    Attributes:
        pad_id: fills `input_ids`; those places get attention 0 and the label -100.
        multiple_of: round the length up to a multiple of this.
    """

    pad_id: int
    multiple_of: int = field(default_factory=length_multiple)

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors of shape (batch, length): input_ids, attention_mask, labels."""
        longest = max(len(row["input_ids"]) for row in batch)
        length = -(-longest // self.multiple_of) * self.multiple_of

        def padded(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

        return {
            "input_ids": padded((row["input_ids"] for row in batch), self.pad_id),
            "attention_mask": padded(([1] * len(row["input_ids"]) for row in batch), 0),
            "labels": padded((row["labels"] for row in batch), IGNORED),
        }
