"""Spectra, ranks and factors of many weights of every kind, remembered on disk."""

from svdtune.spectra.decompose import Weights, factors, ranks, spectra
from svdtune.spectra.weights import base_weight

__all__ = ["Weights", "base_weight", "factors", "ranks", "spectra"]
