"""Before training: each layer's spectrum, and its rank at thresholds from 0.1 to 0.9 (SARA, Fig. 2
and 8), of a run's base and of any untrained model."""

from collections.abc import Sequence
from typing import Any

from svdtune.analysis.weights import Opened
from svdtune.checkpoint import open_checkpoint
from svdtune.linalg import Spectrum, rank_at_threshold
from svdtune.methods import SaraConfig
from svdtune.methods.injection import check_targets
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.matrices import acting
from svdtune.methods.sites import readers, sites
from svdtune.models.loader import locate
from svdtune.spectra import matrix_shape, spectra

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def before(run: Opened, progress: bool | None = None) -> dict[str, Any]:
    """Spectra and ranks of the base weights, looked up in the cache on disk before they are
    computed.

    Returns:
        {"thresholds", "layers": {name: {"out", "in", "rank", "k", "sum", "values"}}}: `k` has the
        rank at each threshold, `rank` the adapter's own (None under full fine-tuning), `sum` all
        singular values together, and `values` pairs [index from 1, singular value], all of the
        first ones and ever fewer after them.
    """
    layers = {layer.name: layer for layer in run.layers}
    weights = {name: lambda layer=layer: run.start(layer) for name, layer in layers.items()}
    found = {}
    for name, spectrum in spectra(weights, progress=progress):
        out, inside = matrix_shape(layers[name].module)
        found[name] = {"out": out, "in": inside, "rank": _rank(layers[name].module), **described(spectrum)}
    return {"thresholds": list(THRESHOLDS), "layers": found}


def base(
    model: str,
    modules: str | Sequence[str] | None = None,
    progress: bool | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    **origin: Any,
) -> dict[str, Any]:
    """Spectra and ranks of a model's weights, before any training.

    Args:
        model: a model folder or hub name.
        modules: names of the layers (["q_proj"]), or one string as PEFT's `target_modules` takes
            it; by default those that SARA adapts, q and v.
        progress: show a bar; None: where it takes long.
        thresholds: of the ranks.
        **origin: `revision` and `trust_remote_code` of a hub model.

    Returns:
        As `before`; no layer has a `rank`.

    Raises:
        SvdtuneError: there is no such model, it has no weights, or no layer of these names.
    """
    checkpoint = open_checkpoint(locate(model), **origin)
    config = SaraConfig(r=1, target_modules=modules if modules is None or isinstance(modules, str) else list(modules))
    check_targets(checkpoint.model, config)
    places = list(sites(checkpoint, config))
    shapes = {site.name: site.shape for site in places}
    found = {}
    for name, spectrum in spectra(readers(checkpoint, places), progress=progress):
        shape = shapes[name]
        assert shape is not None  # SARA adapts matrices alone
        found[name] = {"out": shape[0], "in": shape[1], "rank": None, **described(spectrum, thresholds)}
    return {"thresholds": list(thresholds), "layers": {name: found[name] for name in shapes}}


def described(spectrum: Spectrum, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """What is kept of a spectrum: its `k`, `sum` and `values`, as `before` has them."""
    count = len(spectrum.values)
    shown = [i for i in range(count) if i in {count - 1, *_spread(count)}]
    return {
        "k": [rank_at_threshold(spectrum, threshold) for threshold in thresholds],
        "sum": spectrum.total,
        "values": [[i + 1, float(f"{float(spectrum.values[i]):.6g}")] for i in shown],
    }


def _spread(count: int) -> set[int]:
    """Indices from 0 that get ever rarer: about four from each power of two to the next."""
    picked, at = set(), 1.0
    while at <= count:
        picked.add(round(at) - 1)
        at = max(at + 1, at * 2**0.25)
    return picked


def _rank(module: Any) -> int | None:
    adapter = next(iter(acting(module)), "")
    if isinstance(module, SvdLayer):
        return module.r[adapter]
    found = getattr(module, "r", None)
    return found.get(adapter) if isinstance(found, dict) else None
