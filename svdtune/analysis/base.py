"""An untrained model: the spectrum of every layer that a method would adapt, and its rank at
thresholds (SARA, Fig. 2 and 8)."""

from collections.abc import Sequence
from typing import Any

from svdtune.analysis.before import THRESHOLDS, described
from svdtune.checkpoint import open_checkpoint
from svdtune.methods import SaraConfig
from svdtune.methods.injection import check_targets
from svdtune.methods.sites import readers, sites
from svdtune.models.loader import locate
from svdtune.spectra import spectra


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
