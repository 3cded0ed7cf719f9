"""Out of memory while generating: what is done is kept, and the message says how to go on."""

from pathlib import Path

import pytest
import torch

from svdtune.errors import SvdtuneError
from svdtune.evaluation import Item, TransformersEngine, evaluate, get_task
from svdtune.models import load


@pytest.mark.parametrize(
    ("batch_size", "advice"), [(3, r"--batch-size 1$"), (1, r"--max-new-tokens 4 --restart, or with --dtype bfloat16$")]
)
def test_the_message(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, advice: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    loaded = load(tiny_folder)
    items = [Item(f"q{i}", "2+2=", tuple(loaded.tokenizer.encode("2+2=")), "4") for i in range(3)]
    monkeypatch.setattr(TransformersEngine, "complete", fail)
    what = f"out of memory with {batch_size} completions at once, of up to 8 new tokens each; what is done is kept"
    with pytest.raises(SvdtuneError, match=rf"^{what}\. Go on with {advice}"):
        evaluate(loaded, items, get_task("exact"), tmp_path / "out", max_new_tokens=8, batch_size=batch_size)
