"""Rows of a batch side by side instead of one above the other, so that almost nothing is padding.

The step stays the same: the same rows, the same loss and gradients to rounding. A row's positions
start at 0, by which Transformers tells where one ends (its mask for SDPA and FlexAttention, the
lengths for flash attention), so no token sees another row. Whether that holds for a model is not
taken from a list of models; `keeps_rows_apart` tries it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from svdtune.data.encoding import IGNORED, Collator, length_multiple
from svdtune.data.preferences import token_counts
from svdtune.errors import SvdtuneError

ROW_LENGTHS = "seq_lengths"  # TRL's column of a packed row: how long each of its examples is
TOKENS = "tokens"  # how many tokens of a batch are no padding
# ‖difference‖ / ‖logits‖ that rounding explains at least. What another row adds is far larger.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDED = 3e-2  # of 16-bit weights
_TIMES_ROUNDING, _MOST = 8, 0.3  # of the rounding that a model shows; where rows mix, it is above 1


@dataclass(frozen=True)
class PackingCollator:
    """Put the rows of a batch into as few sequences as the longest of them allows.

    Attributes:
        pad_id: fills `input_ids`; those places have the label -100.
        flat: make one sequence of them all, and tell where its rows begin, which is what flash
            attention and `attention_by_rows` take.
        multiple_of: round the length up to a multiple of this, as `Collator` does.
        length: of every sequence, where rows are packed already, one a sequence; all full batches
            then have one shape.
    """

    pad_id: int
    flat: bool = False
    multiple_of: int = field(default_factory=length_multiple)
    length: int | None = None

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return int64 tensors of shape (sequences, length): input_ids, labels and position_ids;
        that no cache is used; the number of tokens; and with `flat`, by the names of Transformers,
        int32 (rows + 1), where rows begin, and the length of the longest.

        A batch that fills as many sequences as it has rows comes out as from `Collator`: with an
        attention mask and no position ids, for which attention is fastest.
        """
        lengths = [len(row["input_ids"]) for row in batch]
        packed = any(ROW_LENGTHS in row for row in batch)
        if self.flat:
            bins = [list(range(len(batch)))]
        else:
            bins = [[at] for at in range(len(batch))] if self.length else best_fit(lengths, max(lengths))
        if not packed and len(bins) == len(batch):
            return {**Collator(self.pad_id, self.multiple_of)(batch), TOKENS: torch.tensor(sum(lengths))}
        longest = max(sum(lengths[at] for at in members) for members in bins)
        wanted = longest if self.length is None else self.length * (len(batch) if self.flat else 1)
        length = -(-wanted // self.multiple_of) * self.multiple_of
        ids = torch.full((len(bins), length), self.pad_id)
        labels = torch.full((len(bins), length), IGNORED)
        positions = torch.zeros((len(bins), length), dtype=torch.long)  # padding: rows of one token
        starts: list[int] = []
        for line, members in enumerate(bins):
            start = 0
            for at in members:
                row, end = batch[at], start + lengths[at]
                ids[line, start:end] = torch.as_tensor(row["input_ids"])
                labels[line, start:end] = torch.as_tensor(row["labels"])
                for size in row.get(ROW_LENGTHS) or [lengths[at]]:
                    positions[line, start : start + size] = torch.arange(size)
                    labels[line, start] = IGNORED  # nothing before it could predict it
                    starts.append(start)
                    start += size
                assert start == end
        # With a cache, Transformers takes a line for one row.
        apart: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        if self.flat:
            apart |= _row_bounds(starts, sum(lengths), length, self.length)
        return {"input_ids": ids, "labels": labels, **apart, TOKENS: torch.tensor(sum(lengths))}


def _row_bounds(starts: Sequence[int], tokens: int, length: int, longest: int | None) -> dict[str, Any]:
    """Where rows of one sequence begin, as Transformers hands it to attention; padding is a row,
    or several where no row is longer than `longest`."""
    padding = range(tokens, length, longest or length)
    bounds = torch.tensor([*starts, *padding, length], dtype=torch.int32).sort().values
    longest = longest or int(bounds.diff().max())
    return {f"cu_seq_lens_{side}": bounds for side in "qk"} | {f"max_length_{side}": longest for side in "qk"}


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sums are at most `capacity`: the longest first, each
    into the fullest group that has room for it.

    Groups are in the order of their first members, and members in the order of the batch, so that
    a batch without short rows keeps its order.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [group for group, left in enumerate(room) if left >= lengths[at]]
        if fitting:
            chosen = min(fitting, key=room.__getitem__)
            groups[chosen].append(at)
            room[chosen] -= lengths[at]
        else:
            groups.append([at])
            room.append(capacity - lengths[at])
    return sorted(sorted(group) for group in groups)


def padding_share(rows: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """The share of padding in batches of rows in their order, each as long as its longest row."""
    lengths = token_counts(rows)
    batches = [lengths[at : at + batch_size] for at in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


@torch.no_grad()
def keeps_rows_apart(model: Any, *, flat: bool = False) -> bool:
    """Whether the model's outputs of a row stay the same when another one lies before it.

    Tried with two rows of random tokens: the second row must not change when the first one does,
    and must give what it gives alone, to rounding. Deep and wide models in 16 bits round more than
    others, so their rounding is measured: by how much a row changes when tokens follow it.

    Args:
        model: a causal language model, with or without an adapter, whole on one device.
        flat: as `PackingCollator` has it.
    """
    draw = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().weight
    size = min(int(model.config.get_text_config().vocab_size), 1000)
    first, other = (torch.randint(size, (7,), generator=draw).tolist() for _ in range(2))
    second = torch.randint(size, (9,), generator=draw).tolist()
    # as long as both: they share a line
    filler = torch.randint(size, (16,), generator=draw).tolist()
    training = model.training
    model.eval()
    try:
        pack = PackingCollator(0, flat=flat, multiple_of=1)
        alone, followed = (
            model(input_ids=torch.tensor([ids], device=words.device)).logits[0, : len(second)].float()
            for ids in (second, second + filler + first)
        )
        results = []
        for before in (first, other):
            batch = pack([{"input_ids": ids, "labels": ids} for ids in (filler, before, second)])
            del batch[TOKENS], batch["labels"]
            inputs = {name: x.to(words.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
            results.append(model(**inputs).logits.reshape(-1, alone.shape[-1])[23:].float())
    except (TypeError, ValueError, SvdtuneError):  # it takes no position ids, or none without a mask
        return False
    finally:
        model.train(training)
    least, norm = _TOLERANCE.get(words.dtype, _ROUNDED), float(alone.norm())
    rounding = min(_TIMES_ROUNDING * float((followed - alone).norm()), _MOST * norm)
    far = max(float((found - alone).norm()) for found in results)
    return float((results[0] - results[1]).norm()) <= least * norm and far <= max(least * norm, rounding)
