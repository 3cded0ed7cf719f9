"""What a saved adapter adds to its base model: ΔW = B Aᵀ by module, for SARA, Mo-SARA, SORSA and
stock LoRA."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor

from svdtune.checkpoint import Checkpoint
from svdtune.checkpoint.tensors import read_shard
from svdtune.errors import SvdtuneError
from svdtune.export.layerwise import IN_MEMORY
from svdtune.export.source import Source, find_source, opened_base
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.adapter import SavedAdapter, layer_class, read_adapter, read_config
from svdtune.methods.files.card import TITLES
from svdtune.methods.files.compact import PROBE, recomputed
from svdtune.methods.files.integrity import ADAPTER_WEIGHTS, PEFT_ROOT
from svdtune.methods.layers.slices import whole_pairs
from svdtune.methods.sites import Site, sites

LowRankPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SavedChange:
    """An adapter's change of the weights.

    Attributes:
        config: of the adapter.
        pairs: by module of the base model, A [in, w] and B [out, w] with ΔW = B Aᵀ.
        kernels: of the convolutions among them, as in `SvdConfig.kernels`.
        others: the rest of its file under its own names: biases and modules_to_save.
    """

    config: PeftConfig
    pairs: dict[str, LowRankPair]
    kernels: Mapping[str, Mapping[str, Any]]
    others: dict[str, Tensor]

    @property
    def base_weights(self) -> set[str]:
        """Of `others`, the base's own weights of adapted embeddings and output heads, which PEFT
        saves beside what is trained."""
        return {f"{PEFT_ROOT}{layer}.base_layer.weight" for layer in self.pairs} & self.others.keys()

    @property
    def title(self) -> str:
        """The method, for people."""
        return TITLES[self.config.method] if isinstance(self.config, SvdConfig) else "LoRA"


def read_change(folder: Path, base: Source | None = None) -> SavedChange:
    """Read what the adapter in a folder adds.

    Args:
        folder: of a saved adapter.
        base: for a compact adapter, how to open its base model; as its configuration says if None.

    Raises:
        SvdtuneError: it is damaged, another method's, has several heads, or is a LoRA that adds
            more than B A.
    """
    config = read_config(folder)
    if type(config) is LoraConfig:
        return _of_lora(folder, config)
    if not isinstance(config, SvdConfig):
        raise SvdtuneError(
            f"{folder} holds an adapter of type {PeftType(config.peft_type).value}; expected SARA, MOSARA, SORSA or LORA. "
            "Merge it instead: svdtune merge"
        )
    if config.target_parameters:
        raise SvdtuneError(
            f"the adapter {folder} is on fused experts (target_parameters), each with a rank of its own, and LoRA has one rank "
            "for all of them; merge it instead: svdtune merge"
        )
    saved = _read_whole(folder, base)
    method = layer_class(saved.config)
    pairs = {layer: method.low_rank_pair(tensors, saved.config) for layer, tensors in saved.layers.items()}
    return SavedChange(saved.config, whole_pairs(saved.config.slices, pairs), saved.config.kernels, saved.others)


def since(trained: SavedChange, started: SavedChange) -> SavedChange:
    """What training changed of a LoRA that began with its start taken off the weights.

    W = W_r + c B₀A₀ was the model; now it is W_r + c BA = W + c (BA − B₀A₀), a LoRA of rank 2r on
    the untouched W.

    Raises:
        SvdtuneError: the two do not belong together.
    """
    shapes = [{name: [part.shape for part in pair] for name, pair in each.pairs.items()} for each in (trained, started)]
    if differs := sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)):
        raise SvdtuneError(
            f"the adapter and the one that it started from differ in layer {differs[0]!r}; name the `adapter` folder that "
            "svdtune.start wrote beside the residual it was trained on"
        )
    pairs = {
        name: (torch.cat([A, started.pairs[name][0]], 1), torch.cat([B, -started.pairs[name][1]], 1))
        for name, (A, B) in trained.pairs.items()
    }
    return dataclasses.replace(trained, pairs=pairs)


def _of_lora(folder: Path, config: LoraConfig) -> SavedChange:
    fields = dataclasses.fields(config)
    variants = [field.name for field in fields if field.metadata.get("is_lora_variant") and getattr(config, field.name)]
    if variants:
        raise SvdtuneError(
            f"the adapter {folder} has {variants[0]}, so it adds something else than B A; merge it instead"
        )
    if more := [name for name in ("target_parameters", "layer_replication") if getattr(config, name, None)]:
        raise SvdtuneError(
            f"the adapter {folder} has {more[0]}, so it is no LoRA of the base's layers alone; {IN_MEMORY}"
        )
    tensors = {name: stored.read() for name, stored in read_shard(folder, ADAPTER_WEIGHTS).tensors.items()}
    pairs: dict[str, LowRankPair] = {}
    kernels: dict[str, dict[str, Any]] = {}
    others = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for name in sorted(tensors.keys() - others.keys()):
        layer, _, part = name.removeprefix(PEFT_ROOT).partition(".lora_")
        if part == "B.weight":
            continue
        B = tensors.get(f"{PEFT_ROOT}{layer}.lora_B.weight")
        if part != "A.weight" or B is None or B.shape[1] != len(tensors[name]):
            raise SvdtuneError(
                f"the adapter {folder} holds {name!r}, and only lora_A and lora_B of linear layers and ungrouped convolutions "
                "can be exported; merge it instead"
            )
        A = tensors[name]
        if A.ndim > 2:
            kernels[layer] = {"shape": A.shape[1:], "groups": 1, "dilation": [1], "padding_mode": "zeros"}
        pairs[layer] = A.flatten(1).mT.float(), B.flatten(1).float() * _scaling(config, layer, len(A))
    if not pairs:
        raise SvdtuneError(f"the adapter {folder} holds no lora_A; save it again with save_pretrained")
    return SavedChange(config, pairs, kernels, others)


def _scaling(config: LoraConfig, layer: str, r: int) -> float:
    """What LoRA multiplies B A by in one layer."""
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), layer), config.lora_alpha)
    return float(alpha / r**0.5 if config.use_rslora else alpha / r)


def _read_whole(adapter: Path, base: Source | None = None) -> SavedAdapter:
    """An adapter of svdtune's with its frozen tensors. Those of a compact one are recomputed from
    its base model, one weight at a time."""
    saved = read_adapter(adapter)
    config, method = saved.config, layer_class(saved.config)
    if not config.compact or not method.frozen:
        return saved
    source = base or find_source(adapter)
    with opened_base(source, config) as checkpoint:
        asked = source.recipe.model.dtype if source.recipe else "auto"  # in which the adapter was made
        dtype: Any = checkpoint.model.config.dtype if asked == "auto" else getattr(torch, asked)
        places = {site.name: site for site in sites(checkpoint, config)}
        weights = {name: partial(_weight, places[name], checkpoint, dtype) for name in saved.layers}
        others = {name: partial(_other_weight, places[name], checkpoint, dtype) for name in saved.layers}
        probes = {
            name: {part: tensors.pop(f"{part}{PROBE}") for part in method.frozen}
            for name, tensors in saved.layers.items()
        }
        found = recomputed((weights, others), config.ranks, config.triplets, method.frozen_from, probes)
        for name, frozen in found:
            saved.layers[name].update(frozen)
    return saved


def _weight(site: Site, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Tensor:
    """A layer's matrix [out, in], rounded to a dtype unless that is None."""
    weight = site.weight(checkpoint)
    return weight if dtype is None else weight.to(dtype)


def _other_weight(site: Site, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Tensor:
    """The matrix in the dtype that is next in question: as it is stored, or else in bf16."""
    weight = site.weight(checkpoint)
    return weight.bfloat16() if dtype in (None, weight.dtype) else weight
