"""Write an adapter as the LoRA that does the same, which PEFT, vLLM, llama.cpp and others load
without svdtune.

A layer's addition to the base weight is ΔW = B Aᵀ with a pair A [in, w], B [out, w] that its method
gives (SARA and one-headed Mo-SARA: w = k, SORSA: w = 2r, in both layouts against the base model's
own weight). LoRA stores Aᵀ as lora_A and B as lora_B, and multiplies by alpha / rank, so alpha =
rank. Nothing is lost: SORSA's change is not squeezed back into rank r.

Only the adapter's own files are read. The base's weights are needed for one that was saved with
compact=True alone: what its file leaves out follows from them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftType
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from svdtune.errors import SvdtuneError
from svdtune.export.change import SavedChange, read_change, since
from svdtune.export.comparison import LogitComparison, compare_logits, probe_logits
from svdtune.export.convolution import as_lora, check_kernels
from svdtune.export.source import Source, adapter_folder, attach_adapter, open_source
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.card import front, ranks_in_words
from svdtune.methods.files.integrity import ADAPTER_WEIGHTS
from svdtune.methods.injection import method_name
from svdtune.starts.pairs import is_repeated, is_taken_off, start_of
from svdtune.system import check_new_folder, new_folder

# The ranks that vLLM's --max-lora-rank takes; an adapter needs one that is at least its own.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Cut:
    """How far every layer is cut: to the best approximation of ΔW that there is.

    Attributes:
        rank: to at most this rank. None: not by a rank.
        error: to the smallest rank with ‖ΔW_lora − ΔW‖_F <= error · ‖ΔW‖_F. None: not by an error.

    Raises:
        SvdtuneError: both are given, or a value outside its range.
    """

    rank: int | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.error is not None:
            raise SvdtuneError("rank and error each say how far to cut; give one of them")
        if self.rank is not None and self.rank < 1:
            raise SvdtuneError(f"the rank to export to must be at least 1; got {self.rank}")
        if self.error is not None and not 0 < self.error < 1:
            raise SvdtuneError(f"the error allowed to each layer must lie between 0 and 1; got {self.error}")

    def rank_of(self, values: Tensor) -> int:
        """The rank for a ΔW with these singular values, descending [n]; at least 1."""
        if self.error is None:
            return len(values) if self.rank is None else min(self.rank, len(values))
        # what is left beyond each rank, summed from the smallest on
        rest = values.double().square().flip(0).cumsum(0).flip(0).sqrt()
        return max(1, int((rest > self.error * rest[0]).sum()))


@dataclass(frozen=True)
class LoraReport:
    """What an export wrote.

    Attributes:
        output: the folder.
        ranks: rank by layer.
        errors: ‖ΔW_lora − ΔW‖_F / ‖ΔW‖_F by layer; empty where nothing was cut off and the export
            is exact.
        notes: what a tool other than PEFT would not take, a sentence each.
        difference: of the LoRA's logits from the adapter's; None where they were not compared.
    """

    output: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    notes: list[str]
    difference: LogitComparison | None = None


def export_lora(
    adapter: Path,
    output: Path,
    *,
    cut: Cut = Cut(),
    uniform: bool = False,
    base: Source | None = None,
    start: Path | None = None,
) -> LoraReport:
    """Write the adapter in a folder as a LoRA adapter.

    Args:
        adapter: folder of a saved SARA, Mo-SARA, SORSA or LoRA adapter.
        output: folder to create.
        cut: how far every layer is cut; its error is stated. By default nothing is lost.
        uniform: pad every layer with zeros to the largest rank, for llama.cpp, which knows one
            alpha for all layers.
        base: for a compact adapter, how to open its base model; as its configuration says if None.
        start: the adapter as it was before training, where that was taken off the base's weights
            (PiSSA, OLoRA). The LoRA is then for the untouched model.

    Raises:
        SvdtuneError: the adapter is damaged or another method's, has several heads, or `output`
            cannot be written.
    """
    check_new_folder(output.expanduser())
    change = read_change(adapter, base)
    if start is not None:
        _check_start_comes_off(adapter, change.config)
        # one that PEFT starts anew on loading names the model from before already
        if not is_taken_off(change.config) and (base is None or base.base == change.config.base_model_name_or_path):
            raise SvdtuneError(
                "an adapter less its start is for the model from before the start was taken off; name that model as base"
            )
        change = since(change, read_change(start))
        if base is not None:
            change.config.base_model_name_or_path = base.base
    else:
        _check_start_stays(adapter, change.config)
    return write_lora(change, output, cut, uniform)


def combine(
    weights: Mapping[str, float] | Mapping[Path, float] | Mapping[str | Path, float],
    output: Path,
    *,
    cut: Cut = Cut(),
    uniform: bool = False,
) -> LoraReport:
    """Write Σ_i w_i ΔW_i of several adapters on one base as one LoRA adapter, as `svdtune.combine`
    does.

    Exact by stacking, so the rank of a layer is the sum of the adapters' ranks there; or cut,
    stating the error. A layer that an adapter leaves alone counts as zero.

    Raises:
        SvdtuneError: as `export_lora`; also where one adapter is named twice, or the adapters were
            made from different bases or train whole modules or biases.
    """
    check_new_folder(output.expanduser())
    if not weights:
        raise SvdtuneError("there are no adapters to combine; name at least one with its weight")
    folders: dict[Path, float] = {}
    for given, weight in weights.items():
        folder = adapter_folder(given, "combine")
        if folder in folders:
            raise SvdtuneError(f"{folder} is named twice; give it one weight")
        folders[folder] = weight
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    bases: dict[str, str] = {}
    kernels: dict[str, Mapping[str, Any]] = {}
    kept: dict[str, Tensor] = {}
    for folder, weight in folders.items():
        saved = read_change(folder)
        _check_start_stays(folder, saved.config)
        bare = saved.base_weights
        if trained := sorted(saved.others.keys() - bare):
            raise SvdtuneError(
                f"the adapter {folder} also trains {trained[0]}, which has no weighted sum; combine adapters without "
                "modules_to_save and biases"
            )
        for layer, mark in getattr(saved.config, "base_fingerprint", {}).items():
            if bases.setdefault(layer, mark) != mark:
                raise SvdtuneError(f"the adapter {folder} was made from another base model: layer {layer!r} differs")
        for name in sorted(bare):
            if not torch.equal(kept.setdefault(name, saved.others[name]), saved.others[name]):
                raise SvdtuneError(f"the adapter {folder} was made from another base model: {name!r} differs")
        for layer, (A, B) in saved.pairs.items():
            pairs.setdefault(layer, []).append((A, weight * B))
        kernels |= saved.kernels
    stacked = {
        layer: (torch.cat([A for A, _ in parts], 1), torch.cat([B for _, B in parts], 1))
        for layer, parts in pairs.items()
    }
    everything: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    everything["dropout" if isinstance(saved.config, SvdConfig) else "lora_dropout"] = 0.0
    everything["target_modules"] = sorted(stacked)
    config = dataclasses.replace(saved.config, **everything)
    return write_lora(SavedChange(config, stacked, kernels, kept), output, cut, uniform)


def _check_start_stays(folder: Path, config: PeftConfig) -> None:
    """Raise `SvdtuneError` for a LoRA whose start was taken off the base's weights. B A alone is
    not what it changes."""
    if not is_taken_off(config):
        return
    init: Any = getattr(config, "init_lora_weights", None)
    ways = []
    if is_repeated(config):  # a merge takes the same start off
        ways.append(
            "merge it (`svdtune merge`), and export the difference of the two models with a rank: "
            "`svdtune export MERGED --base BASE --rank N --output FOLDER`"
        )
    if start_of(config) != "loftq":
        ways.append(
            "name the adapter as it was before training, which comes off exactly: `svdtune export NAME --start BEFORE "
            "--output FOLDER`"
        )
    raise SvdtuneError(
        f"the adapter {folder} has init_lora_weights={init!r}, so it belongs on weights that its start was taken off. As a "
        f"LoRA of the model itself it would be another one. To have one, {'; or '.join(ways)}"
    )


def _check_start_comes_off(folder: Path, config: PeftConfig) -> None:
    """Raise `SvdtuneError` for an adapter that has no start which its base's weights lack."""
    if not isinstance(config, LoraConfig):
        title = PeftType(config.peft_type).value
        raise SvdtuneError(
            f"the adapter {folder} is {title}, which leaves its base's weights as they are; expected a LoRA with a start that "
            "was taken off (PiSSA, OLoRA). Leave start out"
        )
    if start_of(config) == "loftq":
        raise SvdtuneError(
            f"the adapter {folder} was started by LoftQ, which leaves quantized weights, and not the base's less the start: no "
            "LoRA on the base itself gives its outputs. Merge it: svdtune merge"
        )


def write_lora(
    change: SavedChange,
    output: Path,
    cut: Cut,
    uniform: bool,
    *,
    errors: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> LoraReport:
    """Write a change of the weights as a LoRA adapter, cut or padded as asked for. `errors` has by
    layer what was lost before, and `notes` go into the report.

    Raises:
        SvdtuneError: a layer cannot be a LoRA's, holds NaN, or `output` cannot be written.
    """
    output = output.expanduser()
    pairs = dict(change.pairs)
    check_kernels(change.kernels)
    for layer, pair in pairs.items():
        if not all(torch.isfinite(part).all() for part in pair):
            raise SvdtuneError(f"the adapter is broken: its change of layer {layer!r} holds NaN or infinity")
    lost = dict(errors or {})
    if cut != Cut():
        for layer, pair in pairs.items():
            A, B, error = truncated(*pair, cut)
            if A.shape[1] < pair[0].shape[1]:
                pairs[layer] = A, B
                lost[layer] = error
    ranks = {layer: A.shape[1] for layer, (A, _) in pairs.items()}
    if uniform:
        most = max(ranks.values())
        room = {layer: (0, most - rank) for layer, rank in ranks.items()}
        pairs = {layer: (F.pad(A, room[layer]), F.pad(B, room[layer])) for layer, (A, B) in pairs.items()}
        ranks = dict.fromkeys(ranks, most)
    tensors = dict(change.others)
    for layer, (A, B) in pairs.items():
        kernel = change.kernels.get(layer)
        down, up = (A.mT.contiguous(), B.contiguous()) if kernel is None else as_lora(A, B, kernel)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up
        ranks[layer] = len(down)
    config = lora_config(change.config, ranks)
    with new_folder(output) as work:
        config.save_pretrained(str(work))
        save_file(tensors, work / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (work / "README.md").write_text(_card(change, ranks, lost), encoding="utf-8")
    return LoraReport(output, ranks, lost, [*notes, *notes_for_servers(config, ranks)])


def truncated(A: Tensor, B: Tensor, cut: Cut) -> tuple[Tensor, Tensor, float]:
    """The pair nearest to B Aᵀ of the rank that a cut asks for, and its relative error in the
    Frobenius norm.

    From an SVD of R_B R_Aᵀ [w, w] in float64, where A = Q_A R_A and B = Q_B R_B; B Aᵀ itself is
    never formed.
    """
    QA, RA = torch.linalg.qr(A.double())
    QB, RB = torch.linalg.qr(B.double())
    U, s, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    rank = cut.rank_of(s)
    root = s[:rank].sqrt()
    norm = float(s.norm())
    error = float(s[rank:].norm()) / norm if norm else 0.0
    return (QA @ (Vh[:rank].mT * root)).to(A.dtype), (QB @ (U[:, :rank] * root)).to(B.dtype), error


def compare(adapted_base: Source, lora: Path) -> LogitComparison:
    """The logits of an adapter's LoRA with the adapter's own, on one base model."""
    source = open_source(adapted_base)
    model: Any = source.model
    adapted = probe_logits(model, source.tokenizer)
    with model.disable_adapter():
        alone = probe_logits(model, source.tokenizer)
    exported = probe_logits(attach_adapter(model.unload(), lora), source.tokenizer)
    return compare_logits(exported, adapted, alone)


def lora_config(adapter: PeftConfig, ranks: dict[str, int]) -> LoraConfig:
    """The LoRA configuration: alpha = rank in every layer, so that nothing is scaled.

    `r` is the largest rank: vLLM sizes its buffers by it and scales all layers by alpha / r = 1.
    """
    config: Any = adapter  # svdtune's and LoRA's agree in the fields that are taken over
    r = max(ranks.values())
    others = {f"^{re.escape(layer)}": rank for layer, rank in sorted(ranks.items()) if rank != r}
    targets = config.target_modules
    if not isinstance(targets, set | list) or config.layers_to_transform is not None or config.exclude_modules:
        targets = sorted(ranks)
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=config.dropout if isinstance(config, SvdConfig) else config.lora_dropout,
        fan_in_fan_out=getattr(config, "fan_in_fan_out", False),
        target_modules=sorted(targets),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
        ensure_weight_tying=getattr(config, "ensure_weight_tying", False),
        bias=cast(Any, "lora_only" if config.bias.endswith("_only") else config.bias),
    )


def notes_for_servers(config: LoraConfig, ranks: dict[str, int]) -> list[str]:
    """What vLLM and llama.cpp would not take, or take otherwise than PEFT, by their documentation
    and loaders."""
    notes = []
    if config.r > VLLM_RANKS[-1]:
        notes.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}; this one has {config.r}: export with a smaller rank")
    if config.modules_to_save:
        notes.append("vLLM refuses adapters with modules_to_save; merge the adapter instead")
    if config.bias != "none":
        notes.append("vLLM refuses adapters that train biases; merge the adapter instead")
    if len(set(ranks.values())) > 1:
        notes.append(
            "llama.cpp scales all layers by one alpha, but their ranks differ here: export with --uniform for it"
        )
    return notes


def _card(change: SavedChange, ranks: dict[str, int], errors: dict[str, float]) -> str:
    exact = "It gives the same outputs, up to rounding."
    if errors:
        worst = max(errors, key=errors.__getitem__)
        exact = f"Cut to a smaller rank: relative error of ΔW up to {errors[worst]:.2e} (`{worst}`)."
    base = change.config.base_model_name_or_path
    tags = list(dict.fromkeys(["lora", "svdtune", method_name(change.config)]))
    head = {"library_name": "peft", "tags": tags} | ({"base_model": base} if base else {})
    body = f"""
A {change.title} adapter, exported to LoRA of rank {ranks_in_words(ranks)} by svdtune. {exact}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```
"""
    return front(head) + body
