"""`fast_starts`: PEFT's own call, with svdtune's decompositions inside.

PEFT starts LoRA layer by layer, each by a method or function of its own. `places` names those that
wait for a decomposition; while a block is entered, a function stands there that asks whether the
caller is inside a block, and else calls PEFT's. What the engine does not take (quantized, sharded
and meta weights, ranks that the weight does not have) goes to PEFT's too, errors included.
"""

import copy
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.osf import layer as osf_layer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import loftq_utils
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.linalg import Components, Factors, all_factors, check_band, top_factors
from svdtune.linalg.matrix import magnitude
from svdtune.spectra import factors
from svdtune.spectra.devices import devices_for_work, on_device
from svdtune.starts.pairs import (
    PISSA,
    LoraPair,
    check_not_asked,
    check_pissa,
    damped_covariance,
    from_factors,
    from_last_left,
    from_qr,
    residual,
    written_start,
)

Parts = TypeVar("Parts", Factors, LoraPair, Factors | None)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The triplets that PiSSA takes in the block that the calling thread is inside of.
_entered: ContextVar[Components | None] = ContextVar("svdtune.fast_starts", default=None)
# The layers of the adapter that is being injected whose start is still to come, by where their
# weights lie in memory: every further layer asks whether its own is tied to one.
_waiting: ContextVar["dict[int, Waiting] | None"] = ContextVar("svdtune.waiting_starts", default=None)


class Waiting(NamedTuple):
    """A layer and the name of its adapter, which PiSSA is to start. No weight is held: each is read
    when its turn comes, and let go once what is left of it stands in its place."""

    layer: LoraLayer
    adapter: str


class PeftPlace(NamedTuple):
    """Where PEFT decomposes a weight.

    Attributes:
        owner: the class or module.
        name: of the function there.
        parameters: its parameters as this code knows them.
        ours: takes the same arguments; NotImplemented where PEFT's own is to be called.
        any_triplets: whether it takes those that the block asks for, not its own.
        around: takes the same arguments; what PEFT's own runs inside of.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    ours: Callable[..., Any] = lambda *_, **__: NotImplemented
    any_triplets: bool = False
    around: Callable[..., AbstractContextManager[Any]] = lambda *_, **__: nullcontext()


@contextmanager
def fast_starts(components: Components = "first") -> Iterator[None]:
    """Inside the block, PEFT takes the starts of LoRA that need a decomposition from svdtune.

        with svdtune.fast_starts():
            model = get_peft_model(model, LoraConfig(init_lora_weights="pissa"))

    The starts are "pissa", "pissa_niter_N" (exact too: nothing is drawn at random), "olora",
    "mica", and the decompositions in "loftq", in `preprocess_corda` and, on a GPU, of OSF. They
    equal PEFT's own exact ones to rounding; singular vectors may differ in sign. What PEFT refuses
    is refused by PEFT. Weights on the CPU are decomposed on a GPU where there is one;
    SVDTUNE_DEVICE=cpu leaves them there.

    `components` is which triplets "pissa" starts from: "first", "middle", "last" (MiLoRA), or
    (start, stop) with stop - start = r. With another one than "first", the other starts above are
    refused, and so is a weight that PEFT would decompose itself.

    An adapter is saved without what is left of the base's weights. PEFT takes "pissa" and "olora"
    off again on loading; "pissa_niter_N" is saved as "pissa", other triplets under a name that
    PEFT refuses (docs/starts.md).

    The block is the calling thread's; other threads and what follows the block, in whichever way it
    is left, have PEFT as it was. Where a release of PEFT has other signatures than svdtune knows,
    a warning says so and PEFT's own start runs.

    Raises:
        SvdtuneError: `components` names no triplets, or not as many as a layer's r.
    """
    check_band(components)
    token = _entered.set(components)
    _Patches.enter()
    try:
        yield
    finally:
        _Patches.leave()
        _entered.reset(token)


class _Patches:
    """Holds the functions in their places while any thread is inside; the last to leave takes them
    out."""

    lock = threading.Lock()
    inside = 0
    put: tuple[tuple[PeftPlace, Any, Any], ...] = ()
    warned = False

    @classmethod
    def enter(cls) -> None:
        with cls.lock:
            cls.inside += 1
            if cls.inside == 1:
                every = places()
                known = [place for place in every if _is_known(place)]
                cls.put = tuple((place, own := getattr(place.owner, place.name), _door(place, own)) for place in known)
                for place, _, door in cls.put:
                    setattr(place.owner, place.name, door)
                changed = [place.name for place in every if place not in known]
                warn, cls.warned = bool(changed) and not cls.warned, cls.warned or bool(changed)
            else:
                warn = False
        if warn:
            warnings.warn(
                f"this release of PEFT has another {', '.join(changed)} than svdtune knows, so PEFT's own start runs there; "
                "upgrade svdtune to have it fast",
                SvdtuneWarning,
                stacklevel=4,
            )

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.inside -= 1
            if cls.inside == 0:
                for place, own, door in cls.put:
                    # whoever has put another function there since keeps it
                    if getattr(place.owner, place.name) is door:
                        setattr(place.owner, place.name, own)
                cls.put = ()


def _is_known(place: PeftPlace) -> bool:
    own = getattr(place.owner, place.name, None)
    return callable(own) and tuple(inspect.signature(own).parameters) == place.parameters


def _door(place: PeftPlace, own: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in a place: svdtune's inside a block, PEFT's otherwise."""

    @wraps(own)
    def door(*args: Any, **kwargs: Any) -> Any:
        if (components := _entered.get()) is not None:
            if not place.any_triplets:
                check_not_asked(components, place.name.strip("_"))
            done = place.ours(*args, **kwargs)
            if done is not NotImplemented:
                return done
            with place.around(*args, **kwargs):
                return own(*args, **kwargs)
        return own(*args, **kwargs)

    return door


@contextmanager
def _together(tuner: Any, model: Any, adapter_name: str, *_: Any, **__: Any) -> Iterator[None]:
    """Start the layers that PEFT makes inside the block once it has made all of them, so that
    several weights are decomposed at once; and let the configuration say what the start was."""
    waiting: dict[int, Waiting] = {}
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)
    _start_waiting(waiting)
    config = tuner.peft_config[adapter_name]
    init = getattr(config, "init_lora_weights", None)
    written = written_start(init, _entered.get() or "first")
    if written != init:
        own = copy.copy(config)  # the caller's may start another model
        own.init_lora_weights = written
        tuner.peft_config[adapter_name] = own


def _on_the_gpu(
    self: LoraLayer, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **_: Any
) -> AbstractContextManager[Any]:
    """A and B come to be on the GPU where the base weight lies. PEFT draws them at random on the
    CPU before the start takes their place, which is a good part of its time."""
    init, weight = config.init_lora_weights, getattr(self.get_base_layer(), "weight", None)
    replaced = isinstance(init, str) and (PISSA.fullmatch(init) or init.lower() in ("olora", "mica"))
    if not replaced or not _is_on_gpu(weight) or hasattr(weight, "ds_id"):  # DeepSpeed has its own places
        return nullcontext()
    return weight.device


def _start_waiting(waiting: dict[int, Waiting]) -> None:
    """Start the layers that wait, the first first, and leave none."""
    named = {str(at): one for at, one in waiting.items()}
    waiting.clear()
    ranks = {name: layer.r[adapter] for name, (layer, adapter) in named.items()}
    weights = {name: partial(_matrix, layer) for name, (layer, _) in named.items()}
    for name, found in factors(weights, ranks, components=_entered.get() or "first"):
        layer, adapter = named[name]
        weight = _matrix(layer)
        pair = from_factors(found, layer.scaling[adapter])
        _start(layer, adapter, LoraPair(*(part.to(weight.dtype) for part in pair)))  # PEFT too rounds them to it
        _take_off(layer, weight, pair, layer.scaling[adapter])


def _pissa_init(self: LoraLayer, adapter_name: str, init_lora_weights: str) -> Any:
    weight = _weight(self, adapter_name)
    components = _entered.get() or "first"
    known = PISSA.fullmatch(init_lora_weights) or init_lora_weights == written_start("pissa", components)
    if weight is None or not known:
        if components != "first":
            raise SvdtuneError(
                f"PEFT itself starts {init_lora_weights!r} of a weight that is quantized, sharded, on meta, not finite or has "
                "fewer triplets than r, and takes the first ones: give components='first', or leave the layer out"
            )
        return NotImplemented
    # before any weight is changed
    check_pissa(components, self.r[adapter_name], self.scaling[adapter_name], weight.shape)
    own: Any = self.get_base_layer().weight
    waiting, at, one = _waiting.get(), weight.data_ptr(), Waiting(self, adapter_name)
    # a variant reads what is started, and DeepSpeed takes a gathered weight away again
    if waiting is None or adapter_name in self.lora_variant or hasattr(own, "ds_id"):
        _start_waiting({at: one})
        return None
    if at in waiting:  # tied: its start comes off first, and what is left lies elsewhere
        _start_waiting(waiting)
        at = _matrix(self).data_ptr()
    waiting[at] = one
    return None


def _olora_init(self: LoraLayer, adapter_name: str) -> Any:
    weight = _weight(self, adapter_name)
    if weight is None or _is_transposed(self):  # PEFT factorises the weight as it is stored
        return NotImplemented
    pair = _where_fastest(from_qr, weight, self.r[adapter_name])
    _start(self, adapter_name, pair)
    _take_off(self, weight, pair, self.scaling[adapter_name])
    return None


def _mica_init(self: LoraLayer, adapter_name: str) -> Any:
    weight = _weight(self, adapter_name)
    if weight is None or self.lora_B[adapter_name].weight.is_meta:
        return NotImplemented
    pair = _where_fastest(from_last_left, weight, self.r[adapter_name])
    _start(self, adapter_name, LoraPair(*(part.to(weight.dtype) for part in pair)))
    return None


def _low_rank_decomposition(weight: Tensor, reduced_rank: int = 32) -> Any:
    if not _is_plain(weight) or reduced_rank > min(weight.shape):
        return NotImplemented
    factors = _where_fastest(top_factors, weight, reduced_rank)
    pair = from_factors(factors, 1.0)
    return {"L": pair.B, "R": pair.A, "U": factors.U, "S": factors.s, "Vh": factors.Vh, "reduced_rank": reduced_rank}


def _corda_eigens(linear: Any, config: LoraConfig) -> Any:
    from peft.tuners.lora.corda import CordaEigens

    stored, covariance = getattr(linear, "weight", None), getattr(linear, "covariance_matrix", None)
    # "kpm" takes the last triplets, which are no cheaper here than all are by LAPACK
    first = getattr(linear, "corda_method", None) == "ipm"
    if not first or not isinstance(stored, nn.Parameter) or covariance is None or not _is_plain(stored.data):
        return NotImplemented
    weight = stored.data.mT if isinstance(linear, Conv1D) else stored.data
    damped, inverse = damped_covariance(covariance)
    product = weight.float() @ damped
    if linear.rank > min(weight.shape) or not _is_plain(product):
        return NotImplemented
    factors = _where_fastest(top_factors, product, linear.rank)
    found: Any = CordaEigens  # attrs without its types
    return found(factors.s, factors.U.cpu(), (factors.Vh @ inverse).mT.cpu())


def _decompose_weight_matrix(weight: Tensor, top_k: int) -> Any:
    """OSF's frozen and trained triplets, as `peft.tuners.osf.utils` has them. On a CPU LAPACK's own
    SVD of all triplets is as quick."""
    if not _is_plain(weight) or not _has_gpu():
        return NotImplemented
    found = _where_fastest(lambda there, _: all_factors(there), weight, top_k)
    if found is None:
        return NotImplemented
    k = min(top_k, len(found.s))
    U, s, Vh = (part.to(weight.dtype) for part in found)
    high = {"U_high": U[:, :k], "S_high": s[:k], "V_high": Vh[:k]}
    low = {"U_low": U[:, k:], "S_low": s[k:], "V_low": Vh[k:]}
    trained = {name: nn.Parameter(part.contiguous()) for name, part in low.items()}
    return {name: part.contiguous() for name, part in high.items()} | trained | {"rank_high": k}


def places() -> list[PeftPlace]:
    """Every place; CorDA's where its own requirement, attrs, is installed."""
    inject = ("self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict")
    update = ("self", "adapter_name", "r", "lora_alpha", "config", "kwargs")
    found = [
        PeftPlace(BaseTuner, "inject_adapter", inject, any_triplets=True, around=_together),
        PeftPlace(LoraLayer, "update_layer", update, any_triplets=True, around=_on_the_gpu),
        PeftPlace(LoraLayer, "pissa_init", ("self", "adapter_name", "init_lora_weights"), _pissa_init, True),
        PeftPlace(LoraLayer, "olora_init", ("self", "adapter_name"), _olora_init),
        PeftPlace(LoraLayer, "mica_init", ("self", "adapter_name"), _mica_init),
        PeftPlace(loftq_utils, "_low_rank_decomposition", ("weight", "reduced_rank"), _low_rank_decomposition),
        PeftPlace(osf_layer, "decompose_weight_matrix", ("weight", "top_k"), _decompose_weight_matrix),
    ]
    with suppress(ImportError):
        from peft.tuners.lora import corda

        found.append(PeftPlace(corda, "collect_eigens_for_layer", ("linear", "config"), _corda_eigens))
    return found


def _weight(layer: LoraLayer, adapter: str) -> Tensor | None:
    """The base weight as a matrix [out, in]; None where it is PEFT's to decompose or to refuse."""
    stored: Any = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(stored, nn.Parameter) or not _is_plain(stored.data):
        return None
    weight = _matrix(layer)
    # PEFT cuts a larger rank short, where the engine would refuse it
    return weight if layer.r[adapter] <= min(weight.shape) else None


def _matrix(layer: LoraLayer) -> Tensor:
    """The base weight as it is now, as a matrix [out, in]."""
    weight: Tensor = getattr(layer.get_base_layer(), "weight").data  # noqa: B009
    return weight.mT if _is_transposed(layer) else weight


def _where_fastest(decompose: Callable[[Tensor, int], Parts], weight: Tensor, r: int) -> Parts:
    """decompose(weight, r) on a GPU where there is one, handed back to where the weight lies."""
    return on_device(lambda there: decompose(there, r), weight, devices_for_work()[0])


def _has_gpu() -> bool:
    return devices_for_work()[0].type == "cuda"


def _is_on_gpu(weight: Any) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.is_cuda


def _is_plain(weight: Tensor) -> bool:
    """Whether it is a matrix of finite numbers in one piece."""
    plain = type(weight) is Tensor and weight.ndim == 2 and weight.dtype in _DTYPES and not weight.is_meta
    return plain and weight.numel() > 0 and math.isfinite(magnitude(weight))


def _is_transposed(layer: LoraLayer) -> bool:
    return bool(getattr(layer, "fan_in_fan_out", False))


def _start(layer: LoraLayer, adapter: str, pair: LoraPair) -> None:
    layer.lora_A[adapter].weight.data = pair.A
    layer.lora_B[adapter].weight.data = pair.B


def _take_off(layer: LoraLayer, weight: Tensor, pair: LoraPair, scaling: float) -> None:
    """Take scaling · B A off the base weight, which keeps its dtype and layout."""
    base: Any = layer.get_base_layer()
    left = residual(weight, pair, scaling)
    base.weight.data = left.mT.contiguous() if _is_transposed(layer) else left
