"""Bottleneck adapters, in series with a module and parallel to it, as a PEFT method.

    A(h) = s · f(h Dᵀ) Uᵀ   h [..., d_in], D [b, d_in], U [d_out, b], f a nonlinearity, s a constant

    parallel   y = g(x) + A(x)               He et al., Towards a Unified View of PETL, Table 1
    series     y = g(x) + A(g(x))            Houlsby et al., PETL for NLP, §2.1
               y = g(x + A(x))               where g widens: LLM-Adapters (Hu et al.)

g is the adapted module. In series the adapter sits on its narrower side, so that it is as wide as
the model's hidden states: LLM-Adapters puts it before gate_proj, up_proj, fc_in and fc1, and behind
down_proj, fc_out and fc2. It has no biases either. U = 0 at the start, so nothing changes until the
first step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.methods.config import as_set, is_number_in, one_of

# LLM-Adapters' defaults (peft/src/peft/mapping.py). With bottlenecks of 256 they train what SARA's
# Table 1 says: of LLaMA-7B, LLaMA-13B and GPT-J 2.9, 2.4 and 1.9 % in series, 2.9, 2.4 and 2.8 %
# parallel.
_LLAMA = {"series": ["gate_proj", "up_proj", "down_proj"], "parallel": ["q_proj", "k_proj", "v_proj"]}
_GPTJ = {"series": ["fc_in", "fc_out"], "parallel": ["q_proj", "k_proj", "v_proj"]}
_OPT = {"series": ["fc1", "fc2"], "parallel": ["q_proj", "k_proj", "v_proj"]}
_BLOOM = {"series": ["dense_h_to_4h", "dense_4h_to_h"], "parallel": ["query_key_value"]}
_LIKE_LLAMA = "llama mistral gemma gemma2 gemma3_text qwen2 qwen3 smollm3 olmo olmo2"
TARGETS = dict.fromkeys(_LIKE_LLAMA.split(), _LLAMA) | {"gptj": _GPTJ, "opt": _OPT, "bloom": _BLOOM}

_TRAINED = {"prelu", "xielu"}  # nonlinearities with parameters of their own

_NO_MERGE = (
    "a bottleneck adapter cannot be merged: its nonlinearity makes it no matrix that a weight could take up. Keep the adapter "
    "beside the base model; `unload()` takes it off again"
)


@dataclass
class BottleneckConfig(PeftConfig):
    """Series or parallel bottleneck adapters; the defaults are LLM-Adapters'.

    Args:
        placement: "series" with the module or "parallel" to it.
        bottleneck_size: b, the adapter's inner width.
        non_linearity: f, by its name in Transformers: tanh, relu, gelu, silu...
        scaling: s, a constant; He et al. take 4 for their scaled parallel adapter.
        dropout: probability with which entries of the adapter's input are zeroed during training.
        init_weights: True: D Kaiming uniform, U = 0, so that nothing changes at the start. False:
            both normal with a standard deviation of 0.02, as LLM-Adapters' code starts.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in
            LoRA. Without target_modules, those that LLM-Adapters adapts, where it knows the
            architecture.

    Raises:
        SvdtuneError: a value outside its range; all of them in one message.
    """

    method: ClassVar[str] = "bottleneck"

    placement: str = field(default="series", metadata={"help": "series with the module, or parallel to it."})
    bottleneck_size: int = field(default=256, metadata={"help": "Inner width of the adapter."})
    non_linearity: str = field(default="tanh", metadata={"help": "Nonlinearity, by its name in Transformers."})
    scaling: float = field(default=1.0, metadata={"help": "Constant factor of the adapter's output."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    init_weights: bool = field(default=True, metadata={"help": "Start without effect (True), or at random (False)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of the modules to adapt."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that `layers_to_transform` counts in."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if problems := list(self._problems()):
            raise SvdtuneError(f"{type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        yield from one_of("placement", self.placement, ("series", "parallel"))
        size = self.bottleneck_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            yield f"`bottleneck_size` must be a whole number of at least 1; got {size!r}"
        usable = sorted(set(ACT2FN) - _TRAINED)
        if self.non_linearity not in usable:
            yield f"`non_linearity` must be one of Transformers' ({', '.join(usable)}); got {self.non_linearity!r}"
        if not is_number_in(self.scaling, -math.inf, math.inf):
            yield f"`scaling` must be a finite number; got {self.scaling!r}"
        if not is_number_in(self.dropout, 0, 1, high_open=True):
            yield f"`dropout` must lie in [0, 1); got {self.dropout!r}"


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with bottleneck adapters; D and U of each are `bottleneck_down` and
    `bottleneck_up`."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_activation", "configs")

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = spectra.matrix_shape(base_layer)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_dropout, self.bottleneck_activation = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, BottleneckConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter."""
        series_width = min(self.in_features, self.out_features)
        parallel = config.placement == "parallel"
        down = nn.Linear(self.in_features if parallel else series_width, config.bottleneck_size, bias=False)
        up = nn.Linear(config.bottleneck_size, self.out_features if parallel else series_width, bias=False)
        if config.init_weights:
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        else:
            nn.init.normal_(down.weight, std=0.02)
            nn.init.normal_(up.weight, std=0.02)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.bottleneck_activation[adapter_name] = ACT2FN[config.non_linearity]
        self.configs[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] → [..., out], by the equations at the head of this file."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]
        series = [name for name in active if self.configs[name].placement == "series"]
        before = series if self.out_features > self.in_features else []
        parallel = [self.change(name, x) for name in active if name not in series]
        for name in before:
            x = _plus(x, self.change(name, x))
        y = self.base_layer(x, *args, **kwargs)
        for change in parallel:
            y = _plus(y, change)
        for name in [] if before else series:
            y = _plus(y, self.change(name, y))
        return y

    def change(self, adapter: str, h: Tensor) -> Tensor:
        """A(h), in the adapter's own dtype."""
        down: Any = self.bottleneck_down[adapter]
        up, f = self.bottleneck_up[adapter], self.bottleneck_activation[adapter]
        h = self.bottleneck_dropout[adapter](self._cast_input_dtype(h, down.weight.dtype))
        return up(f(down(h))) * self.configs[adapter].scaling

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not there.

        Raises:
            SvdtuneError: always.
        """
        raise SvdtuneError(_NO_MERGE)

    def unmerge(self) -> None:
        """Nothing to do: nothing is ever merged."""

    def __repr__(self) -> str:
        return f"svdtune.{super().__repr__()}"


def _plus(h: Tensor, change: Tensor) -> Tensor:
    """The sum, rounded once to h's dtype."""
    return (h + change).to(h.dtype)


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters; PEFT makes it inside `get_peft_model` and
    `PeftModel.from_pretrained`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = TARGETS  # type: ignore[assignment]  # by placement; read below alone

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, BottleneckConfig)
        if peft_config.target_modules is None:
            known = TARGETS.get(model_config.get("model_type", ""))
            if known is None:
                raise SvdtuneError(
                    f"there are no usual target modules for {model_config.get('model_type')!r}; name them in "
                    "`target_modules`: LLM-Adapters puts series adapters into the MLP and parallel ones beside attention's"
                )
            peft_config.target_modules = as_set(known[peft_config.placement])
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *_: Any,
        **__: Any,
    ) -> None:
        assert isinstance(peft_config, BottleneckConfig)
        if isinstance(target, BottleneckLayer):
            layer = target
        else:
            if isinstance(target, spectra.CONVOLUTIONS) or not (
                isinstance(target, Conv1D) or hasattr(target, "in_features")
            ):
                raise SvdtuneError(
                    f"bottleneck adapters go on linear layers; {current_key!r} is a {type(target).__name__}. Leave it out of "
                    "`target_modules`"
                )
            layer = BottleneckLayer(target)
            layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise SvdtuneError(_NO_MERGE)
