"""Tokens and the loss mask: the prompt is masked, the response and its end token are trained on,
padding never is.

The mask is built from lengths, not from token ids, so that a padding token that is also the end
token does no harm. Prompt and completion are tokenized apart: generation then sees exactly the
prompt tokens that training saw.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from svdtune.data.examples import Example
from svdtune.data.prompts import TEMPLATES, template_names
from svdtune.errors import SvdtuneError
from svdtune.registry import lab_note

IGNORED = -100  # the label that torch's cross entropy leaves out
PLAIN, CHAT = "plain", "chat"
_NO_LIMIT = 1 << 60


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
    if template == CHAT or not isinstance(example.prompt, str):
        if tokenizer.chat_template is None:
            raise SvdtuneError(
                f"{example.name}: the tokenizer has no chat template; use `template: plain` and text prompts"
            )
        turns = example.prompt if isinstance(example.prompt, list) else [{"role": "user", "content": example.prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    form = "{prompt}" if template == PLAIN else TEMPLATES.get(template, template)
    if "{prompt}" not in form:
        raise SvdtuneError(
            f"the template {template!r} has no {{prompt}} in it; expected such a text, or one of "
            f"{', '.join(template_names())}{lab_note()}"
        )
    text = form.replace("{eos}", tokenizer.eos_token or "").replace("{prompt}", example.prompt)
    ids = tokenizer.encode(text)
    ended = len(ids) > 0 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    # some tokenizers close every text; the response is still to come
    return ids[:-1] if ended else ids


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: str = "response",
    template: str = PLAIN,
) -> dict[str, list[int]]:
    """Return {"input_ids", "labels"} of one example: prompt, completion, end token.

    Args:
        example: what to encode.
        tokenizer: its end token closes every example and is always trained on.
        max_length: the longest sequence allowed, in tokens.
        loss_on: "response" masks the prompt; "all" trains on it too.
        template: see `prompt_ids`.

    Raises:
        SvdtuneError: if the example does not fit: a cut response would teach the model to stop
            anywhere.
    """
    if loss_on not in ("response", "all"):
        raise SvdtuneError(f"loss_on is {loss_on!r}; expected response or all")
    prompt = prompt_ids(example, tokenizer, template)
    response = [*tokenizer.encode(example.completion, add_special_tokens=False), tokenizer.eos_token_id]
    if len(prompt) >= max_length:
        raise SvdtuneError(
            f"{example.name}: the prompt is {len(prompt)} tokens long, and max_length is {max_length}, so that no room is "
            f"left for a response; raise max_length (up to the model's context), or shorten or drop the row"
        )
    if len(prompt) + len(response) > max_length:
        raise SvdtuneError(
            f"{example.name}: prompt and response are {len(prompt)} + {len(response)} tokens long, and max_length is "
            f"{max_length}; raise it, or leave such rows out with `data.overlong: drop`"
        )
    masked = [IGNORED] * len(prompt) if loss_on == "response" else prompt
    return {"input_ids": prompt + response, "labels": masked + response}


def encode_all(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: str = "response",
    template: str = PLAIN,
    *,
    overlong: str = "error",
) -> tuple[list[dict[str, list[int]]], int]:
    """Encode many examples; return them and the number of those that were too long.

    Args:
        examples: what to encode.
        tokenizer: as in `encode`, like `max_length`, `loss_on` and `template`.
        overlong: "error" refuses an example that does not fit, "drop" leaves it out, and "cut" cuts
            it off, end token included, as the papers' code does: it then teaches no end.

    Raises:
        SvdtuneError: as `encode`; with "drop" and "cut" only if no example is left.
    """
    encoded, overlong_count = [], 0
    for example in examples:
        limit = max_length if overlong == "error" else _NO_LIMIT
        row = encode(example, tokenizer, limit, loss_on, template)
        if len(row["input_ids"]) > max_length:
            overlong_count += 1
            row = {key: values[:max_length] for key, values in row.items()}
            # What is left must hold something to learn; where only the prompt fits, it does not.
            if overlong == "drop" or all(label == IGNORED for label in row["labels"]):
                continue
        encoded.append(row)
    if not encoded:
        raise SvdtuneError(f"no example is left: all {overlong_count} are longer than max_length = {max_length} tokens")
    return encoded, overlong_count


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

    def __call__(self, batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
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
