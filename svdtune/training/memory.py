"""What to change in a recipe whose run does not fit into memory, with numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svdtune.errors import SvdtuneError
from svdtune.system import is_out_of_memory
from svdtune.training.recipe import Recipe


@contextmanager
def explain_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """Turn running out of the GPU's or the host's memory into one SvdtuneError that says what to
    set."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SvdtuneError(out_of_memory_message(recipe, _measured(error))) from error


def out_of_memory_message(recipe: Recipe, measured: str = "") -> str:
    """The message: what was asked for, and the settings that take less, the ones that change least
    first."""
    training, options = recipe.training, recipe.method.options
    longest = recipe.data.max_length
    at = f"batch_size {training.batch_size} and rows of up to {longest} tokens"
    ways = []
    if training.batch_size > 1:
        size = training.batch_size // 2
        accumulation = -(-training.batch_size * training.gradient_accumulation // size)
        same = (
            "the same rows a step"
            if size * accumulation == training.batch_size * training.gradient_accumulation
            else ""
        )
        ways.append(
            f"--training.batch_size {size} --training.gradient_accumulation {accumulation}"
            + (f" ({same})" if same else "")
        )
    if not training.gradient_checkpointing:
        ways.append("--training.gradient_checkpointing true (the same losses, slower)")
    if recipe.model.dtype in ("auto", "float32") and recipe.method.name != "full":
        ways.append("--model.dtype bfloat16 (half the base model's float32)")
    if longest > 64:
        ways.append(f"--data.max_length {longest // 2} --data.overlong drop")
    if isinstance(rank := options.get("r"), int) and rank > 1:
        ways.append(f"--method.r {rank // 2}")
    lines = [f"  {way}" for way in ways] or ["  a smaller model, or a machine with more memory"]
    return "\n".join([f"out of memory{measured} at {at}. What takes less, to be tried in this order:", *lines])


def _measured(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        peak, total = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.mem_get_info()[1] / 2**30
        return f" on the GPU ({peak:.1f} GiB in use at most, of {total:.1f} GiB)"
    return " on the GPU" if isinstance(error, torch.OutOfMemoryError) else ""
