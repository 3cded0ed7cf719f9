"""Mo-SARA: frozen singular vectors, trained sets of singular values mixed by a token-level
router."""

from svdtune.methods.mosara.config import MoSaraConfig
from svdtune.methods.mosara.layer import MoSaraLinear, check_is_matrix
from svdtune.methods.tuner import SvdTuner

__all__ = ["MoSaraConfig", "MoSaraLinear", "MoSaraModel"]


class MoSaraModel(SvdTuner):
    """A model with Mo-SARA adapters."""

    prefix = "mosara_"
    tuner_layer_cls = MoSaraLinear

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for adapter in self.active_adapters:
            config = self.peft_config[adapter]
            assert isinstance(config, MoSaraConfig)
            check_is_matrix(config, adapter)
