"""The blocks of docs/api.md run as they stand, one after the other, and the page names all that
`svdtune.__all__` does."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import svdtune

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown, names = io.StringIO(), {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    with redirect_stdout(shown):
        for number, block in enumerate(blocks):
            exec(compile(block, f"block {number} of {PAGE.name}", "exec"), names)
    assert len(blocks) == 6
    assert "model.layers.0.self_attn.q_proj (32, 32)" in shown.getvalue()
    folders = {"by-hand", "started", "runs", "scores", "merged", "lora", "combined", "report.html"}
    assert folders <= {path.name for path in tmp_path.iterdir()}


def test_the_page_names_all_that_is_public() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in svdtune.__all__ if name not in page] == []
