"""DyLoRA: a LoRA whose leading ranks are each trained to do alone, as a PEFT method.

Every training step draws a rank b uniformly from r_min..r and trains with the first b rows of A and
columns of B alone:

    y = x Wᵀ + (α / b) x A[:b]ᵀ B[:, :b]ᵀ      A [r, in], B [out, r]

(Valipour et al., DyLoRA, Algorithm 1, without "frozen"). Outside of training it is the LoRA of the
whole rank r, α / r and all, and merges as any other. One draw holds for all layers; one of another
rank is cut at the same share of its own.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, LoraModel, PeftConfig, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.errors import SvdtuneError

# Of LoRA's settings, those that mean the same here.
_TAKEN = {
    "r",
    "rank_pattern",
    "lora_alpha",
    "alpha_pattern",
    "lora_dropout",
    "fan_in_fan_out",
    "init_lora_weights",
    "bias",
}
_TAKEN |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "r_min"}
_STARTS = (True, False, "gaussian")


@dataclass
class DyLoraConfig(LoraConfig):
    """LoRA's settings, and the lowest rank that is trained for; see `peft.LoraConfig`.

    Args:
        r_min: the lowest rank that a step may be cut to.

    Raises:
        SvdtuneError: a value outside its range, or a variant of LoRA that cannot be cut.
    """

    method: ClassVar[str] = "dylora"

    r_min: int = field(default=1, metadata={"help": "Lowest rank that a training step may be cut to."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        if problems := list(self._problems()):
            raise SvdtuneError(f"{type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name, r in {
            "r": self.r,
            **{f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()},
        }.items():
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                yield f"`{name}` must be a whole number of at least 1; got {r!r}"
        if isinstance(self.r_min, bool) or not isinstance(self.r_min, int) or not 1 <= self.r_min <= self.r:
            yield f"`r_min` must be a whole number from 1 to r = {self.r}; got {self.r_min!r}"
        if self.init_lora_weights not in _STARTS:
            yield f"`init_lora_weights` must be one of {', '.join(map(repr, _STARTS))}; got {self.init_lora_weights!r}"
        inherited = {field.name for field in dataclasses.fields(cast(type[PeftConfig], LoraConfig.__base__))}
        for each in dataclasses.fields(self):
            usual = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            if each.name not in _TAKEN | inherited and (value := getattr(self, each.name)) != usual:
                yield f"`{each.name}` is none of DyLoRA's settings; got {value!r:.60}"


class NestedRank:
    """Where the layers of a model look up the share of their rank that the current step keeps."""

    def __init__(self) -> None:
        self.share: Tensor | None = None

    def draw(self, model: nn.Module, args: Any) -> None:
        """Draw a share in [0, 1); a hook before the forward pass of a whole model."""
        if model.training:
            self.share = torch.rand(()).to(next(model.parameters()).device)

    def of(self, r: int, r_min: int, device: torch.device) -> Tensor:
        """The rank b from r_min to r that a layer of rank r keeps, as a tensor []; shapes never
        depend on it."""
        r_min = min(r_min, r)
        assert self.share is not None  # drawn before the forward pass of the model
        return r_min + (self.share.to(device) * (r - r_min + 1)).floor()


class DyLoraLinear(lora.Linear):
    """LoRA's layer, cut to the drawn rank while it trains."""

    nested: NestedRank

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] → [..., out]."""
        if not self.training or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                y = y + self._cut(adapter, x)
        return y.to(dtype)

    def _cut(self, adapter: str, x: Tensor) -> Tensor:
        A: Any = self.lora_A[adapter]
        B, r = self.lora_B[adapter], self.r[adapter]
        b = self.nested.of(r, self.r_min[adapter], x.device)
        z = A(self.lora_dropout[adapter](self._cast_input_dtype(x, A.weight.dtype)))
        kept = torch.arange(r, device=z.device) < b
        return B(z * kept) * (self.scaling[adapter] * r / b)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        config = kwargs["config"]
        assert isinstance(config, DyLoraConfig)
        if "r_min" not in self.__dict__:
            self.r_min: dict[str, int] = {}
        self.r_min[adapter_name] = config.r_min


class DyLoraModel(LoraModel):
    """A model with DyLoRA adapters; PEFT makes it inside `get_peft_model` and
    `PeftModel.from_pretrained`."""

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.nested = NestedRank()
        self._hook = model.register_forward_pre_hook(self.nested.draw)

    # PEFT's is annotated with None, and returns the model
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        self._hook.remove()
        return cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs))

    # a method of the instance, for `nested`; PEFT's is static, and is called on the instance too
    def _create_new_module(  # type: ignore[override]
        self, lora_config: DyLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> DyLoraLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if type(base) not in (nn.Linear, Conv1D):
            raise SvdtuneError(
                f"DyLoRA adapts Linear and Conv1D; {kwargs['target_name']!r} is a {type(base).__name__}. Leave it out of "
                "`target_modules`, or load the model unquantized"
            )
        lora_config.fan_in_fan_out = type(base) is Conv1D
        kwargs["is_target_conv_1d_layer"] = lora_config.fan_in_fan_out
        layer = DyLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        layer.nested = self.nested
        return layer
