"""base_weight over every kind of layer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from svdtune.errors import SvdtuneError
from svdtune.spectra import base_weight


def test_linear_is_returned_as_it_is():
    layer = nn.Linear(3, 5, dtype=torch.bfloat16)
    assert torch.equal(base_weight(layer), layer.weight)
    assert not base_weight(layer).requires_grad


def test_conv1d_is_transposed_to_out_by_in():
    layer = Conv1D(5, 3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(x @ base_weight(layer).mT + layer.bias, layer(x))


def test_conv2d_is_flattened_to_out_by_patch():
    layer = nn.Conv2d(3, 5, 2, bias=False)
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(x.flatten(1) @ base_weight(layer).mT, layer(x).flatten(1))


def test_an_adapted_layer_gives_its_base_weight():
    model = nn.Sequential(nn.Linear(3, 5))
    before = model[0].weight.clone()
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
    assert torch.equal(base_weight(adapted.base_model.model[0]), before)


def test_layers_quantized_by_bitsandbytes_are_dequantized(monkeypatch):
    """With a stand-in of bitsandbytes' interface, which needs no GPU: PEFT recognises its classes
    by name."""
    import sys
    from types import ModuleType, SimpleNamespace

    weight = torch.randn(4, 6)
    scale = weight.abs().amax(1) / 127

    class Int8Params(nn.Parameter):
        pass

    fake = ModuleType("bitsandbytes")
    fake.functional = SimpleNamespace(
        int8_vectorwise_dequant=lambda data, stats: data * stats.view(-1, 1) * (1 / 127),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    layer = nn.Linear(6, 4, bias=False)
    stored = Int8Params((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
    stored.SCB = scale * 127
    layer.weight = stored
    layer.state = SimpleNamespace(SCB=stored.SCB)
    found = base_weight(layer)
    assert found.is_floating_point()
    torch.testing.assert_close(found, weight, atol=0.02, rtol=0.02)


def test_weights_offloaded_by_accelerate_are_read_from_where_they_wait():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(3, 5))
    before = model[0].weight.detach().clone()
    cpu_offload(model, execution_device="cpu")
    assert model[0].weight.is_meta
    assert torch.equal(base_weight(model[0]), before)
    assert model[0].weight.is_meta


def test_a_meta_weight_without_values_is_refused():
    with pytest.raises(SvdtuneError, match="meta device"):
        base_weight(nn.Linear(3, 5, device="meta"))


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(3, elementwise_affine=False)]
)
def test_modules_without_a_weight_are_refused(module):
    with pytest.raises(SvdtuneError, match="no weight"):
        base_weight(module)
