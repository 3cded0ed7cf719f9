"""Batched generation: prompts of similar length together, padded on the left, stopped at the end tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from svdtune.errors import SvdtuneError
from svdtune.evaluation.prompting import cache_where_peft_looks


@dataclass(frozen=True)
class Decoding:
    """How completions are found; the default is greedy, one completion a prompt.

    Attributes:
        samples: Completions of each prompt.
        temperature: Draw tokens at this temperature; 0 takes the likeliest.
        top_p: Draw from the fewest likeliest tokens that have this probability together.
        seed: A batch's random numbers depend on it and on nothing else that an interruption could change.
        beams: Keep so many beginnings and take the likeliest whole, instead of the likeliest token at each step.
        length_penalty: Of beam search: log-likelihoods are divided by length to this power.
        no_repeat_ngram_size: No n-gram of this size occurs twice, prompt included; 0 for no such rule.

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

    def __post_init__(self) -> None:
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


GREEDY = Decoding()
_ROUND = 64  # new tokens before a batch first lets go of what has ended


class Completion(NamedTuple):
    """New token ids without the end token, and whether an end token came before the length limit."""

    tokens: list[int]
    ended: bool


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those of the model's generation config and the tokenizer's own.

    Raises:
        SvdtuneError: If neither names one: generation would then only ever stop at its length limit.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    ends = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not ends:
        raise SvdtuneError(
            "neither the tokenizer nor the model's generation config names an end token, so nothing would stop "
            "generation; set tokenizer.eos_token and model.generation_config.eos_token_id to the same token"
        )
    return ends


def context_length(model: PreTrainedModel) -> int | None:
    """Positions the model was built for, None where its config does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def plan_batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group indices of `prompts` by length, the longest first.

    Similar lengths waste little padding, and starting with the longest makes a lack of memory show at once. The plan
    depends on nothing but the prompts and `batch_size`, so an interrupted evaluation continues with the same batches.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@contextmanager
def sole_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Make `config` the model's only generation settings for a while.

    `generate` fills whatever a given config leaves open from the model's own, so a checkpoint that asks for a
    repetition penalty would get one, and the result would not be greedy or a plain sample.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
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
) -> list[Completion]:
    """Continue each prompt as `decoding` says, until an end token or `max_new_tokens`.

    Args:
        model: A causal language model, in evaluation mode.
        prompts: Token ids, one list of any length ≥ 1 a prompt.
        max_new_tokens: Limit of new tokens for each.
        ends: Token ids that end a completion.
        pad: Token id to pad with; masked out, so any valid id does.
        streamer: Is given the tokens of a single prompt as they come.
        decoding: How tokens are chosen.
        seed: Of the tokens drawn for this batch; the caller's random numbers are left as they were.

    Returns:
        One completion a prompt, in the given order.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    # top_k=0: no limit that was not asked for; Transformers' own default is the 50 likeliest.
    drawing = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.temperature else {}
    beams = {"length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}
    config = GenerationConfig(
        do_sample=bool(drawing),
        **drawing,
        num_beams=decoding.beams,
        **beams,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
    )
    device = model.get_input_embeddings().weight.device
    cuda = [device] if device.type == "cuda" else []
    drawn_apart = torch.random.fork_rng(cuda, enabled=bool(drawing))
    with sole_config(model, config), cache_where_peft_looks(model), drawn_apart:
        if drawing:
            torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=streamer
        )
    return [until_end(row, set(ends)) for row in output[:, width:].tolist()]


def complete_in_rounds(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    decoding: Decoding = GREEDY,
    seed: int = 0,
) -> list[Completion]:
    """`complete_batch`, where greedy completions leave the batch once they have ended.

    A batch otherwise computes all its rows until the last one ends, or to the limit where a single one never does. Here it
    stops after 64 tokens, 128, 256 and so on, and goes on with the rows that have not ended; reading their tokens again costs
    one pass. What is drawn, or searched for with beams, runs in one go.

    Args and returns as `complete_batch`; in half precision a near tie between two tokens may fall the other way.
    """
    if decoding.temperature or decoding.beams > 1:
        return complete_batch(model, prompts, max_new_tokens, ends, pad, decoding=decoding, seed=seed)
    done: dict[int, Completion] = {}
    so_far: list[list[int]] = [[] for _ in prompts]
    taken = 0
    while open_rows := [row for row in range(len(prompts)) if row not in done]:
        limit = min(max_new_tokens, max(_ROUND, 2 * taken))
        continued = [[*prompts[row], *so_far[row]] for row in open_rows]
        found = complete_batch(model, continued, limit - taken, ends, pad, decoding=decoding, seed=seed)
        for row, completion in zip(open_rows, found, strict=True):
            so_far[row] += completion.tokens
            if completion.ended or limit == max_new_tokens:
                done[row] = Completion(so_far[row], completion.ended)
        taken = limit
    return [done[row] for row in range(len(prompts))]


def until_end(tokens: list[int], ends: set[int]) -> Completion:
    """Cut new tokens at the first end token."""
    for position, token in enumerate(tokens):
        if token in ends:
            return Completion(tokens[:position], ended=True)
    return Completion(tokens, ended=False)
