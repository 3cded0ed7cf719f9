"""A model on disk: its names, shapes and tensors, and the model without its weights."""

from svdtune.checkpoint.model import Checkpoint, open_checkpoint
from svdtune.checkpoint.shapes import SHAPES, open_shape

__all__ = ["SHAPES", "Checkpoint", "open_checkpoint", "open_shape"]
