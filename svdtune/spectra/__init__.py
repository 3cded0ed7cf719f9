"""Ranks and factors of many weights, remembered on disk."""

from svdtune.spectra.decompose import factors, ranks
from svdtune.spectra.weights import base_weight

__all__ = ["base_weight", "factors", "ranks"]
