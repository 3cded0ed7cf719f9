"""Spectra, ranks and leading singular factors of a weight, with torch alone."""

from svdtune.linalg.factors import Factors, orthonormality_error, top_factors
from svdtune.linalg.spectrum import Spectrum, rank_at_threshold, safe_rank, spectrum

__all__ = [
    "Factors",
    "Spectrum",
    "orthonormality_error",
    "rank_at_threshold",
    "safe_rank",
    "spectrum",
    "top_factors",
]
