"""Base models: load one with its tokenizer, and make sure that both mean the same end token."""

from svdtune.models.end_token import check_end_token, set_end_token
from svdtune.models.loader import LoadedModel, load, load_tokenizer
from svdtune.models.smollm2 import SMOLLM2, fetch_smollm2

__all__ = ["SMOLLM2", "LoadedModel", "check_end_token", "fetch_smollm2", "load", "load_tokenizer", "set_end_token"]
