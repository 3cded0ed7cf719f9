"""Ranks and factors of many weights."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from svdtune.linalg import Factors, safe_rank, top_factors

Weights = Mapping[str, Tensor | Callable[[], Tensor]]


def _read(weight: Tensor | Callable[[], Tensor]) -> Tensor:
    return weight() if callable(weight) and not isinstance(weight, Tensor) else weight


def ranks(weights: Weights, threshold: float, *, progress: bool | None = None) -> dict[str, int]:
    """The rank at `threshold` of each weight [out, in], by name."""
    return {name: safe_rank(_read(weight), threshold) for name, weight in weights.items()}


def factors(weights: Weights, ranks: Mapping[str, int], *, progress: bool | None = None) -> Iterator[tuple[str, Factors]]:
    """Yield (name, leading factors) of each weight in `ranks`, in its order, holding one at a time."""
    for name, r in ranks.items():
        yield name, top_factors(_read(weights[name]), r)
