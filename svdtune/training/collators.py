"""How a run's rows become batches: side by side where the model keeps them apart, else padded.

Batches of several processes hold, step by step, the rows that one process has with the same global
batch. Where rows do not fill the last batches of an epoch, Accelerate gives rows from the epoch's
start once more. Here an empty row fills them up instead, one without labels: it adds nothing to the
loss and is counted by nobody.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from svdtune import processes
from svdtune.data.encoding import IGNORED, Collator
from svdtune.errors import SvdtuneError
from svdtune.training.packing import PackingCollator, keeps_rows_apart, padding_share
from svdtune.training.preparation import Prepared
from svdtune.training.recipe import Recipe
from svdtune.training.row_attention import attention_by_rows, kernel_fits

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_collator(
    model: Any, prepared: Prepared, recipe: Recipe, console: Console, attending: ExitStack
) -> PackingCollator | Collator:
    """The collator of a run of SFT.

    Args:
        model: adapted, on its device.
        prepared: the run's rows and tokenizer.
        recipe: the recipe.
        console: where a line says what padding costs.
        attending: what it enters while batches are made, where the model attends by rows.

    Raises:
        SvdtuneError: if rows are to lie side by side in a model that does not keep them apart.
    """
    wanted, pad = recipe.training.padding_free, prepared.loaded.tokenizer.pad_token_id
    must = wanted or recipe.training.packing
    # no process has a whole model to try
    spread = processes.under_deepspeed() or processes.under_fsdp()
    if (wanted is None or must) and not spread:
        length = recipe.data.max_length if recipe.training.packing else None
        if kernel_fits(model, AUTOCAST.get(recipe.training.precision)):
            with ExitStack() as trying:
                trying.enter_context(attention_by_rows(model))
                if keeps_rows_apart(model, flat=True):
                    attending.push(trying.pop_all())
                    return PackingCollator(pad, flat=True, length=length)
        flat = "flash" in str(getattr(model.config.get_text_config(), "_attn_implementation", None))
        if keeps_rows_apart(model, flat=flat):
            return PackingCollator(pad, flat=flat, length=length)
    if must:
        why = "under FSDP and DeepSpeed that cannot be tried" if spread else "this model does not keep them apart"
        name = "packing" if recipe.training.packing else "padding_free"
        raise SvdtuneError(
            f"training.{name}: true needs rows that cannot see each other, and {why}; leave it out, and rows are padded"
        )
    if wanted is None and (share := padding_share(prepared.train_rows, recipe.training.batch_size)) > 0.1:
        advice = "" if recipe.training.group_by_length else "; training.group_by_length: true makes it less"
        console.print(
            f"padding   this model does not keep rows apart that lie side by side: {share:.0%} of its work is "
            f"padding{advice}",
            highlight=False,
        )
    return Collator(pad)


Row = dict[str, Any]


class FilledRows(Dataset[Row]):
    """Rows, and behind the last of them one that is empty."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.empty: Row = {"input_ids": rows[0]["input_ids"][:1], "labels": [IGNORED]}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.empty if index == len(self.rows) else self.rows[index]


class FilledBatches:
    """A batch sampler's batches, filled up to whole ones, as many as `processes` divides."""

    def __init__(self, batches: Any, processes: int, empty: int):
        self.batches, self.processes, self.empty = batches, processes, empty
        self.batch_size, self.drop_last, self.sampler = batches.batch_size, False, batches.sampler

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batches)
        while group := list(islice(batches, self.processes)):
            for number in range(self.processes):
                batch = list(group[number]) if number < len(group) else []
                yield batch + [self.empty] * (self.batch_size - len(batch))


def fill_up(loader: DataLoader[Any]) -> None:
    """Make a loader that Accelerate shared out among processes end every epoch with empty rows."""
    shared = loader.batch_sampler
    if isinstance(shared, BatchSamplerShard) and isinstance(loader.dataset, FilledRows):
        shared.batch_sampler = FilledBatches(shared.batch_sampler, shared.num_processes, len(loader.dataset))
