"""A model's repeated blocks run through `torch.compile` while a run trains, and the advice to do
so where a GPU waits for launches.

A block is compiled, not the model: all blocks share one graph (the first has one of its own, since
its input needs no gradient), so it takes about as long for 80 blocks as for two, and no module
changes its name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from svdtune import processes
from svdtune.methods.compute.together import SMALL_LAYER
from svdtune.training.recipe import Recipe

ENOUGH_STEPS = 600
"""Steps from which `auto` compiles. At 1.1B shapes it takes SORSA 30 s, and a step of 8,192 tokens
0.05 s less (docs/performance.md); SARA and LoRA gain more."""

LIGER_BESIDE = dict.fromkeys(("rope", "rms_norm", "layer_norm", "swiglu", "geglu"), False)
"""Liger's kernels that compiled blocks do without: the compiler fuses more than they do."""

ROW_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")


def compiles(recipe: Recipe, steps: int) -> bool:
    """Whether a run compiles its blocks: where the recipe says so, and with `auto` where that pays
    and every batch has one shape: on a GPU, packed, whole in one process. A quantized model's
    blocks are compiled like others; where the compiler cannot take a layer in, it goes around it.
    """
    t = recipe.training
    if t.compile != "auto":
        return bool(t.compile)
    whole = not processes.under_deepspeed() and not processes.under_fsdp()
    return t.packing and torch.cuda.is_available() and whole and steps >= ENOUGH_STEPS


@contextmanager
def compiled_blocks(
    model: nn.Module, *, one_shape: bool, resumed: bool = False, backend: str = "inductor"
) -> Iterator["KeepGraphs"]:
    """Compile the blocks of a model until the `with` block ends.

    Args:
        model: with or without an adapter.
        one_shape: whether all full batches have one shape, as packed ones have.
        resumed: whether the first batch may be an epoch's last one, which is a short one.
        backend: of `torch.compile`.

    Yields: a callback that the trainer needs.
    """
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(dynamic=False if one_shape else None, backend=backend)
    try:
        with layers_apart(model):
            yield KeepGraphs(1 + resumed if one_shape else _SHAPES_SEEN)
    finally:
        torch.compiler.set_stance("default")
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def layers_apart(model: nn.Module) -> Iterator[None]:
    """Have each adapted layer work alone until the `with` block ends. What does several together
    looks for layers that the compiler took in, and works before the body that a graph records."""
    together = getattr(getattr(model, "base_model", None), "together", None)
    if together is None:
        yield
        return
    before, together.enabled = together.enabled, False
    try:
        yield
    finally:
        together.enabled = before


_SHAPES_SEEN = 5  # steps after which a graph for every shape is there


class KeepGraphs(TrainerCallback):
    """Compile in the first steps alone: an evaluation before them runs as written, since the
    compiler keeps few graphs, and later what fits none, such as an epoch's last batch.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self._taken = 0
        torch.compiler.set_stance("force_eager")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._taken == 0:
            torch.compiler.set_stance("default")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._taken += 1
        if self._taken == self.steps:
            torch.compiler.set_stance("eager_on_recompile")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules of the outermost lists of two and more of one class; the model where it has no
    such list."""
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) > 1 and len({type(block) for block in module}) == 1:
            found += module
            inside += (f"{name}.",)
    return found or [model]


def any_number_of_rows(inputs: dict[str, Any]) -> None:
    """Tell the compiler that batches have different numbers of rows, before it sees a second."""
    for name in ROW_BOUNDS:
        bounds = inputs.get(name)
        if isinstance(bounds, Tensor):
            torch._dynamo.maybe_mark_dynamic(bounds, 0)


def launch_bound(model: nn.Module, batch_size: int, tokens: float) -> str | None:
    """A sentence of advice where the layers' products are shorter than the launches around them;
    None elsewhere.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    sizes = [layer.in_features * layer.out_features for layer in layers if hasattr(layer, "in_features")]
    if not sizes:
        return None
    per_row = tokens * sum(sizes) / len(sizes)
    if batch_size * per_row >= SMALL_LAYER:
        return None
    enough = round(SMALL_LAYER / per_row)
    return (
        f"{batch_size} rows of about {tokens:.0f} tokens are too few for this GPU: it waits for launches. Up to "
        f"training.batch_size: {enough} a pass takes hardly longer (lower training.gradient_accumulation to match); "
        "training.compile: true spares launches, after half a minute of compiling"
    )
