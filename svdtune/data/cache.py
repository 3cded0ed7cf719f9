"""Keys for what is remembered of data on disk: the content of the rows, the tokenizer, and all that
decides what becomes of them, this package's own code included.

What is remembered lies beside spectra (`svdtune.spectra.store`): written whole or not at all, and
checked when it is read.
"""

import datetime
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from svdtune.data.files import FILES, kind
from svdtune.data.prompts import TEMPLATES


def content_of(source: str, rows: Sequence[Any] | None) -> str | None:
    """What a source holds, by digest: of a file's bytes, else of the rows that were read; None if
    they are not there yet, or hold more than JSON can say (images)."""
    path = Path(source).expanduser()
    if path.is_file() and kind(path) in FILES:
        with path.open("rb") as file:
            return f"{path.suffix} {kind(path)} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    try:
        return None if rows is None else _digest(rows)
    except TypeError:
        return None


def key_of(**facts: Any) -> str:
    """64 hex digits that name what is made of data by all that decides it."""
    versions = (transformers.__version__, tokenizers.__version__)
    return _digest([_code(), versions, facts])


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase, template: str) -> list[Any] | None:
    """All that decides what becomes of a text; None of a tokenizer that may have more to it: one of
    another's code, or a slow one.

    Args:
        tokenizer: whose tokens.
        template: of the prompt, as for `svdtune.data.prompt_ids`.
    """
    own = type(tokenizer).__module__.partition(".")[0] == "transformers"
    if not own or not getattr(tokenizer, "is_fast", False):
        return None
    chat = json.dumps(tokenizer.chat_template)
    today = datetime.date.today().isoformat() if "strftime_now" in chat else None
    backend: Any = tokenizer
    return [
        hashlib.sha256(backend.backend_tokenizer.to_str().encode()).hexdigest(),
        type(tokenizer).__name__,
        getattr(tokenizer, "split_special_tokens", None),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        chat,
        today,
        TEMPLATES.get(template, template),
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
