"""FusedExperts: experts whose weights are one parameter [experts, out, in], each with an adapted
layer of its own.

An expert's matrix is a slice of the parameter, and its layer is named `<parameter>.<expert>`. As
for the slices of a fused projection, an expert has its own rank, factors, saved tensors and
fingerprint. For a call, the module that computes with the parameter is given W + ΔW; one batched
product forms the ΔW of all experts. So every way to compute experts sees the change, and the
parameter stays as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from svdtune import spectra
from svdtune.methods.compute.lowrank import Product, pair
from svdtune.methods.layers.lowrank import LowRankLayer
from svdtune.methods.layers.rows import Rows
from svdtune.methods.layers.slices import Fused, RowSlice


class ExpertStack(nn.Module):
    """A parameter that holds a matrix for each expert. It stands where a slice has its whole layer,
    and owns no parameter.

    Attributes:
        experts: the module that has it.
        name: its name there.
        transposed: whether it is [experts, in, out], as Transformers says of gpt-oss.
        out_features, in_features: of all experts' matrices under each other.
    """

    bias = None

    def __init__(self, experts: nn.Module, name: str):
        super().__init__()
        self._experts, self.name = (experts,), name
        self.transposed = bool(getattr(experts, "is_transposed", False))
        count, out, inside = self.matrices.shape
        self.out_features, self.in_features = count * out, inside

    @property
    def experts(self) -> nn.Module:
        return self._experts[0]

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored."""
        return self.experts.get_parameter(self.name)

    @property
    def matrices(self) -> Tensor:
        """A view of it as [experts, out, in]."""
        return self.matrix(self.weight)

    def matrix(self, stored: Tensor) -> Tensor:
        """A view of what is stored of experts, or of one, as [..., out, in]."""
        return stored.mT if self.transposed else stored

    def slices(self) -> "Iterator[ExpertSlice]":
        """Every expert's matrix."""
        return (ExpertSlice(self, index) for index in range(len(self.weight)))


class ExpertSlice(RowSlice):
    """One expert's matrix. Its `rows` count through the experts, one below the other."""

    def __init__(self, stack: ExpertStack, index: int):
        out = stack.out_features // len(stack.weight)
        super().__init__(stack, Rows(1, stack.out_features, index * out, (index + 1) * out))
        self.index = index

    @property
    def weight(self) -> Tensor:
        """A view [out, in] of the parameter."""
        return self.stack.matrices.detach()[self.index]

    @property
    def stack(self) -> ExpertStack:
        """The parameter."""
        stack = self.whole
        assert isinstance(stack, ExpertStack)
        return stack

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Put a matrix [out, in] into the parameter."""
        self.weight.copy_(matrix)


class FusedExperts(Fused):
    """A module of experts. For each adapted parameter it holds a list of the experts' layers."""

    def stacks(self) -> Iterator[tuple[str, list[LowRankLayer[Any]]]]:
        """The adapted parameters by name, each with its experts' layers."""
        for name, layers in self.named_children():
            if isinstance(layers, nn.ModuleList) and layers is not self.base_layer:
                yield name, [layer for layer in layers if isinstance(layer, LowRankLayer)]

    def slices(self) -> Iterator[LowRankLayer[Any]]:
        return (layer for _, layers in self.stacks() for layer in layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The experts' output, computed with every active adapter's addition to their weights."""
        changed = {}
        for name, layers in self.stacks():
            weight = getattr(self.base_layer, name)  # in a replica of nn.DataParallel no parameter
            moved = _moved(weight, layers)
            if moved is not weight:
                changed[name] = moved
        return functional_call(self.base_layer, changed, args, kwargs) if changed else self.base_layer(*args, **kwargs)


def _moved(weight: Tensor, layers: list[LowRankLayer[Any]]) -> Tensor:
    """A parameter's value plus what its experts' adapters add, in its own dtype. Without an
    addition it is the parameter itself."""
    first = layers[0]  # an adapter is on all experts or on none
    for layer in layers:
        if not torch.compiler.is_compiling() and not layer.called:
            layer.called = True
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
    if first.is_silent():
        return weight
    active = [name for name in first.active_adapters if name in first.r]
    first._check_loaded(active)
    base = first.get_base_layer()
    assert isinstance(base, ExpertSlice)
    transposed = base.stack.transposed
    with torch.autocast(weight.device.type, enabled=False):  # which would round the base's weights
        for name in active:
            A, B = (side.to(weight.dtype) for side in experts_pair(layers, name))
            weight = torch.baddbmm(weight, A, B.mT) if transposed else torch.baddbmm(weight, B, A.mT)
    return weight


def experts_pair(layers: list[LowRankLayer[Any]], adapter: str) -> tuple[Tensor, Tensor]:
    """A [experts, in, w] and B [experts, out, w] with ΔW = B Aᵀ for every expert. Experts of a
    lower rank get zero columns."""
    products = [layer.product(adapter) for layer in layers]
    wide = max(layer.r[adapter] for layer in layers)

    def stacked(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        filled = [part if part.shape[-1] == wide else F.pad(part, (0, wide - part.shape[-1])) for part in there]
        return torch.stack(filled) if filled else None

    U, s, V, P0, V0 = map(stacked, zip(*products, strict=True))
    assert U is not None
    assert V is not None
    return pair(Product(U, None if s is None else s[:, None], V, P0, V0))


def stacks_in(model: nn.Module) -> Iterator[tuple[str, ExpertStack]]:
    """Every parameter of three dimensions that is no convolution's kernel, by its name in the base
    model."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
        holder = module.get_base_layer() if isinstance(module, FusedExperts) else module
        for key, parameter in {} if isinstance(holder, spectra.CONVOLUTIONS) else holder._parameters.items():
            if parameter is not None and parameter.ndim == 3:
                yield f"{name}.{key}", ExpertStack(holder, key)


def layers_of(model: nn.Module, name: str, stack: ExpertStack) -> list[nn.Module]:
    """The adapted layers of a parameter's experts; before any is adapted, the experts' matrices."""
    module = model.get_submodule(name.rpartition(".")[0])
    adapted = module._modules.get(stack.name) if isinstance(module, FusedExperts) else None
    return list(adapted) if isinstance(adapted, nn.ModuleList) else list(stack.slices())
