"""Spectra, ranks and factors of many weights: one at a time, with progress, looked up on disk before they are computed."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor
from tqdm import tqdm

from svdtune.errors import SvdtuneError
from svdtune.linalg import Factors, Spectrum, settled_spectrum, top_factors
from svdtune.linalg import spectrum as decompose
from svdtune.spectra import store
from svdtune.spectra.content import content_key

Weights = Mapping[str, Tensor | Callable[[], Tensor]]


def spectra(weights: Weights, *, progress: bool | None = None) -> Iterator[tuple[str, Spectrum]]:
    """Yield (name, whole float64 spectrum) of each weight, in order.

    Args:
        weights: by name, a weight [out, in] or a function that reads it; only one is held at a time.
        progress: show a bar once this has taken a second; by default where stderr is a terminal.

    Raises:
        SvdtuneError: a weight is not a finite matrix; the message names it.
    """
    for name, weight in _each(weights, "spectra", progress):
        key = content_key(weight)
        found = _load_spectrum(key)
        if found is None or not found.exact or len(found.values) < min(weight.shape):
            found = _named(name, lambda weight=weight: decompose(weight))
            _store_spectrum(key, found)
        yield name, found


def ranks(weights: Weights, threshold: float, *, progress: bool | None = None) -> dict[str, int]:
    """The rank at `threshold` of each weight (SARA Algorithm 1), by name, equal to what its float64 SVD gives.

    Args:
        weights: by name, a weight [out, in] or a function that reads it; only one is held at a time.
        threshold: θ in (0, 1].
        progress: show a bar once this has taken a second; by default where stderr is a terminal.

    Raises:
        SvdtuneError: `threshold` outside (0, 1], or a weight is not a finite matrix; the message names it.
    """
    found = {}
    for name, weight in _each(weights, "ranks", progress):
        key = content_key(weight)
        known = _load_spectrum(key)
        used, found[name] = _named(name, lambda weight=weight, known=known: settled_spectrum(weight, threshold, known))
        if used is not known:
            _store_spectrum(key, used)
    return found


def factors(
    weights: Weights, ranks: Mapping[str, int], *, remember: bool = False, progress: bool | None = None
) -> Iterator[tuple[str, Factors]]:
    """Yield (name, leading factors) of each weight in `ranks`, in the order of `ranks`.

    Args:
        weights: by name, a weight [out, in] or a function that reads it; only one is held at a time.
        ranks: how many triplets, by name.
        remember: keep the factors in the cache too, r(out + in + 1) fp32 numbers a weight.
        progress: show a bar once this has taken a second; by default where stderr is a terminal.

    Raises:
        SvdtuneError: a rank without a weight, a rank outside 1 … min(out, in), or a weight that is not a finite matrix.
    """
    missing = [name for name in ranks if name not in weights]
    if missing:
        raise SvdtuneError(f"ranks name weights that were not given: {', '.join(missing)}")
    chosen = {name: weights[name] for name in ranks}
    for name, weight in _each(chosen, "factors", progress):
        r = ranks[name]
        if not remember:
            yield name, _named(name, lambda weight=weight, r=r: top_factors(weight, r))
            continue
        key = f"{content_key(weight)}-{r}"
        found = store.load("factors", key)
        if found is not None:
            tensors = found[0]
            yield name, Factors(*(tensors[part].to(weight.device) for part in Factors._fields))
            continue
        result = _named(name, lambda weight=weight, r=r: top_factors(weight, r))
        store.store("factors", key, result._asdict(), {})
        yield name, result


def _each(weights: Weights, what: str, progress: bool | None) -> Iterator[tuple[str, Tensor]]:
    """Read one weight after the other; trim the cache at the end."""
    disable = None if progress is None else not progress
    try:
        for name, weight in tqdm(weights.items(), desc=f"svdtune {what}", unit="weight", delay=1.0, disable=disable):
            yield name, weight if isinstance(weight, Tensor) else _named(name, weight)
    finally:
        store.trim()


def _named(name, compute):
    """compute(), with the weight's name put before the message of an error."""
    try:
        return compute()
    except SvdtuneError as error:
        raise SvdtuneError(f"{name}: {error}") from error


def _load_spectrum(key: str) -> Spectrum | None:
    found = store.load("spectrum", key)
    if found is None:
        return None
    tensors, facts = found
    return Spectrum(tensors["values"], **facts)


def _store_spectrum(key: str, spectrum: Spectrum) -> None:
    facts = {name: getattr(spectrum, name) for name in ("total", "error", "squared_error", "reference")}
    store.store("spectrum", key, {"values": spectrum.values}, facts)
