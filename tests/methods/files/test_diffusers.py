"""Models of diffusers, whose own files hold LoRA alone: refused where they would save ours, loaded
where PEFT saves it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError

CONFIGS = {"sara": SaraConfig, "mosara": MoSaraConfig, "sorsa": SorsaConfig}


class Denoiser(nn.Module):
    """What a model of diffusers does with PEFT: `add_adapter` and `save_lora_adapter` of its
    PeftAdapterMixin."""

    peft_config: Any

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_v(self.to_q(x))
        return out

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        inject_adapter_in_model(config, self, adapter_name)

    def save_lora_adapter(self, folder: Path, adapter_name: str = "default") -> None:
        tensors = get_peft_model_state_dict(self, adapter_name=adapter_name)
        save_file(tensors, folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("method", CONFIGS)
def test_its_own_saving_is_refused(method: str, tmp_path: Path) -> None:
    model = Denoiser()
    model.add_adapter(CONFIGS[method](r=2, target_modules=["to_q", "to_v"]))
    with pytest.raises(
        SvdtuneError, match=r"Denoiser belongs to diffusers, .* cannot load\. Put the adapter on with peft\."
    ):
        model.save_lora_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lora_is_saved_as_ever(tmp_path: Path) -> None:
    model = Denoiser()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    model.save_lora_adapter(tmp_path)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("method", CONFIGS)
def test_what_the_message_advises_works(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Denoiser()
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, CONFIGS[method](r=2, target_modules=["to_q", "to_v"]))
    x = torch.randn(3, 16)
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(fresh, str(tmp_path))(x), expected)
