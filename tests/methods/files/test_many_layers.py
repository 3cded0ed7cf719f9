"""What loading does for each layer does not grow with the number of layers."""

import copy
import cProfile
import pstats

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig


def network(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(layers)))


def calls(config, layers: int, folder) -> int:
    """How many functions are called to load an adapter of so many layers."""
    base = network(layers)
    plain = copy.deepcopy(base)
    get_peft_model(base, config(r=1, target_modules=r"\d+\.0")).save_pretrained(folder)
    with cProfile.Profile() as profile:
        PeftModel.from_pretrained(plain, folder)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize("config", [SaraConfig, MoSaraConfig, SorsaConfig])
@pytest.mark.slow
def test_twice_the_layers_take_twice_the_calls(config, tmp_path):
    calls(config, 2, tmp_path / "warm")
    assert calls(config, 200, tmp_path / "many") < 2.1 * calls(config, 100, tmp_path / "few")
