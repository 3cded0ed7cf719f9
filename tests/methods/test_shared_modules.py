"""One module that stands in several places of a model has one adapter, seen from all of them."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig

CONFIGS = {
    "sara": lambda **s: SaraConfig(r=2, init="zero_v", **s),
    "mosara": lambda **s: MoSaraConfig(r=2, num_heads=1, **s),
    "sorsa": lambda **s: SorsaConfig(r=2, **s),
}
LAYERS = {"linear": nn.Linear, "conv1d": lambda n, out: Conv1D(out, n), "fused": nn.Linear}


class Cell(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.q = layer

    def forward(self, x):
        return torch.tanh(self.q(x))


class TwoParents(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.one = Cell(make(6, 6))
        self.two = Cell(self.one.q)

    def forward(self, x):
        return self.two(self.one(x))


class TwoNames(Cell):
    def __init__(self, make):
        super().__init__(make(6, 6))
        self.k = self.q

    def forward(self, x):
        return self.k(super().forward(x))


class RepeatedBlock(nn.Sequential):
    def __init__(self, make):
        cell = Cell(make(6, 6))
        super().__init__(cell, Cell(make(6, 6)), cell)


class ListOfOne(nn.Module):
    """As DETR's heads, of which every decoder layer has the same."""

    def __init__(self, make):
        super().__init__()
        self.q = nn.ModuleList([make(6, 6)] * 3)
        self.decoder = Cell(self.q)

    def forward(self, x):
        for layer in self.decoder.q:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("net", [TwoParents, TwoNames, RepeatedBlock, ListOfOne])
def test_a_shared_module_has_one_adapter_everywhere(method, kind, net, tmp_path):
    base = net(LAYERS[kind])
    own = copy.deepcopy(base)
    x = torch.randn(3, 6)
    name = "0" if net is ListOfOne else "q"
    slices = {"fused_slices": {name: {"q": [1, 6, 0, 3]}}} if kind == "fused" else {}
    model = get_peft_model(base, CONFIGS[method](target_modules=rf".*\b{name}", **slices))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
        moved = model(x)
        assert not torch.allclose(moved, own(x))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(own), tmp_path)
        assert torch.equal(loaded(x), moved)
        with model.disable_adapter():
            assert torch.equal(model(x), own(x))
        assert torch.allclose(loaded.merge_and_unload()(x), moved, atol=1e-6)
        unloaded = model.unload()
        assert torch.equal(unloaded(x), own(x))
        assert list(unloaded.state_dict()) == list(own.state_dict())
