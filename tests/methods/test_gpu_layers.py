"""Convolutions and slices on a GPU, against the same on the CPU. Skips without CUDA."""

import copy

import pytest
import torch
from test_convolutions import adapted as convolution
from test_convolutions import data
from test_peft_verbs import CONFIGS, TOKENS
from test_slices import adapted as fused

from pairwise import all_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def compare(model, run, autocast: bool) -> None:
    """Outputs and the gradients of all trained tensors, on both devices."""
    seen = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast and device == "cuda"):
            output = run(twin, device)
        output.float().square().mean().backward()
        gradients = {key: p.grad.cpu() for key, p in twin.named_parameters() if p.requires_grad}
        seen.append((output.detach().float().cpu(), gradients))
    (want, wanted), (got, gradients) = seen
    tolerance = 0.1 if autocast else 2e-3
    assert float((got - want).norm()) <= tolerance * float(want.norm())
    for key, gradient in gradients.items():
        assert float((gradient - wanted[key]).norm()) <= tolerance * float(wanted[key].norm()) + 1e-4, key


@pytest.mark.parametrize(
    ("name", "kind", "autocast"), all_pairs(CONFIGS, ["conv2d-strided", "conv2d-groups", "conv1d"], [False, True])
)
def test_convolutions(name, kind, autocast):
    x = data(kind)
    compare(convolution(name, kind), lambda model, device: model(x.to(device)), autocast)


@pytest.mark.parametrize(("name", "kind", "autocast"), all_pairs(CONFIGS, ["gpt2", "gpt_neox", "phi3"], [False, True]))
def test_slices(name, kind, autocast):
    compare(fused(kind, name), lambda model, device: model(input_ids=TOKENS.to(device)).logits, autocast)


@pytest.mark.parametrize("name", ["sara", "sorsa"])
def test_slices_train_with_dropout(name):
    model = fused("gpt2", name, dropout=0.1).cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = TOKENS.cuda()
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
