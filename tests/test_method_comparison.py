"""benchmarks/method_comparison: its experiments load and train as PEFT's own run.py does it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftConfig, get_peft_model

from tiny import tiny_llama

ARENA = Path(__file__).parents[1] / "benchmarks" / "method_comparison"
EXPERIMENTS = sorted(path.parent for path in ARENA.rglob("adapter_config.json"))
# What the comparison's run.py does with an experiment, on a model without names on the hub.
RUN = """
import json, sys
from pathlib import Path
from peft import PeftConfig, get_peft_model
from tiny import tiny_llama
from utils import get_optimizer_and_scheduler
folder = Path(sys.argv[-1])
model = get_peft_model(tiny_llama(), PeftConfig.from_pretrained(folder))
settings = json.loads((folder / "training_params.json").read_text())["optimizer_kwargs"]
optimizer, _ = get_optimizer_and_scheduler(model, **settings)
Path("hooks.txt").write_text(str(len(optimizer._optimizer_step_pre_hooks)))
"""
UTILS = """
import torch
def get_optimizer_and_scheduler(model, **settings):
    return torch.optim.AdamW(model.parameters(), **settings), None
"""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"method_comparison_{name}", ARENA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.json")}


def test_the_folder_is_what_its_table_says(tmp_path: Path) -> None:
    script("experiments").write(tmp_path)
    assert contents(tmp_path) == contents(ARENA / "experiments")


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_experiment_goes_onto_a_llama(folder: Path) -> None:
    assert folder.relative_to(ARENA).parts[:2] == ("experiments", folder.parent.name)
    config = PeftConfig.from_pretrained(folder)
    assert config.peft_type == folder.parent.name.upper()
    model = get_peft_model(tiny_llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1), config)
    targets = {name.split(".")[-1] for name in config.ranks}
    assert targets == {"q_proj", "v_proj"} if "all-linear" not in folder.name else len(targets) == 7
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    settings = json.loads((folder / "training_params.json").read_text())
    assert settings.keys() == {"optimizer_kwargs"}
    torch.optim.AdamW(model.parameters(), **settings["optimizer_kwargs"]).step()


@pytest.mark.parametrize(
    ("experiment", "hooks"),
    [("sorsa/llama-3.2-3B-rank16-all-linear", 1), ("sara/llama-3.2-3B-rank16-all-linear", 0)],
    ids=["sorsa", "sara"],
)
def test_the_comparison_runs_with_sorsas_regularizer(
    experiment: str, hooks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "utils.py").write_text(UTILS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", ["run.py", "-v", str(ARENA / "experiments" / experiment)])
    script("run").main()
    monkeypatch.delitem(sys.modules, "utils")
    assert (tmp_path / "hooks.txt").read_text() == str(hooks)
