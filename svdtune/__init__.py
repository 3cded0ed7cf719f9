"""svdtune: SVD-based parameter-efficient fine-tuning for Hugging Face PEFT.

Importing it registers SARA, Mo-SARA and SORSA with PEFT; from then on PEFT's own functions know
them:

    from peft import get_peft_model
    from svdtune import SorsaConfig

    model = get_peft_model(model, SorsaConfig(r=64))

The functions beside them do what the command line does: `plan`, `start`, `train`, `evaluate`,
`analyze`, `report`, `merge`, `export_lora`, `combine`; `sites` and `count` say where an adapter
goes and how many numbers it has. Inside `with fast_starts():` PEFT starts PiSSA, OLoRA and their
like with svdtune's decompositions. What stands in `__all__` is stable; docs/api.md is about all of
it.
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune._version import __version__
from svdtune.errors import SvdtuneError, SvdtuneWarning

if TYPE_CHECKING:
    from svdtune.analysis import analyze
    from svdtune.api.adapters import combine, count, export_lora, merge, plan, sites
    from svdtune.api.runs import evaluate
    from svdtune.api.start import start
    from svdtune.methods import MoSaraConfig, MoSaraModel, SaraConfig, SaraModel, SorsaConfig, SorsaModel
    from svdtune.methods.files.many import load_adapters
    from svdtune.methods.sorsa.regularizer import SorsaRegularizer, add_regularizer_gradients, regularize
    from svdtune.reports import report
    from svdtune.starts import fast_starts
    from svdtune.training import train

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
    "analyze",
    "combine",
    "count",
    "evaluate",
    "export_lora",
    "fast_starts",
    "load_adapters",
    "merge",
    "plan",
    "regularize",
    "report",
    "sites",
    "start",
    "train",
]

# Imported when first asked for: PEFT and the Trainer take seconds each, and who does not need them
# does not wait.
_LATER = dict.fromkeys(("combine", "count", "export_lora", "merge", "plan", "sites"), "svdtune.api.adapters")
_LATER |= dict.fromkeys(
    ("MoSaraConfig", "MoSaraModel", "SaraConfig", "SaraModel", "SorsaConfig", "SorsaModel"), "svdtune.methods"
)
_LATER |= dict.fromkeys(
    ("SorsaRegularizer", "add_regularizer_gradients", "regularize"), "svdtune.methods.sorsa.regularizer"
)
_LATER |= {
    "analyze": "svdtune.analysis",
    "evaluate": "svdtune.api.runs",
    "report": "svdtune.reports",
    "start": "svdtune.api.start",
    "train": "svdtune.training",
    "fast_starts": "svdtune.starts",
    "load_adapters": "svdtune.methods.files.many",
}


def _is_command() -> bool:
    """Whether this process is the command line, whose help shall not wait for PEFT: a verb that has
    to do with adapters imports the methods itself."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    return name in ("svdtune", "svdtune.exe") or ("-m", "svdtune") in pairwise(sys.orig_argv)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'svdtune' has no attribute {name!r}")
    found = getattr(import_module(_LATER[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not _is_command():
    import_module("svdtune.methods")
