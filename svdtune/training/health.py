"""What goes wrong in numbers while a run trains, said once each: a loss that is no number, and
SORSA's factors coming apart.

Nothing is changed or stopped: the run's owner decides. Looked at at every log, where Trainer waits
for the device anyway.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svdtune import processes
from svdtune.methods.sorsa.layer import SorsaLinear
from svdtune.methods.sorsa.math import gram_error
from svdtune.methods.sorsa.regularizer import sorsa_layers
from svdtune.methods.sorsa.sharded import batches, rows, summed_grams, whole

log = logging.getLogger(__name__)

# ‖MᵀM − I‖_F / √r: 0 where the columns are orthonormal, 1 where they have become twice as long or
# half of them are lost.
ORTHONORMALITY = 0.5


class WatchNumbers(TrainerCallback):
    """Warns once of a loss or gradient that is not finite, of factors far from orthonormal, and of
    singular values < 0.

    Attributes:
        told: the kinds of trouble that were told of.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                # A GradScaler looks for its scale by steps that overflow, and leaves those out.
                if name == "grad_norm" and args.fp16:
                    continue
                self._tell(
                    "finite",
                    f"step {state.global_step}: {name} is {float(logs[name])}; what is trained from here on is lost. Start "
                    "again with a lower training.learning_rate, or training.precision bf16 instead of fp16",
                )
        layers = sorsa_layers(model) if model is not None else []
        if any(hasattr(tensor, "ds_id") for tensor in _trained(layers, "sorsa_s")):
            return  # ZeRO-3's partitions, which would have to be gathered for it
        for kind, find, advice in (
            ("orthonormality", _worst_orthonormality, "raise method.gamma, or lower training.learning_rate"),
            ("values", _lowest_value, "U and V now carry its sign; lower training.learning_rate if that is not meant"),
        ):
            if kind not in self.told and layers and (found := find(layers)) is not None:
                self._tell(kind, f"step {state.global_step}: {found}: {advice}")

    def _tell(self, kind: str, sentence: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            if processes.is_main():
                log.warning("%s", sentence)


def _trained(layers: list[SorsaLinear], *names: str) -> list[Tensor]:
    return [
        tensor
        for layer in layers
        for adapter in layer.configs
        for name in names
        if (tensor := layer.adapter_tensor(name, adapter)) is not None and tensor.requires_grad
    ]


@torch.no_grad()
def _worst_orthonormality(layers: list[SorsaLinear]) -> str | None:
    """What is to be said of the factor that is farthest from orthonormal, None where all are
    near."""
    factors = _trained(layers, "sorsa_U", "sorsa_V")
    if not factors:
        return None
    there = factors[0].device  # one wait for the device, not one a factor
    errors = torch.cat([batch.to(there) for batch in _errors(factors)]).cpu().nan_to_num(torch.inf)
    worst = float(errors.max())
    if worst <= ORTHONORMALITY:
        return None
    return (
        f"{int((errors > ORTHONORMALITY).sum())} of SORSA's {len(errors)} factors are no longer near orthonormal, "
        f"‖MᵀM − I‖/√r up to {worst:.2f}"
    )


def _errors(factors: list[Tensor]) -> Iterator[Tensor]:
    """‖MᵀM − I‖_F / √r [n] of factors M, a batch of n at a time."""
    for batch, of_whole in batches(factors, summed_grams(factors)):
        held = [rows(factor) for factor in batch]
        E = gram_error(torch.cat(held), [len(one) for one in held], of_whole)
        yield torch.linalg.matrix_norm(E).float() / math.sqrt(E.shape[-1])


@torch.no_grad()
def _lowest_value(layers: list[SorsaLinear]) -> str | None:
    """What is to be said of singular values below 0, None where there are none."""
    values = [whole(s) for s in _trained(layers, "sorsa_s")]
    if not values:
        return None
    below = int((torch.cat([s.to(values[0].device) for s in values]) < 0).sum())
    return f"{below} of SORSA's {sum(map(len, values))} singular values have fallen below 0" if below else None
