"""svdtune: SVD-based parameter-efficient fine-tuning for Hugging Face PEFT."""

from svdtune._version import __version__

__all__ = ["__version__"]
