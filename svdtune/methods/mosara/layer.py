"""MoSaraLinear: Mo-SARA's layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdtune.errors import SvdtuneError
from svdtune.linalg import Factors
from svdtune.methods.compute.lowrank import compute_dtype
from svdtune.methods.compute.together import Keep
from svdtune.methods.compute.transforms import under_transform
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.convolution import as_channels, expand, per_position, project
from svdtune.methods.layers.samples import Samples
from svdtune.methods.mosara.config import MoSaraConfig
from svdtune.methods.mosara.gates import GATES, Gate, mean_head
from svdtune.methods.mosara.math import (
    Terms,
    add_mosara_by_sample,
    mixed_values,
    mosara_linear,
    mosara_pair,
    random_start,
    ready,
    scaled_rows,
    token_gate,
)


class MoSaraLinear(SvdLayer[MoSaraConfig]):
    """A layer with Mo-SARA adapters.

    Trained: mosara_lambda [m, k], mosara_v [out] (or [in] in front), mosara_w1 [k], mosara_w2 [m].
    Frozen: frozen_U [out, k], frozen_V [in, k], the weight's leading singular vectors in fp32.
    """

    method = "mosara"
    trained = ("mosara_lambda", "mosara_v", "mosara_w1", "mosara_w2")
    frozen = ("frozen_U", "frozen_V")
    frozen_U: nn.ParameterDict
    frozen_V: nn.ParameterDict

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self._ready: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._ready = None

    def new_tensors(self, r: int, config: MoSaraConfig, factors: Factors | None) -> dict[str, Tensor | None]:
        lam, w1, w2 = random_start(r, config.num_heads, config.has_router)
        length = self.in_features if config.v_position == "front" else self.out_features
        v = torch.zeros(length) if config.init_weights else torch.rand(length)
        if factors is not None:
            frozen = self.frozen_from(factors)
        else:
            sizes = {"frozen_U": self.out_features, "frozen_V": self.in_features}
            frozen = {name: torch.randn(n, r) / n**0.5 for name, n in sizes.items()}
        return {
            "mosara_lambda": lam,
            "mosara_v": v if config.use_v else None,
            "mosara_w1": w1,
            "mosara_w2": w2,
            **frozen,
        }

    @staticmethod
    def frozen_from(factors: Factors) -> dict[str, Tensor]:
        return {"frozen_U": factors.U, "frozen_V": factors.Vh.mT.contiguous()}

    def _tensors(self, adapter: str) -> Terms:
        names = ("frozen_U", "frozen_V", "mosara_lambda", "mosara_v", "mosara_w1", "mosara_w2")
        U, V, lam, v, w1, w2 = (self.adapter_tensor(name, adapter) for name in names)
        assert U is not None
        assert V is not None
        assert lam is not None
        return Terms(U, V, mean_head(lam) if self._gate(adapter) == "none" else lam, v, w1, w2, self._front(adapter))

    def _ready_V(self, x: Tensor, adapter: str) -> Tensor | None:
        """V in the dtype of the products, the last one kept from one step to the next where that is
        not V itself."""
        V, dtype = self.frozen_V[adapter], compute_dtype(x)
        if self._front(adapter) or dtype == V.dtype or torch.compiler.is_compiling() or under_transform():
            return None
        key = (dtype, V.device, V._version)
        if self._ready is None or self._ready[0] is not V or self._ready[1] != key:
            self._ready = (V, key, ready(V.detach(), dtype))
        return self._ready[2]

    def _front(self, adapter: str) -> bool:
        return self.configs[adapter].v_position == "front"

    def _gate(self, adapter: str) -> str:
        return self.configs[adapter].gate

    def _other_gate(self, adapter: str) -> Gate | None:
        """The gate if it is not the paper's. None also without a router."""
        config = self.configs[adapter]
        return None if config.gate == "softmax" or not config.has_router else GATES[config.gate]

    def fused(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, x_adapter: Tensor | None, p: float, adapter: str
    ) -> Tensor:
        how = self._ready_V(x, adapter), self._keep(x, adapter), self._other_gate(adapter)
        return mosara_linear(x, weight, bias, self._tensors(adapter), x_adapter, *how)

    def add_to(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        how = None, self._keep(x, adapter), self._other_gate(adapter)
        return mosara_linear(x, None, y, self._tensors(adapter), None, *how)

    def _keep(self, x: Tensor, adapter: str) -> Keep | None:
        """What keeps that which is formed for the first token of a generation; None outside one."""
        if self.together is None:
            return None
        names = ("frozen_U", "frozen_V", "mosara_v", "mosara_w1")
        tensors = [self.adapter_tensor(name, adapter) for name in names]
        return self.together.keeper(self, adapter, tensors, compute_dtype(x))

    def add_convolved(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Eq. 5 and 6 with each position of the output as a token. The gate reads the patch that
        the kernel sees there."""
        U, V, lam, v, w1, w2, front = self._tensors(adapter)
        if w1 is None or w2 is None:
            return super().add_convolved(y, x, adapter)
        base = self.convolution()
        positions, groups = len(base.kernel_size), base.groups
        z = per_position(project(base, x, scaled_rows(V, v) if front else V), groups, positions)
        rows = z.reshape(-1, z.shape[-1])
        if front:
            gate_input = per_position(project(base, x, V @ w1[:, None].to(V.dtype)), groups, positions).reshape(-1)
        else:
            gate_input = rows @ w1.to(rows.dtype)
        gate = token_gate(gate_input, w2)
        if other := self._other_gate(adapter):
            gate = other(gate)
        t = as_channels((rows * mixed_values(gate, lam).to(rows.dtype)).view(z.shape), positions)
        return y + expand(base, t, U if front else scaled_rows(U, v)).to(y.dtype)

    def add_by_sample(self, y: Tensor, x: Tensor, samples: Samples) -> Tensor:
        """As for every method. Samples whose adapters are of one kind are computed together."""
        if self._is_convolution:
            return super().add_by_sample(y, x, samples)
        if self not in samples.kept:
            samples.kept[self] = self._by_kind(samples, x.device)
        y = y.clone()  # it may be a view, or be kept for the base's own backward pass
        for one, where, (lam, v, w1, w2) in samples.kept[self]:
            terms = Terms(self.frozen_U[one], self.frozen_V[one], lam, v, w1, w2, self._front(one))
            own, own_x = (y, x) if where is None else (y[where], x[where])
            add_mosara_by_sample(own, own_x, terms, self._ready_V(x, one), self._other_gate(one))
            if where is not None:
                y[where] = own
        return y

    def _by_kind(self, samples: Samples, device: torch.device) -> list[Any]:
        """Groups of samples whose adapters differ in values alone. Of each group: one of its
        adapters, the indices of its samples, and their λ, v, w₁ and w₂, stacked.

        A single group takes all samples: its indices are None, and samples without an adapter here
        have zeros.
        """
        kinds: dict[Any, list[int]] = {}
        for place, adapter in enumerate(samples):
            if adapter in self.r:
                U, V, lam, v, w1, _, front = self._tensors(adapter)
                kind = (id(U), id(V), lam.shape, v is None, w1 is None, front, self._gate(adapter))
                kinds.setdefault(kind, []).append(place)
        found: list[Any] = []
        for places in kinds.values():
            whole = len(kinds) == 1
            own = [self._tensors(samples[place])[2:6] for place in places]
            stacks = [None if some[0] is None else torch.stack(some) for some in zip(*own, strict=True)]
            where = torch.tensor(places, device=device)
            if whole:
                stacks = [
                    None
                    if stack is None
                    else stack.new_zeros(len(samples), *stack.shape[1:]).index_copy(0, where, stack)
                    for stack in stacks
                ]
            found.append((samples[places[0]], None if whole else where, stacks))
        return found

    @classmethod
    def low_rank_pair(cls, tensors: Mapping[str, Tensor], config: MoSaraConfig) -> tuple[Tensor, Tensor]:
        check_is_matrix(config)
        U, V, lam = (tensors[name] for name in ("frozen_U", "frozen_V", "mosara_lambda"))
        # one head, or no gate
        return mosara_pair(U, V, mean_head(lam), tensors.get("mosara_v"), config.v_position == "front")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.configs[adapter_name].has_router


def check_is_matrix(config: MoSaraConfig, adapter: str = "") -> None:
    """Raise `SvdtuneError` for an adapter that is no matrix: its router mixes several heads."""
    if config.has_router:
        name = f" {adapter!r}" if adapter else ""
        raise SvdtuneError(
            f"the adapter{name} is Mo-SARA with {config.num_heads} heads, which cannot be merged or exported: its router mixes "
            "the heads anew for every token, so no single weight equals it. Keep it as an adapter (PeftModel), or train with "
            "num_heads=1 or gate='none', which merge exactly"
        )
