"""SORSA on a quantized base as QPiSSA does it: decompose the weights, then quantize what is left.

Quantization rounds each block of a weight by a share of its largest entry. The leading singular
triplets hold much of what is large, so W − P₀ V₀ᵀ rounds less than W, and the adapter keeps P₀ V₀ᵀ
itself in full precision:

    ‖W − (Q(W − P₀ V₀ᵀ) + P₀ V₀ᵀ)‖ < ‖W − Q(W)‖

Both parts are written once, offline; the residual is then loaded with any quantization and the
adapter put on it.

W_r = W − P₀ V₀ᵀ is what merging writes for an adapter with s = 0, whose ΔW is U diag(0) Vᵀ − P₀
V₀ᵀ.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from svdtune.errors import SvdtuneError
from svdtune.methods import SorsaConfig
from svdtune.methods.files.integrity import fingerprint
from svdtune.methods.sorsa.layer import SorsaLinear
from svdtune.models import load
from svdtune.system import check_new_folder, new_folder

RESIDUAL, ADAPTER = "residual", "adapter"


@dataclass(frozen=True)
class Split:
    """What `split_checkpoint` wrote.

    Attributes:
        residual: folder of the base model without its principal part, to be loaded with or without
            quantization.
        adapter: folder of the SORSA adapter that has it; with it the model starts as the one that
            was split.
        ranks: rank by layer.
    """

    residual: Path
    adapter: Path
    ranks: dict[str, int]


def split_checkpoint(
    base: str | Path,
    output: str | Path,
    config: SorsaConfig | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    **load_kwargs: Any,
) -> Split:
    """Write a model as residual and SORSA adapter.

    Then, for training on nf4:

        four_bit = BitsAndBytesConfig(load_in_4bit=True)
        model = AutoModelForCausalLM.from_pretrained(split.residual, quantization_config=four_bit)
        model = PeftModel.from_pretrained(model, split.adapter, is_trainable=True)

    Disabling the adapter gives the model before training, to the rounding of the residual.
    Unloading it leaves the residual. No second adapter can stand on the layers of a split
    checkpoint.

    Args:
        base: what `svdtune.models.load` takes; not quantized.
        output: folder to create, with the folders `residual` and `adapter`.
        config: ranks, target modules and the rest; its layout does not matter.
        dtype: of the residual's weights; "auto" is the checkpoint's own. The subtraction is done in
            fp32.
        device: where to decompose.
        **load_kwargs: more for `svdtune.models.load`.

    Raises:
        SvdtuneError: the model cannot be loaded, `output` cannot be written, or a weight cannot
            lose its principal part because it is quantized or belongs to other modules too.
    """
    output = Path(output).expanduser().absolute()
    check_new_folder(output)
    loaded = load(base, dtype=dtype, device=device, **load_kwargs)
    # what a compact adapter leaves out comes from the whole weight
    model = get_peft_model(loaded.model, dataclasses.replace(config or SorsaConfig(), layout="delta", compact=False))
    completed = model.peft_config["default"]
    assert isinstance(completed, SorsaConfig)
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, SorsaLinear)}
    for name, layer in layers.items():
        _check(name, layer)
    with _at_zero(layers):
        model.merge_adapter()
        marks = {name: fingerprint(layer.get_base_layer()) for name, layer in layers.items()}
        completed.base_fingerprint = {name: mark for name, mark in marks.items() if mark is not None}
        model.unmerge_adapter()
    completed.base_model_name_or_path = str(output / RESIDUAL)
    with new_folder(output) as work:
        completed.layout = "split"
        # PEFT would look for the residual's folder
        model.save_pretrained(str(work / ADAPTER), save_embedding_layers=False)
        completed.layout = "delta"
        with _at_zero(layers):
            residual: Any = model.merge_and_unload()
        residual.save_pretrained(work / RESIDUAL)
        loaded.tokenizer.save_pretrained(work / RESIDUAL)
    return Split(output / RESIDUAL, output / ADAPTER, dict(completed.ranks))


def _check(name: str, layer: SorsaLinear) -> None:
    """Raise `SvdtuneError` for a weight that cannot lose its principal part."""
    if layer.quantization_backend is not None:
        raise SvdtuneError(
            f"the weight of {name!r} is quantized, and what is left without its principal part would be rounded again. Split "
            "the unquantized model, then quantize its residual when it is loaded"
        )
    if layer.tied:
        raise SvdtuneError(
            f"the weight of {name!r} is also that of other modules (an output head tied to the embeddings, for example), which "
            "would lose the principal part too. Name the layer in `exclude_modules`"
        )


@contextmanager
def _at_zero(layers: Mapping[str, SorsaLinear]) -> Iterator[None]:
    """s = 0 in every layer for a while."""
    values = {name: layer.sorsa_s["default"].detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():
            layer.sorsa_s["default"].zero_()
        yield
        for name, layer in layers.items():
            layer.sorsa_s["default"].copy_(values[name])
