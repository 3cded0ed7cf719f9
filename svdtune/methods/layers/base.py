"""SvdLayer: what the adapted layers of the three methods share inside PEFT. Their forward pass and
their moves between devices are here; loading and merging have files of their own.

A method's own layer says which tensors it has, how they start and what they compute. Everything
that PEFT asks of a layer is here. Frozen factors are parameters without a gradient, in PEFT's
`other_param_names`: they are counted, sharded and saved, and never become trainable. Their names
lack the method's prefix, since PEFT's tools take a name with it for trained. `frozen.py` has what
this means for a merged layer.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.linalg import Factors
from svdtune.methods.compute import kernels
from svdtune.methods.compute.together import Together
from svdtune.methods.config import SvdConfig
from svdtune.methods.layers.convolution import Convolution, add_convolved
from svdtune.methods.layers.frozen import FrozenTensors
from svdtune.methods.layers.merge import Merging
from svdtune.methods.layers.quantization import device_and_dtype
from svdtune.methods.layers.samples import Samples
from svdtune.methods.layers.state_dict import StateDictLayer, parameters_go_to_meta

Config = TypeVar("Config", bound=SvdConfig)

Shapes = dict[tuple[int, int, int], dict[str, Tensor]]
"""The tensors of one adapter by name, on the meta device, by a layer's (out, in) and rank."""


class SvdLayer(StateDictLayer, Merging, Generic[Config]):
    """A linear layer or a convolution with adapters of one method around it.

    Subclasses name their tensors in `trained` and `frozen`; each becomes a dict keyed by adapter
    name.

    Attributes:
        r: rank by adapter name.
        recomputable: adapters whose frozen tensors come out the same when they are computed from
            the base weight again.
        together: what the layers of a model share during a forward pass; the tuner sets it.
        called: whether `forward` ever ran, outside of compiled code.
        in_features, out_features: of the base layer's matrix [out, in]; of a convolution, in /
            groups · k ... and out.
    """

    method: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    frozen: ClassVar[tuple[str, ...]]
    draws_masks: ClassVar[bool] = False
    together: Together | None = None
    called: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "method"):
            return
        cls.adapter_layer_names = cls.trained
        cls.other_param_names = (*cls.frozen, f"{cls.method}_dropout", "r", "configs")

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.configs: dict[str, Config] = {}
        for name in self.trained:
            setattr(self, name, nn.ParameterDict())
        for name in self.frozen:
            setattr(self, name, FrozenTensors())
        setattr(self, f"{self.method}_dropout", nn.ModuleDict())
        self._disable_adapters = False
        self.recomputable: set[str] = set()
        self._start_loading()
        self._start_merging()
        self.forget_values()
        base = self.get_base_layer()
        self._is_conv1d = isinstance(base, Conv1D)
        self._is_convolution = isinstance(base, spectra.CONVOLUTIONS)
        self.out_features, self.in_features = spectra.matrix_shape(base)

    # What a method says of itself

    @abstractmethod
    def new_tensors(self, r: int, config: Config, factors: Factors | None) -> dict[str, Tensor | None]:
        """The starting value of every tensor in `trained` and `frozen`. A tensor that the settings
        leave out is None.

        Without `factors` the values are those of a random start. The shapes are the same either
        way.
        """

    @staticmethod
    def frozen_from(factors: Factors) -> dict[str, Tensor]:
        """The tensors in `frozen`, by name, that a weight's factors give."""
        return {}

    @abstractmethod
    def fused(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, x_adapter: Tensor | None, p: float, adapter: str
    ) -> Tensor:
        """Base layer and adapter in one autograd node, for a weight [out, in] that may be read
        directly.

        `x_adapter` is the adapter's input if dropout changed it. With `p` > 0 a method that
        `draws_masks` applies dropout inside its kernels.
        """

    @abstractmethod
    def add_to(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        """The base layer's output y with the adapter's addition for its input x added in place."""

    def add_convolved(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        """The same for a convolution, x [N, in, ...] and y [N, out, ...], not in place."""
        return add_convolved(self.convolution(), y, x, *self.pair(adapter))

    @classmethod
    @abstractmethod
    def low_rank_pair(cls, tensors: Mapping[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
        """A [in, w] and B [out, w] with ΔW = B Aᵀ, what an adapter adds to the base weight.

        Args:
            tensors: an adapter's tensors by their names in `trained` and `frozen`, from a layer or
                from a file.
            config: its configuration.

        Raises:
            SvdtuneError: the adapter is no matrix.
        """

    def convolution(self) -> Convolution:
        """The base layer, which is a convolution."""
        base = self.get_base_layer()
        assert isinstance(base, spectra.CONVOLUTIONS)
        return base

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`low_rank_pair` of an adapter as it is now, with gradients to the trained tensors."""
        tensors = {name: self.adapter_tensor(name, adapter) for name in (*self.trained, *self.frozen)}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return self.low_rank_pair(present, self.configs[adapter])

    @torch.no_grad()
    def delta(self, adapter: str) -> Tensor:
        """ΔW [out, in], in the factors' dtype.

        Raises:
            SvdtuneError: the adapter is no matrix.
        """
        A, B = self.pair(adapter)
        return B @ A.mT

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`delta` in the form in which the base layer stores its weight: [in, out] for Conv1D.
        PEFT's LoRA conversion asks for it."""
        return spectra.as_stored(self.get_base_layer(), self.delta(adapter))

    # An adapter's beginning and end

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        config: Config,
        factors: Factors | None = None,
        load_only: bool = False,
        shapes: Shapes | None = None,
    ) -> None:
        """Add an adapter of rank r.

        `load_only` allocates its tensors, and waits for values from a checkpoint. `shapes` holds
        the shapes of earlier layers, and gets those of this one.
        """
        if r > (largest := min(self.in_features, self.out_features)):
            raise SvdtuneError(
                f"r = {r} is larger than a layer [{self.out_features}, {self.in_features}] allows; its rank is at most "
                f"{largest}. Lower `r`, set it for this layer in `rank_pattern`, or leave the layer out of `target_modules`"
            )
        self.r[adapter_name] = r
        self.configs[adapter_name] = config
        tensors = self._starting_tensors(r, config, factors, load_only, {} if shapes is None else shapes)
        trains = () if config.inference_mode or adapter_name not in self.active_adapters else self.trained
        for name, tensor in tensors.items():
            getattr(self, name)[adapter_name] = nn.Parameter(tensor.contiguous(), requires_grad=name in trains)
        dropouts = getattr(self, f"{self.method}_dropout")
        # adapters with the same dropout share its module: a thousand modules would fill the memory
        alike = (other for other in dropouts.values() if getattr(other, "p", 0.0) == config.dropout)
        new = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        dropouts[adapter_name] = next(alike, new)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if load_only:
            self._awaited.add(adapter_name)
        else:
            for name in self.frozen:
                getattr(self, name).share(adapter_name, getattr(self, name)[adapter_name])

    def _starting_tensors(
        self, r: int, config: Config, factors: Factors | None, load_only: bool, shapes: Shapes
    ) -> dict[str, Tensor]:
        """The tensors of `new_tensors` that exist. With `load_only` they are zeros of the same
        shapes, and no random number is drawn."""
        if not load_only:
            return {name: t for name, t in self.new_tensors(r, config, factors).items() if t is not None}
        kind = self.out_features, self.in_features, r
        if kind not in shapes:
            with torch.device("meta"):
                shapes[kind] = {name: t for name, t in self.new_tensors(r, config, None).items() if t is not None}
        device = "meta" if parameters_go_to_meta() else "cpu"
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=device) for name, t in shapes[kind].items()}

    def adapter_tensor(self, name: str, adapter: str) -> Tensor | None:
        """One tensor of an adapter; None if its settings leave it out."""
        # read in every step, and nn.Module's own look-up is slow
        of_name: Any = self._modules[name]
        parameters: dict[str, Tensor | None] = of_name._parameters
        if adapter in parameters:
            return parameters[adapter]  # and no get(): ZeRO-3 gathers what [] asks for
        if adapter in of_name._buffers:  # frozen, of a merged layer
            return cast(Tensor, of_name._buffers[adapter])
        # a replica of nn.DataParallel has tensors in place of parameters
        of_replica: dict[str, Tensor] = of_name.__dict__.get("_former_parameters", {})
        return of_replica.get(adapter)

    def adapter_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Every tensor that an adapter has, by name in `trained` and `frozen`."""
        found = {name: self.adapter_tensor(name, adapter) for name in (*self.trained, *self.frozen)}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is being trained of its adapters, by name and adapter: "sorsa_U.default"."""
        for name in self.trained:
            for adapter, tensor in getattr(self, name).items():
                if tensor.requires_grad:
                    yield f"{name}.{adapter}", tensor

    def lacks_regularizer(self) -> bool:
        """Whether an adapter is trained whose configuration asks for a regularizer, and none ever
        acted."""
        return False

    def starts_moved(self) -> bool:
        """Whether one of the adapters changes the layer's output before it is trained."""
        return False

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self._values is not None:
            self.keep_values()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._awaited.discard(adapter_name)
        self.recomputable.discard(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to its base layer's device. PEFT's own version also rounds the factors to
        the base dtype."""
        device = device or device_and_dtype(self.get_base_layer())[0]
        if device.type == "meta":
            return
        for name in (*self.trained, *self.frozen):
            tensor = self.adapter_tensor(name, adapter_name)
            if tensor is not None and not tensor.is_meta and tensor.device != device:
                getattr(self, name)[adapter_name] = nn.Parameter(tensor.detach().to(device), tensor.requires_grad)

    # Forward

    def check_samples(self, names: Collection[str]) -> None:
        """Raise `SvdtuneError` where samples of a batch cannot have these adapters."""
        if self.merged:
            raise SvdtuneError(
                f"`adapter_names` cannot be heeded while an adapter is merged ({', '.join(self.merged_adapters)}): every "
                "sample would have it. Call model.unmerge_adapter() first"
            )
        self._check_loaded(names)

    def forward(self, x: Tensor, *args: Any, adapter_names: Samples | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output with every active adapter's addition; with `adapter_names`, with
        that of each sample's own adapter."""
        if not torch.compiler.is_compiling() and not self.called:
            self.called = True
        if adapter_names is not None and not self._disable_adapters:
            adapter_names.check(x)
            return self.add_by_sample(self.base_layer(x, *args, **kwargs), x, adapter_names)
        sole = None if args or kwargs else self.sole_adapter()
        if sole is not None:
            p = self.dropout_p(sole)
            in_kernel = p > 0 and self.draws_masks and kernels.available(x)
            x_adapter = getattr(self, f"{self.method}_dropout")[sole](x) if p > 0 and not in_kernel else None
            return self.fused(x, *self.readable(), x_adapter, p if in_kernel else 0.0, sole)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_output(x, (), *args, **kwargs)
        if self.merged:
            return self.base_output(x, self.merged_adapters, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.r]
        if self._awaited:
            self._check_loaded(active)
        self._check_in_memory(active, x)
        y = self.base_output(x, active, *args, **kwargs)
        if self.quantization_backend is not None and active and y.requires_grad:
            y = y.clone()  # it may be a view through which no gradient of an addition finds back
        for adapter in active:
            x_adapter = getattr(self, f"{self.method}_dropout")[adapter](x)
            y = self.add(y, x_adapter, adapter)
        return y

    def sole_adapter(self) -> str | None:
        """The one adapter that `forward` computes in a node together with the base layer; None if
        it cannot."""
        if self._disable_adapters or self.merged_adapters or self._awaited:
            return None
        active = [name for name in self.active_adapters if name in self.r]
        return active[0] if len(active) == 1 and self._may_read_weight() else None

    def readable(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight [out, in] and bias."""
        base: Any = self._modules["base_layer"]
        return base.weight.mT if self._is_conv1d else base.weight, base.bias

    def dropout_p(self, adapter: str) -> float:
        """The probability with which dropout zeroes an entry of the adapter's input now."""
        by_adapter: Any = self._modules[f"{self.method}_dropout"]
        dropout = by_adapter._modules[adapter]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    def add(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        """`add_to` or `add_convolved`, as the base layer needs it."""
        return self.add_convolved(y, x, adapter) if self._is_convolution else self.add_to(y.contiguous(), x, adapter)

    def is_silent(self) -> bool:
        """Whether `forward` does nothing but call the base layer."""
        if self.disable_adapters:
            return not self.merged
        return self.merged or not any(name in self.r for name in self.active_adapters)

    def base_output(self, x: Tensor, present: Collection[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output before the adapters in `present` are added. Merged ones are in
        its weight already."""
        return self.made_whole(self.base_layer(x, *args, **kwargs), x, present)

    def made_whole(self, y: Tensor, x: Tensor, present: Collection[str]) -> Tensor:
        """The base layer's output y, completed by what its stored weight lacks, unless an adapter
        in `present` adds that."""
        return y

    def add_by_sample(self, y: Tensor, x: Tensor, samples: Samples) -> Tensor:
        """The base layer's output y [N, ...], with each sample's own adapter added to its part of
        the batch."""
        whole = torch.empty_like(y)  # y may be a view, or be kept for the base's own backward pass
        for adapter, where in samples.places(x.device).items():
            present = [adapter] if adapter in self.r else []
            own = self.made_whole(y[where], x[where], present)
            whole[where] = self.add(own, x[where], adapter) if present else own
        return whole

    def _may_read_weight(self) -> bool:
        """Whether a product with the base layer's weight equals a call of the layer.

        It does not for other classes (quantized, already adapted), for weights that Accelerate
        brings in at the call, for sharded weights, for a weight that is trained itself, and for a
        layer with hooks.
        """
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        return (
            type(base) in (nn.Linear, Conv1D)
            and type(weight) is nn.Parameter
            and not weight.is_meta
            and not weight.requires_grad
            and weight.is_floating_point()
            and "forward" not in base.__dict__
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return f"svdtune.{super().__repr__()}"
