"""A trainer callback that samples how far the weights have moved, while a run trains: SORSA's
Figure 2 and Theorem 5.5.

RUN/analysis/during.jsonl has one line a sample: {"step", "seconds", "layers": {name: `Movement`}}.
Loss and gradient norm are in the run's log.
"""

import fnmatch
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svdtune.errors import SvdtuneError
from svdtune.linalg import Factors
from svdtune.linalg.deviation import compared_factors, condition_number, deviation, product_values
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.matrices import Observed, Pair, observed_layers
from svdtune.names import is_named
from svdtune.spectra import matrix_shape
from svdtune.training.checkpoints import keep_steps

log = logging.getLogger(__name__)
Found = TypeVar("Found")

DURING = "analysis/during.jsonl"
# Up to this short side an SVD gains nothing from a second core.
_ONE_CORE = 1024
# Layers in work at once, each with a copy of its weight.
_WORKERS = 8


class Movement(TypedDict):
    """What a sample says of one layer.

    `delta_sigma`, `delta_d`, `angle`, `k` and `p` as in `svdtune.linalg.deviation.Deviation`;
    `relative_change` is ‖W_t − W_0‖_F / ‖W_0‖_F; `condition` is κ of the trained product (W_p),
    None where it is infinite or there is none; `orthonormality` has ‖UᵀU − I‖_F and ‖VᵀV − I‖_F of
    SORSA's factors.
    """

    delta_sigma: float
    delta_d: float
    angle: float
    k: int
    p: int
    relative_change: float
    condition: float | None
    orthonormality: dict[str, float]


class Start(NamedTuple):
    """What is remembered of a layer's first weight.

    Attributes:
        factors: its singular triplets that are compared.
        norm: ‖W_0‖_F.
        pair: A₀ and B₀ that LoRA or PiSSA started with, whose product is part of W_0.
        weight: the weight itself [out, in], only where the change is no thin product.
    """

    factors: Factors
    norm: float
    pair: Pair | None
    weight: Tensor | None


class SampleMovement(TrainerCallback):
    """Samples at `samples` evenly spread steps, the start and the end among them, on the training
    thread.

    A sample costs one whole SVD of each layer on the CPU (576×576: 0.07 s on one core), or with `k`
    the leading triplets of layers above 1024, found on the weight's device. k(out + in) fp32
    numbers a layer wait in the host's memory, and under full fine-tuning its first weight. A sample
    between start and end is left out where sampling has taken more than `max_share` of the run's
    time, so a run never gets slower than that by much.

    Args:
        model: with its adapter, before the first step and before a checkpoint is loaded into it.
        folder: the run folder.
        samples: how many samples.
        modules: name patterns of the layers to look at ("*.q_proj"); all adapted ones by default.
        k: how many leading singular triplets are compared; all by default, as the paper has it; see
            `compared_factors`.
        max_share: of the run's time; None for no limit.

    Raises:
        SvdtuneError: no layer matches, or there is none whose change is a matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        samples: int = 20,
        modules: list[str] | None = None,
        k: int | None = None,
        max_share: float | None = 0.1,
    ):
        self.path, self.samples, self.k, self.max_share = folder / DURING, samples, k, max_share
        self.layers = observed_layers(model, lambda name: modules is None or is_sampled(name, modules))
        if not self.layers:
            some = ", ".join(dict.fromkeys(layer.name.rpartition(".")[2] for layer in observed_layers(model)))
            raise SvdtuneError(
                f"analysis.modules = {modules} matches no layer whose change is a matrix; "
                + (f"there are {some}" if some else "Mo-SARA with several heads has none: leave the section out")
            )
        self._start = side_by_side(lambda layer: start_of(layer, k), self.layers)
        self.spent, self._began = 0.0, time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._began = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_steps(self.path, state.global_step or -1)
        if state.global_step == 0:
            self.sample(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or state.global_step not in sampled_steps(self.samples, state.max_steps):
            return
        taken = time.monotonic() - self._began
        last = state.global_step == state.max_steps
        if last or self.max_share is None or self.spent <= self.max_share * taken:
            self.sample(state.global_step)
        else:
            log.info("no sample at step %d: sampling took %.0f of %.0f s", state.global_step, self.spent, taken)

    def sample(self, step: int) -> None:
        """Take one sample and append it to the file."""
        began = time.monotonic()
        layers = side_by_side(lambda layer: movement(layer, self._start[layer.name]), self.layers)
        seconds = time.monotonic() - began
        self.spent += seconds
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 3), "layers": layers}) + "\n")


def side_by_side(compute: Callable[[Observed], Found], layers: Sequence[Observed]) -> dict[str, Found]:
    """compute(layer) of each layer, by name: small ones on a core each, since their SVDs gain
    nothing from more."""
    threads = torch.get_num_threads()
    small = [layer for layer in layers if min(matrix_shape(layer.module)) <= _ONE_CORE]
    found: dict[str, Found] = {}
    if threads > 1 and len(small) > 1:
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(min(threads, _WORKERS)) as pool:
                found = dict(zip((layer.name for layer in small), pool.map(compute, small), strict=True))
        finally:
            torch.set_num_threads(threads)
    return {layer.name: found[layer.name] if layer.name in found else compute(layer) for layer in layers}


def start_of(layer: Observed, k: int | None = None) -> Start:
    """What `movement` needs to know of a layer; ask before the first step. `k` as in
    `compared_factors`."""
    weight, pair = layer.start(), layer.added_pair()
    if pair is not None:
        pair = None if isinstance(layer.module, SvdLayer) else (pair[0].cpu().clone(), pair[1].cpu().clone())
        kept = None
    else:
        stored: Any = getattr(layer.module, "weight", weight)
        kept = weight.to(stored.dtype, copy=True).cpu()
    return Start(compared_factors(weight, k), float(torch.linalg.matrix_norm(weight)), pair, kept)


def movement(layer: Observed, start: Start) -> Movement:
    """How far a layer is from where it started."""
    weight = layer.weight()
    return moved(layer, start.factors, weight, _change(layer, start, weight), start.norm)


def moved(layer: Observed, start: Factors, weight: Tensor, change: float, norm: float) -> Movement:
    """What is said of a layer that came from the triplets `start` of W_0 to `weight`, with
    `change` = ‖W_t − W_0‖_F and `norm` = ‖W_0‖_F."""
    found = deviation(start, compared_factors(weight, len(start.s)))
    pair = layer.trained_pair()
    condition = math.inf if pair is None else condition_number(product_values(*pair))
    return {
        "delta_sigma": found.delta_sigma,
        "delta_d": found.delta_d,
        "angle": found.angle,
        "k": found.k,
        "p": found.p,
        "relative_change": change / norm if norm else 0.0,
        "condition": condition if math.isfinite(condition) else None,
        "orthonormality": layer.orthonormality(),
    }


def _change(layer: Observed, start: Start, weight: Tensor) -> float:
    """‖W_t − W_0‖_F; of thin products without forming them."""
    if start.weight is not None:
        return float(torch.linalg.matrix_norm(weight.cpu() - start.weight))
    pair = layer.added_pair()
    assert pair is not None  # else the start has a weight
    A, B = pair
    if start.pair is not None:
        A, B = torch.cat([A, start.pair[0].to(A)], 1), torch.cat([B, -start.pair[1].to(B)], 1)
    return float(torch.linalg.vector_norm(product_values(A, B)))


def sampled_steps(samples: int, max_steps: int) -> set[int]:
    """The steps at which a run of `max_steps` steps is sampled: 0, the last, and others evenly
    between."""
    return {round(i * max_steps / max(1, samples - 1)) for i in range(samples)} | {max_steps}


def is_sampled(name: str, patterns: Sequence[str]) -> bool:
    """Whether a layer's name, or its last parts, are among names with `*` and `?` in them."""
    return any(fnmatch.fnmatch(name, pattern) or is_named(name, pattern) for pattern in patterns)
