"""The names of an adapter's tensors in files of svdtune 0.1, which had those of frozen factors
without the method's prefix."""

from collections.abc import Mapping

from torch import Tensor

PROBE = "_probe"  # behind a frozen tensor's name in a compact file
# U and V were Mo-SARA's, P0 and V0 SORSA's.
_BEFORE = {
    "frozen_P0": "sorsa_P0",
    "frozen_V0": "sorsa_V0",
    "frozen_U": "mosara_U",
    "frozen_V": "mosara_V",
}


def current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the names that this version has for them; also a compact file's
    probes. Names that are no old ones stay."""
    return {current_name(name): tensor for name, tensor in tensors.items()}


def current_name(name: str) -> str:
    """The same of one name."""
    layer, dot, part = name.rpartition(".")
    before, probe, rest = part.partition(PROBE)
    return f"{layer}{dot}{_BEFORE.get(before, before)}{probe}{rest}"
