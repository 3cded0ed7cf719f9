"""Spectra, ranks and singular factors of a weight, with torch alone."""

from svdtune.linalg.factors import (
    BANDS,
    Components,
    Factors,
    all_factors,
    band_factors,
    band_of,
    check_band,
    check_inside,
    factors_at_threshold,
    top_factors,
)
from svdtune.linalg.orthonormal import orthonormality_error
from svdtune.linalg.spectrum import Spectrum, rank_at_threshold, safe_rank, settled_spectrum, spectrum

__all__ = [
    "BANDS",
    "Components",
    "Factors",
    "Spectrum",
    "all_factors",
    "band_factors",
    "band_of",
    "check_band",
    "check_inside",
    "factors_at_threshold",
    "orthonormality_error",
    "rank_at_threshold",
    "safe_rank",
    "settled_spectrum",
    "spectrum",
    "top_factors",
]
