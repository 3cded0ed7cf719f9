"""The difference of two checkpoints as a LoRA: what a full fine-tune changed, cut to the rank or
the error that is asked for, one weight of each in memory at a time."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.checkpoint import Checkpoint
from svdtune.errors import SvdtuneError
from svdtune.export.change import LowRankPair, SavedChange
from svdtune.export.lora import Cut, LoraReport, write_lora
from svdtune.linalg import spectrum, top_factors
from svdtune.spectra.decompose import named
from svdtune.spectra.devices import devices_for_work, on_device
from svdtune.system import check_new_folder


def export_difference(
    tuned: Checkpoint, base: Checkpoint, output: Path, cut: Cut, *, uniform: bool = False
) -> LoraReport:
    """Write tuned − base as a LoRA on `base`.

    Args:
        tuned, base: from `open_checkpoint`; of one architecture.
        output: folder to create.
        cut: the rank or the error; one of them.
        uniform: as for `export_lora`.

    Returns:
        As `export_lora`. Weights that differ and are no linear layer's (embeddings, norms, biases)
        are named in its notes: a LoRA does not hold them.

    Raises:
        SvdtuneError: the models differ in shape or not at all, or neither rank nor error is given.
    """
    check_new_folder(output.expanduser())
    if cut.rank is None and cut.error is None:
        raise SvdtuneError(
            "the difference of two checkpoints has full rank; give the rank, or the error that is allowed"
        )
    if tuned.readers.keys() != base.readers.keys():
        differs = sorted(tuned.readers.keys() ^ base.readers.keys())[0]
        raise SvdtuneError(
            f"{tuned.name} and {base.name} are no two checkpoints of one model: {differs} is in one alone"
        )
    where = devices_for_work()[0]
    pairs: dict[str, LowRankPair] = {}
    errors: dict[str, float] = {}
    left: list[str] = []
    for parameter, is_layer in _parameters(base):
        module = parameter.rpartition(".")[0]
        change = _difference(tuned, base, parameter, module if is_layer else None)
        if not change.any():
            continue
        if not is_layer:
            left.append(parameter)
            continue
        A, B, error = named(parameter, partial(on_device, partial(_nearest, cut=cut), change, where))
        pairs[module] = A, B
        if error > 0:
            errors[module] = error
    if not pairs:
        raise SvdtuneError(f"{tuned.name} and {base.name} have the same linear layers, so there is nothing to write")
    causal = "ForCausalLM" in type(base.model).__name__ or "LMHead" in type(base.model).__name__
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"} if causal else {}
    transposed = any(isinstance(base.model.get_submodule(module), Conv1D) for module in pairs)
    config = LoraConfig(
        target_modules=sorted(pairs), base_model_name_or_path=base.name, fan_in_fan_out=transposed, **settings
    )
    notes = []
    if left:
        notes.append(
            f"{len(left)} weights differ too and are no linear layer's ({left[0]}, ...); the LoRA leaves them as they are in "
            f"{base.name}"
        )
    return write_lora(SavedChange(config, pairs, {}, {}), output, Cut(), uniform, errors=errors, notes=notes)


def _parameters(base: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Every stored parameter once, and whether it is the weight of a linear layer alone."""
    done: set[str] = set()
    for parameter in base.readers:
        if parameter in done:
            continue
        names = base.names.groups.get(parameter, [parameter])
        done |= set(names)
        module, _, own = parameter.rpartition(".")
        linear = own == "weight" and isinstance(base.model.get_submodule(module), nn.Linear | Conv1D)
        yield parameter, linear and len(names) == 1


def _difference(tuned: Checkpoint, base: Checkpoint, parameter: str, module: str | None) -> Tensor:
    """tuned − base in fp32; of a layer as its matrix [out, in]."""
    ours, theirs = (each.readers[parameter]() if module is None else each.weight(module) for each in (tuned, base))
    if ours.shape != theirs.shape:
        raise SvdtuneError(
            f"{parameter} is {list(ours.shape)} in {tuned.name} and {list(theirs.shape)} in {base.name}: they are no two "
            "checkpoints of one model"
        )
    return ours.float() - theirs.float()


def _nearest(change: Tensor, cut: Cut) -> tuple[Tensor, Tensor, float]:
    """A [in, w], B [out, w] nearest to a change [out, in], and the relative error in the Frobenius
    norm."""
    n = min(change.shape)
    if cut.error is None:
        assert cut.rank is not None
        rank = min(cut.rank, n)
    else:
        rank = cut.rank_of(spectrum(change).values)
    factors = top_factors(change, rank)
    root = factors.s.sqrt()
    A, B = factors.Vh.mT * root, factors.U * root
    missing = float(torch.linalg.matrix_norm(change - B @ A.mT)) / float(torch.linalg.matrix_norm(change))
    return A, B, missing if math.isfinite(missing) and rank < n else 0.0
