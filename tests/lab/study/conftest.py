"""A study that takes seconds: a tiny model, forty rows to train on, two sets of three items to
score."""

import json
from pathlib import Path
from typing import Any

import pytest
from forked_worker import ForkedWorker
from ruamel.yaml import YAML

from svdtune.lab.study import runner

SETS = {"SVAMP": "svamp", "AddSub": "addsub"}


def _row(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "input": "", "output": f"It is {answer}.", "answer": answer}


@pytest.fixture
def study_folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `recipe.yaml`, the data it needs, and room for study files."""
    data = tmp_path / "data" / "sara_math"
    data.mkdir(parents=True)
    rows = [_row(f"What is {n} times {n + 1}?", str(n * n + n)) for n in range(1, 41)]
    (data / "math_data.json").write_text(json.dumps(rows))
    for name in SETS:
        (data / f"{name}_test.json").write_text(json.dumps([_row(f"{name} asks {n}?", str(n)) for n in range(3)]))
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": str(tiny_folder),
        "method": {"name": "lora", "r": 2},
        "data": {
            "train": "sara_math",
            "prompt": "instruction",
            "completion": "output",
            "answer": "answer",
            "max_length": 256,
        },
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1},
        "evaluation": {"data": list(SETS.values()), "max_new_tokens": 4},
    }
    _write(tmp_path / "recipe.yaml", recipe)
    return tmp_path


@pytest.fixture(autouse=True)
def _forked_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of runs from a warm server; tests marked `real_workers` start them as
    users do."""
    if request.node.get_closest_marker("real_workers") is None:
        monkeypatch.setattr(runner, "start_worker", ForkedWorker)


@pytest.fixture
def write_study(study_folder: Path):
    """Writes a study file beside the recipe; returns its path."""

    def write(name: str = "study", **settings: Any) -> Path:
        given = {
            "title": "A study",
            "tasks": {"math": "recipe.yaml"},
            "arms": {"lora": {"method": {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}}},
            "seeds": [1],
            **settings,
        }
        _write(study_folder / f"{name}.yaml", given)
        return study_folder / f"{name}.yaml"

    return write


def _write(path: Path, settings: dict[str, Any]) -> None:
    with path.open("w") as file:
        yaml = YAML(typ="safe", pure=True)
        yaml.sort_base_mapping_type_on_output = False
        yaml.dump(settings, file)
