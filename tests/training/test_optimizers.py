"""What optimizers keep is what is planned for, and SORSA's regularizer acts at their steps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from runs import go, log_of, timeless
from svdtune import SorsaConfig, regularize
from svdtune.planning.memory import MOMENTS
from svdtune.training import run
from tiny import save_tiny_llama


def kept(value) -> int:
    """Bytes of what an optimizer keeps; torchao's are tensors of codes and scales."""
    if hasattr(value, "codes"):
        return kept(value.codes) + kept(value.scale)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")  # which compile their step
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in TORCHAO)) for name in MOMENTS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.family(30)
def test_optimizers_keep_what_is_counted(name, tmp_path):
    """Of SORSA's factors, whose regularizer acts; each where its package is installed."""
    if name in TORCHAO:
        pytest.importorskip("torchao")
    elif any(word in name for word in ("bnb", "bit", "ademamix")):
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(384, 384)), SorsaConfig(r=32, target_modules=["0"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Trainer(
        model, TrainingArguments(tmp_path, optim=name, use_cpu=True, report_to="none")
    ).create_optimizer()
    hook = regularize(optimizer, model, 1e-3)
    before = trained[0].detach().clone()
    model(torch.randn(4, 384)).square().mean().backward()
    optimizer.step()
    assert float(hook.last) > 0
    assert not torch.equal(trained[0], before)
    found = sum(kept(value) for state in optimizer.state.values() for value in state.values())
    count = sum(parameter.numel() for parameter in trained)
    assert found == pytest.approx(MOMENTS[name] * count, rel=0.1)


@pytest.mark.parametrize(
    ("name", "package"), [("adamw_bnb_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")], ids=["bnb", "torchao"]
)
@pytest.mark.slow
def test_a_run_with_eight_bit_moments_goes_on_as_it_was(
    name: str, package: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    model = save_tiny_llama(tmp_path / "model", tiny_tokenizer, hidden_size=128, intermediate_size=128)
    recipe: dict[str, Any] = {
        "model": str(model),
        "method": {"name": "sorsa", "r": 48},  # tensors of fewer than 4,096 numbers keep fp32 moments
        "data": {
            "train": {"source": "arithmetic", "limit": 8},
            "prompt": "question",
            "completion": "solution",
            "max_length": 256,
        },
        "training": {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 1, "logging_steps": 1, "save_steps": 2},
        "output": {"dir": str(tmp_path / "whole")},
    }
    recipe["training"] |= {"optimizer": name, "keep_checkpoints": 2}
    whole, _ = go(recipe)
    saved = tree_leaves(torch.load(whole / "checkpoint-4" / "optimizer.pt", weights_only=True))
    assert any(isinstance(leaf, Tensor) and getattr(leaf, "codes", leaf).dtype == torch.uint8 for leaf in saved)
    recipe["output"]["dir"] = str(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_summary", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(recipe)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    resumed, _ = go(recipe, resume=True)
    assert timeless(log_of(resumed)) == timeless(log_of(whole))
    assert all("l_reg" in line for line in log_of(whole) if "loss" in line)
