"""The sizes of a model and an adapter that memory and time follow from."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from svdtune.methods.sites import Site
from svdtune.planning.plan import Plan
from svdtune.spectra import CONVOLUTIONS, matrix_shape

# Modules that read one tensor, which is then kept once; and those whose input is kept anyway, as
# the attention's output.
_ONE_INPUT = dict.fromkeys(("q_proj", "k_proj", "v_proj", "query", "key", "value"), "qkv")
_ONE_INPUT |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up")
_KEPT_ANYWAY = ("o_proj", "out_proj")
# Mo-SARA's factors are filled up to whole blocks of columns.
_COLUMNS = 64


@dataclass(frozen=True)
class Anatomy:
    """Sizes in numbers (not bytes).

    Attributes:
        method: the adapter's.
        hidden, intermediate, vocabulary, depth: H, I, V and decoder layers.
        parameters: of the base model.
        block: of its largest decoder layer, which sharding gathers as one.
        linear: of the linear layers in all decoder layers, which quantization stores in fewer bits.
        head: of the output head, which the loss needs whole.
        largest: of the largest linear layer.
        trained, frozen: of the adapter.
        copies: of the adapter's factors in the dtype of the products, kept between forward and
            backward.
        kept: per token, what the adapter keeps for the backward pass beside what the base keeps.
        changed: of the parameters of fused experts that are adapted: W + ΔW is kept for the
            backward pass.
    """

    method: str
    hidden: int
    intermediate: int
    vocabulary: int
    depth: int
    parameters: int
    block: int
    linear: int
    head: int
    largest: int
    trained: int
    frozen: int
    copies: int
    kept: int
    changed: int = 0


def anatomy(plan: Plan, model: PreTrainedModel) -> Anatomy:
    """Measure a plan and its model, whose parameters may be on the meta device."""
    text = model.config.get_text_config()
    blocks = _blocks(model)
    inside: list[Any] = [module for block in blocks for module in block.modules() if _is_linear(module)]
    head = model.get_output_embeddings()
    sized = [(site, *site.shape) for site in plan.sites if site.shape is not None and not site.expert]
    experts = [site.shape for site in plan.sites if site.shape is not None and site.expert]
    dora = getattr(plan.config, "use_dora", False)
    return Anatomy(
        method="dora" if dora else plan.method,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        depth=len(blocks),
        parameters=plan.base_parameters,
        block=max(_count(block) for block in blocks),
        linear=sum(module.weight.numel() for module in inside),
        head=0 if head is None else _count(head),
        largest=max((module.weight.numel() for module in inside), default=0),
        trained=plan.trained,
        frozen=plan.frozen,
        copies=sum(_padded(site.rank or 0) * n for site, _, n in sized) if plan.method == "mosara" else plan.trained,
        kept=_kept(plan.method, sized),
        changed=sum(out * n for out, n in experts),
    )


def _kept(method: str, sized: Sequence[tuple[Site, int, int]]) -> int:
    """Numbers kept per token: the low-rank products of every layer, and the inputs that gradients
    of factors need.

    PEFT's LoRA copies the input for every layer. Its other methods are counted as LoRA. Mo-SARA
    keeps no input: it trains no factor that reads one.
    """
    if method == "mosara":
        return sum(_padded(site.rank or 0) for site, *_ in sized)
    ranks = sum(site.rank or 0 for site, *_ in sized)
    if method not in ("sara", "sorsa"):
        return ranks + sum(n for *_, n in sized)
    inputs: dict[tuple[str, str], int] = defaultdict(int)
    for site, _, n in sized:
        parent, _, name = site.module.rpartition(".")
        if name not in _KEPT_ANYWAY:
            inputs[parent, _ONE_INPUT.get(name, name)] = n
    return ranks + sum(inputs.values())


def _padded(rank: int) -> int:
    return -(-rank // _COLUMNS) * _COLUMNS


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: the list of modules with the most parameters; the model itself where
    there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return list(max(lists, key=_count, default=[model]))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, *CONVOLUTIONS)) or getattr(getattr(module, "weight", None), "ndim", 0) != 2:
        return False
    return bool(re.search("Linear|Conv1D", type(module).__name__)) and min(matrix_shape(module)) > 1


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
