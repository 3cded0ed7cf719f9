"""AdaLoRA in a run: its ranks are redistributed while it trains, which Trainer alone does not do."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from svdtune.errors import SvdtuneError
from svdtune.training import RunResult, train
from svdtune.training.recipe import check_recipe

ADALORA = {"name": "adalora", "init_r": 4, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1}


def go(method: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> RunResult:
    return train(
        check_recipe(
            {
                "model": str(tiny_folder),
                "method": method | {"target_modules": ["q_proj", "v_proj"]},
                "data": {
                    "train": {"source": "arithmetic", "limit": 8},
                    "prompt": "question",
                    "completion": "solution",
                    "max_length": 512,
                },
                "training": {"learning_rate": 1e-2, "max_steps": 4, "batch_size": 2, "save_steps": None},
                "output": {"dir": str(tmp_path / "run")},
            }
        )
    )


@pytest.mark.parametrize("given", [{"total_step": 4}, {}])
def test_adalora_gives_up_ranks(given: dict[str, int], tiny_folder: Path, tmp_path: Path) -> None:
    """Also where the recipe leaves `total_step` to the length of the run."""
    result = go(ADALORA | given, tiny_folder, tmp_path)
    assert json.loads((result.adapter / "adapter_config.json").read_text())["total_step"] == 4
    saved = load_file(result.adapter / "adapter_model.safetensors")
    ranks = [len(value) for name, value in saved.items() if "lora_A" in name]
    assert len(ranks) == 4
    assert sum(ranks) == 4 * 3


def test_a_schedule_longer_than_the_run_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match=r"method: .*tinit.*total_step"):
        go(ADALORA | {"tinit": 100}, tiny_folder, tmp_path)
