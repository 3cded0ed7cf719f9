"""Spectra, ranks and factors of many weights of every kind, remembered on disk."""

from svdtune.spectra.decompose import Weights, factors, ranked_factors, ranks, spectra
from svdtune.spectra.weights import CONVOLUTIONS, as_stored, base_weight, matrix_shape

__all__ = [
    "CONVOLUTIONS",
    "Weights",
    "as_stored",
    "base_weight",
    "factors",
    "matrix_shape",
    "ranked_factors",
    "ranks",
    "spectra",
]
