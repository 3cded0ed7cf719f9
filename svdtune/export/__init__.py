"""Take a trained adapter out of its run: open it for inference, or merge it into a plain
checkpoint."""

from svdtune.export.comparison import LogitComparison
from svdtune.export.merge_checkpoint import MergeReport, merge
from svdtune.export.source import Source, adapter_of, attach_adapter, find_source, open_source

__all__ = [
    "LogitComparison",
    "MergeReport",
    "Source",
    "adapter_of",
    "attach_adapter",
    "find_source",
    "merge",
    "open_source",
]
