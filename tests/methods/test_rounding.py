"""In bf16 a layer's outputs and gradients lie no further from float64 than those of a LoRA with the
same factors."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from svdtune.methods.compute.changes import changes_at_once
from svdtune.methods.compute.lowrank import Product, low_rank_linear

SLACK = 1.05  # rounding errors are random: LoRA's own differ by as much between seeds


def node(x: Tensor, W: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return low_rank_linear(x, W, None, Product(U, None, V))


def all_at_once(x: Tensor, W: Tensor, U: Tensor, V: Tensor) -> Tensor:
    (change,) = changes_at_once([(Product(U, None, V), torch.bfloat16)])
    return F.linear(x, W).addmm_(x, change.delta)


def lora(x: Tensor, W: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return F.linear(x, W) + F.linear(F.linear(x, V.mT), U)


def results(layer, x: Tensor, W: Tensor, U: Tensor, V: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and gradients of x, U and V, in float64."""
    x, U, V = x.clone().requires_grad_(), torch.nn.Parameter(U.clone()), torch.nn.Parameter(V.clone())
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
        y = layer(x, W, U, V)
    y.backward(upstream.to(y.dtype))
    return [tensor.detach().double() for tensor in (y, x.grad, U.grad, V.grad)]


@pytest.mark.parametrize(("out", "n", "r", "rows"), [(64, 96, 8, 200), (300, 64, 33, 100), (64, 300, 5, 77)])
@pytest.mark.parametrize("layer", [node, all_at_once])
def test_no_further_from_float64_than_lora(layer, out, n, r, rows):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, W, upstream = random(rows, n).bfloat16(), (random(out, n) / n**0.5).bfloat16(), random(rows, out).bfloat16()
    U, V = random(out, r) / r**0.5, random(n, r) / n**0.5
    truth = results(lora, *(tensor.double() for tensor in (x, W, U, V, upstream)))
    theirs, ours = (results(one, x, W, U, V, upstream) for one in (lora, layer))
    for want, its, mine in zip(truth, theirs, ours, strict=True):
        assert float((mine - want).norm()) <= SLACK * float((its - want).norm())
