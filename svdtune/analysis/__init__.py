"""What a run's files tell: spectra and ranks before training, movement during it, the trained change and routing after it."""

from svdtune.analysis.after import after
from svdtune.analysis.before import THRESHOLDS, before
from svdtune.analysis.comparing import comparisons
from svdtune.analysis.opening import Opened, open_run
from svdtune.analysis.routing import Routing, routing
from svdtune.analysis.runs import Facts, read_facts

__all__ = [
    "THRESHOLDS",
    "Facts",
    "Opened",
    "Routing",
    "after",
    "before",
    "comparisons",
    "open_run",
    "read_facts",
    "routing",
]
