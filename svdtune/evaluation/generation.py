"""Batched generation: prompts of similar length together, padded on the left, stopped at the end
tokens.

Greedy completions are generated in rounds. Between two rounds a batch lets go of the completions
that are finished, and keeps the keys and values of the others.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from svdtune.errors import SvdtuneError
from svdtune.evaluation.prompt_methods import cache_where_peft_looks, is_prompted
from svdtune.models.loader import input_device

_SEEDS = 2**32  # every item's own seed is a multiple of it, in 64 bits


@dataclass(frozen=True)
class Decoding:
    """How completions are found; the default is greedy, one completion a prompt.

    Attributes:
        samples: Completions of each prompt.
        temperature: Draw tokens at this temperature; 0 takes the likeliest.
        top_p: Draw from the fewest likeliest tokens that have this probability together.
        seed: A batch's random numbers depend on it and on nothing else that an interruption could
            change.
        beams: Keep so many beginnings and take the likeliest whole, instead of the likeliest token
            at each step.
        length_penalty: Of beam search: log-likelihoods are divided by length to this power.
        no_repeat_ngram_size: No n-gram of this size occurs twice, prompt included; 0 for no such
            rule.
        stop_loops: Of greedy decoding: cut a completion that repeats itself (see `is_loop`), before
            the length limit does.

    Raises:
        SvdtuneError: If a value is out of its range, or two of them contradict each other.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop_loops: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "length_penalty"):
            if not math.isfinite(value := getattr(self, name)):
                raise SvdtuneError(f"{name} is {value}; expected a finite number")
        if self.seed >= _SEEDS:
            raise SvdtuneError(f"the seed is {self.seed}; expected one from 0 to {_SEEDS - 1}")
        if min(self.samples, self.beams) < 1 or min(self.temperature, self.no_repeat_ngram_size, self.seed) < 0:
            raise SvdtuneError(f"expected samples and beams of at least 1 and nothing below 0, got {self}")
        if not 0 < self.top_p <= 1:
            raise SvdtuneError(f"expected top_p above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise SvdtuneError(f"got {self}: without a temperature above 0 all completions of a prompt are the same")
        if self.beams > 1 and self.temperature > 0:
            raise SvdtuneError(f"got {self}: beam search draws nothing; leave out the beams or the temperature")
        if self.beams == 1 and self.length_penalty != 1:
            raise SvdtuneError(f"got {self}: a length penalty is for beam search; set beams above 1")
        if self.stop_loops and not self.greedy:
            raise SvdtuneError(
                f"got {self}: loops are stopped in greedy decoding alone; leave out stop_loops or the rest"
            )

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.temperature == 0 and self.beams == 1


GREEDY = Decoding()
_ROUND = 16  # new tokens between two looks at which completions are finished
_REREAD = 64  # as many, at first, where the tokens so far must be read again after each look
# how often a cycle of tokens has come, and how many tokens that were, when it is a loop
_CYCLES, _LOOP = 3, 32


class Completion(NamedTuple):
    """New token ids without the end token, and whether an end token came: before the length limit,
    or before a loop."""

    tokens: list[int]
    ended: bool


def end_token_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those of a model's generation config and the tokenizer's
    own.

    Raises:
        SvdtuneError: If neither names one: generation would then only ever stop at its length
            limit.
    """
    configured = getattr(config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    ends = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not ends:
        raise SvdtuneError(
            "neither the tokenizer nor the model's generation config names an end token, so nothing would stop "
            "generation; set tokenizer.eos_token and model.generation_config.eos_token_id to the same token"
        )
    return ends


def plan_batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group indices of `prompts` by length, the longest first.

    Similar lengths waste little padding, and starting with the longest makes a lack of memory show
    at once. The plan depends on nothing but the prompts and `batch_size`, so an interrupted
    evaluation continues with the same batches.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@contextmanager
def sole_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Make `config` the model's only generation settings for a while.

    `generate` fills whatever a given config leaves open from the model's own, so a checkpoint that
    asks for a repetition penalty would get one, and the result would not be greedy or a plain
    sample.
    """
    owners: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, kept, strict=True):
            owner.generation_config = own


@torch.inference_mode()
def complete_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    streamer: BaseStreamer | None = None,
    decoding: Decoding = GREEDY,
    seed: int = 0,
    in_rounds: bool = False,
) -> list[Completion]:
    """Continue each prompt as `decoding` says, until an end token or `max_new_tokens`.

    A batch computes all its rows until the last one ends, or to the limit where a single one never
    does. In rounds it stops after every 16 tokens and goes on with the rows that have not ended,
    nor fallen into a loop where `decoding.stop_loops`. Their keys and values are kept. Some caches
    hold something else: those of sliding windows, of state-space models and of PEFT's prompt
    methods. There the tokens are read again, after 64 tokens, 128, 256 and so on. In half precision
    a near tie between two tokens may then fall the other way.

    Args:
        model: A causal language model, in evaluation mode.
        prompts: Token ids, one list of any length ≥ 1 a prompt.
        max_new_tokens: Limit of new tokens for each.
        ends: Token ids that end a completion.
        pad: Token id to pad with; masked out, so any valid id does.
        streamer: Is given the tokens of a single prompt as they come.
        decoding: How tokens are chosen.
        seed: Of the tokens drawn for this batch; the caller's random numbers are left as they were.
        in_rounds: Whether greedy completions leave the batch once they are finished. What is drawn,
            or searched for with beams, runs in one go.

    Returns:
        One completion a prompt, in the given order.
    """
    ids, mask = _pad_left(prompts, pad, model)
    cuda = [ids.device] if ids.device.type == "cuda" else []
    generate: Any = model.generate
    width, taken = ids.shape[1], 0
    kept: dict[str, Any] = {}
    rows, done = list(range(len(prompts))), {}
    while rows:
        limit = max_new_tokens
        if in_rounds and decoding.greedy:
            limit = min(limit, taken + _ROUND if kept or not taken else max(_REREAD, 2 * taken))
        config = _configure(decoding, limit - taken, ends, pad)
        drawn_apart = torch.random.fork_rng(cuda, enabled=config.do_sample)
        with sole_config(model, config), cache_where_peft_looks(model), drawn_apart:
            if config.do_sample:
                torch.manual_seed(seed)
            output = generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer, **kept)
        found = [until_end(row, set(ends)) for row in output.sequences[:, width:].tolist()]
        going = []
        for place, (row, completion) in enumerate(zip(rows, found, strict=True)):
            if completion.ended or limit == max_new_tokens or (decoding.stop_loops and is_loop(completion.tokens)):
                done[row] = completion
            else:
                going.append(place)
        rows = [rows[place] for place in going]
        if rows:
            chosen = torch.tensor(going, dtype=torch.long, device=ids.device)
            ids, taken = output.sequences[chosen], limit
            kept = {} if is_prompted(model) else _kept(output, chosen)
            mask = torch.cat([mask[chosen], mask.new_ones(len(going), ids.shape[1] - mask.shape[1])], dim=1)
    return [done[row] for row in range(len(prompts))]


@torch.inference_mode()
def reads_padding(model: PreTrainedModel) -> bool:
    """Whether the model takes padding on the left for tokens, whatever the attention mask says, as
    the recurrence of RWKV does: whether the logits of one token change with what the mask hides."""
    hidden = torch.arange(8, device=input_device(model)).view(2, 4)
    ids = torch.nn.functional.pad(hidden, (0, 1), value=1)
    mask = torch.zeros_like(ids)
    mask[:, -1] = 1
    one, other = model(input_ids=ids, attention_mask=mask).logits[:, -1].float()
    return bool((one - other).norm() > 1e-2 * one.norm())


def _pad_left(prompts: Sequence[Sequence[int]], pad: int, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (prompts, longest), where the model takes them."""
    # Transformers 4 loses tokens of prompts that are shorter than these models' convolution.
    least = model.config.conv_kernel if model.config.model_type in ("mamba", "falcon_mamba") else 1
    width = max(least, *map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = input_device(model)
    return ids.to(device), mask.to(device)


def _configure(decoding: Decoding, max_new_tokens: int, ends: Sequence[int], pad: int) -> GenerationConfig:
    """What `generate` shall do."""
    # top_k=0: no limit that was not asked for; Transformers' own default is the 50 likeliest.
    drawing = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.temperature else {}
    beams = {"length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}
    return GenerationConfig(
        do_sample=bool(drawing),
        **drawing,
        num_beams=decoding.beams,
        **beams,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        use_cache=True,
        return_dict_in_generate=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
    )


def _kept(output: Any, rows: Tensor) -> dict[str, Cache]:
    """The cache of some rows, under the name that `generate` gave and takes it by, which differs
    between releases.

    Empty where a layer of it holds something else than the keys and values of every token:
    selecting rows of that is not certain to select all of it.
    """
    for name, cache in output.items():
        if isinstance(cache, Cache) and all(type(layer) is DynamicLayer for layer in cache.layers):
            cache.batch_select_indices(rows)
            return {name: cache}
    return {}


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether a completion repeats itself: its last 32 tokens or more are one cycle of tokens,
    three times over or more.

    Greedy decoding hardly ever leaves such a loop, and what it says of an answer it has said three
    times.
    """
    size = len(tokens)
    for cycle in range(1, size // _CYCLES + 1):
        looked_at = max(_LOOP, _CYCLES * cycle)
        if tokens[-1] == tokens[-1 - cycle] and looked_at <= size:
            tail = tokens[size - looked_at :]
            if tail[cycle:] == tail[:-cycle]:
                return True
    return False


def until_end(tokens: list[int], ends: set[int]) -> Completion:
    """Cut new tokens at the first end token."""
    for position, token in enumerate(tokens):
        if token in ends:
            return Completion(tokens[:position], ended=True)
    return Completion(tokens, ended=False)
