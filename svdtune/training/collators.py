"""How a run's rows become batches: side by side where the model keeps them apart, else padded."""

from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from svdtune import processes
from svdtune.data.encoding import Collator
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
