"""Data: rows from a file, the hub or an offline generator, made into examples, made into tokens
with a loss mask."""

from svdtune.data.encoding import Collator, encode, encode_all, prompt_ids
from svdtune.data.examples import Example, to_examples
from svdtune.data.readers import GENERATORS, read_rows

__all__ = ["GENERATORS", "Collator", "Example", "encode", "encode_all", "prompt_ids", "read_rows", "to_examples"]
