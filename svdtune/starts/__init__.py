"""Stock LoRA started from a spectrum: inside PEFT's own call, or from a checkpoint on disk."""

from svdtune.starts.inside_peft import fast_starts

__all__ = ["fast_starts"]
