"""AdaLoRA in a run: its ranks are redistributed while it trains, which Trainer alone does not do."""

from pathlib import Path

from safetensors.torch import load_file

from svdtune.training import train
from svdtune.training.recipe import check_recipe


def test_adalora_gives_up_ranks(tiny_folder: Path, tmp_path: Path) -> None:
    method = {"name": "adalora", "init_r": 4, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4}
    result = train(
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
    saved = load_file(result.adapter / "adapter_model.safetensors")
    ranks = [len(value) for name, value in saved.items() if "lora_A" in name]
    assert len(ranks) == 4
    assert sum(ranks) == 4 * 3
