"""What the start of an adapter takes from the base weights: ranks, factors and fingerprints.
Processes share the work; see `svdtune.spectra.sharing`."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from svdtune import processes, spectra
from svdtune.linalg import Components, Factors
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.integrity import fingerprint
from svdtune.methods.layers.quantization import device_and_dtype
from svdtune.methods.settings import settings
from svdtune.spectra import sharing
from svdtune.spectra.content import content_key

# Elements of a weight that are compared between processes.
_SAMPLE = 1024


class Work:
    """Everything that is computed from the weights of some layers.

    Args:
        targets: the layers by name.
        together: whether every process takes part, so that the work can be shared out.
        present: whether this process has the weights.
    """

    def __init__(self, targets: Mapping[str, nn.Module], together: bool, present: bool):
        self.targets, self.present = targets, present
        self.shapes = {name: spectra.matrix_shape(module) for name, module in targets.items()}
        self.weights = {name: partial(spectra.base_weight, module) for name, module in targets.items()}
        self.shared = together and sharing.is_on()
        self.spread = any(has_sharded_weight(module) for module in targets.values())

    def ranks(self, names: list[str], threshold: float) -> dict[str, int]:
        """The rank at a threshold of each layer, by name."""

        def compute(weights: spectra.Weights) -> dict[str, int]:
            return spectra.ranks(weights, threshold)

        return self._among(names).numbers(compute) if self.shared else compute(self._of(names))

    def ranked_factors(self, names: list[str], threshold: float) -> tuple[dict[str, int], dict[str, Factors]]:
        """The ranks at a threshold and the leading factors. A process without the weights gets no
        factors."""
        return self._factors(names, lambda weights: spectra.ranked_factors(weights, threshold))

    def factors(self, ranks: Mapping[str, int], components: Components, *, exact: bool) -> dict[str, Factors]:
        """The factors of each layer in `ranks`: the ones that `components` names, as many as its
        rank."""

        def compute(weights: spectra.Weights) -> Iterator[tuple[str, Factors]]:
            wanted = {name: ranks[name] for name in weights}
            return spectra.factors(weights, wanted, components=components, exact=exact)

        return self._factors(list(ranks), compute)[1]

    def _factors(self, names: list[str], compute: Any) -> tuple[dict[str, int], dict[str, Factors]]:
        if self.shared:
            return self._among(names).factors(compute)
        found = dict(compute(self._of(names)))
        return {name: len(factors.s) for name, factors in found.items()}, found

    def fingerprints(self) -> dict[str, str]:
        """Of the base weights that have one, by name."""
        shared = self.shared and not self.spread
        among = self._among(list(self.targets)) if shared else None
        mine = [name for name in self.targets if among is None or self._reads(name, among)]
        found = {name: value for name in mine if (value := fingerprint(self.targets[name])) is not None}
        told = processes.gather(found) if shared else [found]
        return {name: value for some in told for name, value in some.items()}

    def _reads(self, name: str, among: sharing.Sharing) -> bool:
        return (0 if among.main_only else among.owner[name]) == processes.index()

    def _of(self, names: list[str]) -> dict[str, Callable[[], Tensor]]:
        return {name: self.weights[name] for name in names}

    def _among(self, names: list[str]) -> sharing.Sharing:
        shapes = {name: self.shapes[name] for name in names}
        devices = {name: device_and_dtype(_base(self.targets[name]))[0] for name in names}
        return sharing.Sharing(shapes, self._of(names), self.spread, self.present, devices)


def check_agreement(config: SvdConfig, targets: Mapping[str, nn.Module], present: bool) -> None:
    """Check that every process adapts the same layers of the same model in the same way.

    Raises:
        SvdtuneError: in every process, naming those that differ.
    """
    if not sharing.is_on():
        return
    facts: dict[str, Any] = {
        "the adapter's settings": {field.name: getattr(config, field.name) for field in settings(config)},
        "the layers to adapt": {name: spectra.matrix_shape(module) for name, module in targets.items()},
    }
    if all(processes.gather(present)):
        facts["the base model's weights"] = {name: _sample(module) for name, module in targets.items()}
    advice = "Start every process with the same recipe or configuration, the same model and the same versions of it"
    processes.agree(facts, advice)


def _sample(module: nn.Module) -> str | None:
    """The key of a sample of a weight as it is stored; None if processes do not hold the same
    weight."""
    weight = getattr(_base(module), "weight", None)
    if not isinstance(weight, Tensor) or has_sharded_weight(module) or weight.is_meta:
        return None
    flat = weight.detach().reshape(-1)
    return content_key(flat[:: max(1, flat.numel() // _SAMPLE)])


def has_sharded_weight(module: nn.Module) -> bool:
    """Whether a layer's base weight is spread over processes: a DTensor, or a parameter that ZeRO-3
    has partitioned."""
    weight = getattr(_base(module), "weight", None)
    return hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")


def _base(module: nn.Module) -> nn.Module:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return getattr(base, "whole", base)  # of a slice
