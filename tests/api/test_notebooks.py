"""The notebooks' cells run one after the other, on a tiny model in place of theirs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_notebook_runs(path: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    chosen, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"MODEL": str(tiny_folder), "STEPS": 2, "TOKENS": 4}
    assert set(re.findall(r"[A-Z]{2,}", chosen.partition(" = ")[0])) <= names.keys()
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number} of {path.name}", "exec"), names)
    made = {"fine_tune_and_compare": {"runs", "report.html"}, "plan_and_export": {"lora", "adapter.gguf", "merged"}}
    assert made[path.stem] <= {each.name for each in tmp_path.iterdir()}


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 2
