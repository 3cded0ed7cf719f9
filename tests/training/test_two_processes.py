"""Data-parallel training: two processes take the steps that one takes with twice the batch, penalty included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svdtune.training.recipe import check_recipe, dump_recipe


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    logs = []
    for processes in (1, 2):
        settings = {
            "model": str(tiny_folder),
            "method": {"name": "sorsa", "r": 4},
            "data": {"train": {"source": "arithmetic", "limit": 32}, "prompt": "question", "completion": "solution"},
            "training": {"max_steps": 4, "batch_size": 4 // processes, "learning_rate": 1e-3, "logging_steps": 1},
            "output": {"dir": str(tmp_path / f"run{processes}")},
        }
        settings["data"]["max_length"] = 256
        recipe = tmp_path / f"{processes}.yaml"
        recipe.write_text(dump_recipe(check_recipe(settings)))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launch, "--no-python", str(Path(sys.executable).with_name("svdtune")), "train", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trained 4 steps") == 1
        lines = (tmp_path / f"run{processes}" / "train_log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, two in zip(*logs, strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "l_reg"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
