"""Layers whose weight is not what it seems, or whose module is never called, are refused by name
and stay as they are."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import svdtune
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from tiny import tiny_llama

METHODS = [SaraConfig, MoSaraConfig, SorsaConfig]
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
NAME = r"model\.layers\.1\.mlp\.up_proj"


def weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)


HOOKS = {
    "weight norm": (weight_norm, "WeightNorm"),
    "spectral norm": (nn.utils.spectral_norm, "SpectralNorm"),
    "pruned by size": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "L1Unstructured"),
    "pruned twice": (
        lambda layer: [prune.random_unstructured(layer, "weight", 0.1) for _ in range(2)],
        "PruningContainer",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", HOOKS)
def test_weights_that_a_hook_computes(method, kind):
    hook, name = HOOKS[kind]
    model = tiny_llama()
    hook(model.model.layers[1].mlp.up_proj)
    with pytest.raises(SvdtuneError, match=rf"weight of '{NAME}' is computed by a hook \({name}\).*Take the hook off"):
        get_peft_model(model, method(r=2, target_modules=["up_proj"]))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_in_float8(method, dtype):
    """Their scales lie beside them: what was decomposed was 5,000 times too large."""
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(SvdtuneError, match=rf"weight of '{NAME}' is stored in float8 .*Load the model dequantized"):
        get_peft_model(model, method(r=2, target_modules=["up_proj"]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: MambaForCausalLM(MambaConfig(**SMALL)), ["conv1d", "x_proj", "dt_proj", "out_proj"]),
        (lambda: FalconMambaForCausalLM(FalconMambaConfig(**SMALL)), ["x_proj", "out_proj"]),
        (
            lambda: Mamba2ForCausalLM(Mamba2Config(**SMALL, num_heads=4, head_dim=16, n_groups=1)),
            ["conv1d", "out_proj"],
        ),
    ],
)
def test_layers_that_are_read_and_not_called(method, model, names):
    for name in names:
        with pytest.raises(
            SvdtuneError, match=rf"'\S*mixer\.{name}' is read by the kernels of \S*Mixer and not called"
        ):
            get_peft_model(model(), method(r=2, target_modules=[name]))
    adapted = get_peft_model(model(), method(r=2, target_modules=["in_proj"]))
    adapted(input_ids=torch.arange(6)[None]).logits.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_on_disk(tmp_path, dtype):
    tiny_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SvdtuneError, match=rf"{NAME}\.weight is stored as \w+ in .* their scales lie elsewhere"):
        svdtune.start(str(tmp_path), SorsaConfig(r=2, target_modules=["up_proj"]), tmp_path / "adapter")
    with pytest.raises(SvdtuneError, match="their scales lie elsewhere"):
        svdtune.plan(str(tmp_path), SorsaConfig(threshold=0.5, target_modules=["up_proj"]))
