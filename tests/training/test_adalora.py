"""AdaLoRA in a run: its ranks are redistributed while it trains, which Trainer alone does not
do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdtune.errors import SvdtuneError
from svdtune.training import RunResult, train
from svdtune.training.recipe import check_recipe

ADALORA = {"name": "adalora", "init_r": 4, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1}


def go(method: dict[str, Any], tiny_folder: Path, folder: Path, *, resume: bool = False, **training: Any) -> RunResult:
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
                "training": {"learning_rate": 1e-2, "max_steps": 4, "batch_size": 2, "save_steps": None} | training,
                "output": {"dir": str(folder)},
            }
        ),
        resume=resume,
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


def test_nothing_is_given_up_where_the_target_is_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    """As in SORSA's Table 4."""
    saved = load_file(go(ADALORA | {"target_r": 4}, tiny_folder, tmp_path).adapter / "adapter_model.safetensors")
    assert {len(value) for name, value in saved.items() if "lora_A" in name} == {4}


@pytest.mark.parametrize("step", [2, 4, 5])
@pytest.mark.family(1)
def test_a_run_stopped_before_between_and_after_giving_up_ranks_goes_on(
    step: int, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 6, "save_steps": 1, "keep_checkpoints": 6}
    method = ADALORA | {"target_r": 2, "tinit": 2, "tfinal": 2}
    whole = go(method, tiny_folder, tmp_path / "whole", **settings)
    later = [f"checkpoint-{n}" for n in range(step + 1, 7)]
    left_out = shutil.ignore_patterns("adapter", "training.json", *later)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped", ignore=left_out)
    again = go(method, tiny_folder, tmp_path / "stopped", resume=True, **settings)
    assert again.summary["resumed_from"] == f"checkpoint-{step}"
    one, other = (load_file(result.adapter / "adapter_model.safetensors") for result in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    patterns = [json.loads((r.adapter / "adapter_config.json").read_text())["rank_pattern"] for r in (whole, again)]
    assert patterns[0] == patterns[1]
