"""svdtune: SVD-based parameter-efficient fine-tuning for Hugging Face PEFT.

Importing it registers SARA, Mo-SARA and SORSA with PEFT; from then on PEFT's own functions know
them:

    from peft import get_peft_model
    from svdtune import SorsaConfig

    model = get_peft_model(model, SorsaConfig(r=64))
"""

from svdtune._version import __version__
from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.methods import MoSaraConfig, MoSaraModel, SaraConfig, SaraModel, SorsaConfig, SorsaModel
from svdtune.methods.sorsa.regularizer import SorsaRegularizer, add_regularizer_gradients, regularize

__all__ = [
    "MoSaraConfig",
    "MoSaraModel",
    "SaraConfig",
    "SaraModel",
    "SorsaConfig",
    "SorsaModel",
    "SorsaRegularizer",
    "SvdtuneError",
    "SvdtuneWarning",
    "__version__",
    "add_regularizer_gradients",
    "regularize",
]
