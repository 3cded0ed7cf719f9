"""Compact saving: frozen factors stay out of the file, and are recomputed from the base weight when
the adapter is loaded.

SORSA's P₀ and V₀ and Mo-SARA's U and V follow from the base weight. They are computed in float64
and rounded to fp32. On the same machine with the same number of threads they come out bit for bit;
elsewhere they differ by rounding, so a hash would not do. Instead the file keeps a probe of each
factor F [n, k]: the products of four fixed vectors with every column, [4, k] in float64. A turned
or swapped column, or one of the other sign, changes the probe. The recomputed factors must agree
with it. The probes also tell whether an adapter was made on the weights as they are, or on their
bf16 copy, which its fingerprint takes for the same base.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.linalg import Components, Factors
from svdtune.methods.files.integrity import PEFT_ROOT
from svdtune.methods.layers.base import SvdLayer

PROBE = "_probe"
# Largest difference of a column's probe, relative to the column's length. fp32's rounding leaves
# some 1e-7; a base in another dtype turns a column by 1e-3 or more.
TOLERANCE = 1e-5
_PROBES = 4
# Of frozen tensors that many adapters share, with the version of their values.
_known = WeakTensorKeyDictionary()


def probe(factor: Tensor) -> Tensor:
    """[4, k] in float64 on the CPU: the products of √2 cos(j i²), i = 1 … n, j = 1 … 4, with the
    columns of a factor [n, k]."""
    if factor in _known and _known[factor][0] == factor._version:
        return cast(Tensor, _known[factor][1])
    rows = torch.arange(1, len(factor) + 1, dtype=torch.float64)
    vectors = 2**0.5 * torch.cos(torch.arange(1, _PROBES + 1, dtype=torch.float64)[:, None] * rows**2)
    found = (vectors.to(factor.device) @ factor.detach().double()).cpu()
    if isinstance(factor, nn.Parameter):
        _known[factor] = factor._version, found
    return found


def leave_out(state_dict: dict[str, Tensor], name: str, layer: SvdLayer[Any], adapter: str) -> None:
    """Put probes in the place of one layer's frozen tensors.

    Args:
        state_dict: of the model, to be saved; changed in place.
        name: of the layer in the model.
        layer: which.
        adapter: whose tensors.

    Raises:
        SvdtuneError: the tensors were not computed so that they come out the same again.
    """
    if layer.frozen and adapter not in layer.recomputable:
        raise SvdtuneError(
            f"adapter {adapter!r} cannot be saved with compact=True: its frozen factors were not computed for that, and might "
            "not come out the same again. Set compact=False in its configuration; a new adapter takes compact=True from "
            "the start"
        )
    for part in layer.frozen:
        state_dict[f"{name}.{part}{PROBE}.{adapter}"] = probe(state_dict.pop(f"{name}.{part}.{adapter}"))


def restore(
    state_dict: dict[str, Tensor],
    given: Mapping[str, tuple[SvdLayer[Any], dict[str, Tensor]]],
    adapter: str,
) -> None:
    """Add the frozen tensors that a compact file left out, recomputed in float64 and checked.

    Args:
        state_dict: to be loaded, with the model's keys, and with probes under the file's; changed
            in place.
        given: by name, each adapted layer with its tensors in `state_dict`; those are changed too.
        adapter: whose tensors.

    Raises:
        SvdtuneError: what came out is not what the adapter was trained with; the message names the
            layer.
    """
    probes = {name: _take_probes(state_dict, name, layer) for name, (layer, _) in given.items()}
    found: dict[str, dict[str, Tensor]] = {}
    lacking = []
    for name, (layer, _) in given.items():
        if not probes[name]:
            layer.recomputable.discard(adapter)
        elif (known := _known_frozen(name, layer, adapter, probes[name])) is not None:
            found[name] = known
        else:
            lacking.append(name)
    if lacking:
        weights = {name: partial(spectra.base_weight, given[name][0]) for name in lacking}
        rounded = {name: partial(_bf16, weight) for name, weight in weights.items()}
        ranks = {name: given[name][0].r[adapter] for name in lacking}
        triplets = given[lacking[0]][0].configs[adapter].triplets
        frozen_from = given[lacking[0]][0].frozen_from
        for name, frozen in recomputed((weights, rounded), ranks, triplets, frozen_from, probes):
            found[name] = frozen
            given[name][0].recomputable.add(adapter)
    for name, frozen in found.items():
        given[name][1].update(frozen)
        state_dict |= {f"{name}.{part}.{adapter}": tensor for part, tensor in frozen.items()}


def recomputed(
    candidates: tuple[spectra.Weights, spectra.Weights],
    ranks: Mapping[str, int],
    components: Components,
    frozen_from: Callable[[Factors], dict[str, Tensor]],
    probes: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, frozen tensors) of each layer, recomputed in float64 and checked.

    Args:
        candidates: by name, the weight that the adapter was most likely made on; and the same in
            another dtype, for layers whose probes disagree.
        ranks, components: as for `spectra.factors`.
        frozen_from: how the method's frozen tensors follow from the factors.
        probes: by name, those of the file.

    Raises:
        SvdtuneError: neither weight gives what the adapter was trained with; the message names the
            layer.
    """
    errors: dict[str, SvdtuneError] = {}
    first, second = candidates
    for name, factors in spectra.factors(first, ranks, components=components, exact=True):
        frozen = frozen_from(factors)
        try:
            check_probes(name.removeprefix(PEFT_ROOT), frozen, probes[name])
        except SvdtuneError as error:
            errors[name] = error
            continue
        yield name, frozen
    left = {name: ranks[name] for name in errors}
    for name, factors in spectra.factors(second, left, components=components, exact=True):
        frozen = frozen_from(factors)
        try:
            check_probes(name.removeprefix(PEFT_ROOT), frozen, probes[name])
        except SvdtuneError:
            raise errors[name] from None
        yield name, frozen


def _bf16(weight: Callable[[], Tensor]) -> Tensor:
    return weight().bfloat16()


def _known_frozen(
    name: str, layer: SvdLayer[Any], adapter: str, probes: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The frozen tensors that an adapter of the layer has already, where they agree with the
    probes."""
    other = _with_the_same(layer, adapter)
    if other is None:
        return None
    tensors = {part: layer.adapter_tensor(part, other) for part in layer.frozen}
    frozen = {part: tensor for part, tensor in tensors.items() if tensor is not None}
    try:
        check_probes(name.removeprefix(PEFT_ROOT), frozen, probes)
    except SvdtuneError:
        return None  # the other one may have been made on the base in another dtype
    if other in layer.recomputable:
        layer.recomputable.add(adapter)
    return frozen


def _with_the_same(layer: SvdLayer[Any], adapter: str) -> str | None:
    """An adapter whose frozen tensors are those that would be computed: the adapter itself where
    training resumes, or another one of the same layer that was computed before."""
    if not layer.awaits(adapter):
        return adapter
    wanted = layer.r[adapter], layer.configs[adapter].triplets
    there = (name for name in layer.recomputable if not layer.awaits(name))
    return next((name for name in there if (layer.r[name], layer.configs[name].triplets) == wanted), None)


def _take_probes(state_dict: dict[str, Tensor], name: str, layer: SvdLayer[Any]) -> dict[str, Tensor]:
    """Remove a layer's probes from what is loaded, and return them by tensor name. Empty if the
    file lacks one of them."""
    bare = name.removeprefix(PEFT_ROOT)  # as Transformers saves
    taken = {
        part: state_dict.pop(f"{PEFT_ROOT}{bare}.{part}{PROBE}", state_dict.pop(f"{bare}.{part}{PROBE}", None))
        for part in layer.frozen
    }
    probes = {part: value for part, value in taken.items() if value is not None}
    return probes if len(probes) == len(taken) else {}


def check_probes(layer: str, frozen: Mapping[str, Tensor], probes: Mapping[str, Tensor]) -> None:
    """Check that frozen tensors are the ones that a compact file left out.

    Raises:
        SvdtuneError: they are not.
    """
    for name, tensor in frozen.items():
        found, expected = probe(tensor), probes[name].double().cpu()
        if found.shape != expected.shape:
            raise SvdtuneError(
                f"the adapter's {name} of layer {layer!r} had {expected.shape[-1]} columns, but this model gives "
                f"{found.shape[-1]}: it was made for another model, or its file was altered"
            )
        lengths = torch.linalg.vector_norm(tensor.detach().double(), dim=0).cpu()
        off = float(((found - expected).abs() / lengths.clamp_min(torch.finfo(torch.float32).tiny)).max())
        if not off <= TOLERANCE:
            raise SvdtuneError(
                f"{name} of layer {layer!r}, recomputed from this base model, is not what the adapter was trained with (off by "
                f"{off:.1e}, allowed is {TOLERANCE:.0e}). The adapter was saved with compact=True: load it onto the very "
                "weights that it was made from, in the same dtype, without other adapters merged there. "
                "Two singular values of the weight that nearly agree can have the same effect on another machine; then "
                "save it where it loads, with compact=False"
            )
