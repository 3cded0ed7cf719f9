"""SORSA: trains the leading singular values and vectors of the weight itself, under an orthonormal
regularizer."""

from typing import Any

from peft import PeftConfig

from svdtune.methods.sorsa.config import SorsaConfig
from svdtune.methods.sorsa.layer import SorsaLinear
from svdtune.methods.tuner import SvdTuner

__all__ = ["SorsaConfig", "SorsaLinear", "SorsaModel"]


class SorsaModel(SvdTuner):
    """A model with SORSA adapters."""

    prefix = "sorsa_"
    tuner_layer_cls = SorsaLinear

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, SorsaConfig)
        # the paper adapts every linear layer, whatever the architecture
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return super()._prepare_adapter_config(peft_config, model_config)
