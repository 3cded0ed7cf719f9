"""SARA: ranks from singular values, a trained U diag(λ) Vᵀ beside the weight."""

from svdtune.methods.sara.config import SaraConfig
from svdtune.methods.sara.layer import SaraLinear
from svdtune.methods.tuner import SvdTuner

__all__ = ["SaraConfig", "SaraLinear", "SaraModel"]


class SaraModel(SvdTuner):
    """A model with SARA adapters."""

    prefix = "sara_"
    tuner_layer_cls = SaraLinear
