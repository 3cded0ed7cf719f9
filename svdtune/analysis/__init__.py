"""What a run's files tell: spectra and ranks before training, movement during it, the trained
change and routing after it."""

from svdtune.analysis.after import after
from svdtune.analysis.before import THRESHOLDS, base, before
from svdtune.analysis.comparisons import comparisons
from svdtune.analysis.facts import Facts, read_facts
from svdtune.analysis.routing import Routing, routing
from svdtune.analysis.run import RunAnalysis, analyze
from svdtune.analysis.weights import Opened, open_run

__all__ = [
    "THRESHOLDS",
    "Facts",
    "Opened",
    "Routing",
    "RunAnalysis",
    "after",
    "analyze",
    "base",
    "before",
    "comparisons",
    "open_run",
    "read_facts",
    "routing",
]
