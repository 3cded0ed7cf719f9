"""The blocks of docs/loops.md run as they stand, and each loop's regularizer does its work."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from svdtune import SorsaConfig
from svdtune.methods.sorsa import regularizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loops.md"
LOOPS = ("trl", "trainer", "accelerate")


def test_every_loop_trains_with_the_regularizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    added: list[int] = []
    add = regularizer.add_regularizer_gradients
    monkeypatch.setattr(regularizer, "add_regularizer_gradients", lambda *a, **k: added.append(1) or add(*a, **k))
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    counts = []
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number} of {PAGE.name}", "exec"), names)
        counts.append(len(added))
    assert counts == [0, 4, 8, 12], "once an optimizer step, four steps a loop"
    for loop in LOOPS:
        folder = tmp_path / f"{loop}-adapter"
        assert load_file(folder / "adapter_model.safetensors")
        assert SorsaConfig.from_pretrained(folder).r == 4
