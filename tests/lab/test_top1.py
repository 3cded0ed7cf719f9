"""Mo-SARA's top-1 gate against the literal form; what any gate must do through PEFT stands in
`tests/methods/test_gates.py`."""

import itertools

import pytest
import torch
from torch.nn import functional

from svdtune.lab import gates
from svdtune.methods.mosara import reference
from svdtune.methods.mosara.math import Terms, mosara_linear, random_start


def literal(weights):
    return torch.stack([torch.where(row == row.max(), row, torch.zeros_like(row)) for row in weights])


def case(num_heads, use_v, front):
    out, n, k = 7, 9, 4
    U, _, Vh = torch.linalg.svd(torch.randn(out, n).double(), full_matrices=False)
    lam, w1, w2 = (t.double().requires_grad_() for t in random_start(k, num_heads))
    v = torch.randn(n if front else out).double().requires_grad_() if use_v else None
    weight, bias = torch.randn(out, n).double(), torch.randn(out).double()
    x = torch.randn(11, n).double().requires_grad_()
    return x, weight, bias, Terms(U[:, :k], Vh[:k].mT, lam, v, w1, w2, front)


def results(y, inputs):
    """y and the gradients of every input that takes one."""
    leaves = [t for t in (*inputs[:3], *inputs[3]) if isinstance(t, torch.Tensor) and t.requires_grad]
    return [y, *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), leaves)]


@pytest.mark.parametrize(
    ("num_heads", "use_v", "front"), list(itertools.product([2, 5], [True, False], [True, False])), ids=str
)
def test_top1_is_the_literal_form_with_its_gradients(num_heads, use_v, front):
    inputs = case(num_heads, use_v, front)
    want = results(reference.mosara_linear(*inputs[:3], *inputs[3], changed=literal), inputs)
    for got in (
        mosara_linear(*inputs, weights=gates.top1),
        mosara_linear(inputs[0], None, functional.linear(inputs[0], *inputs[1:3]), inputs[3], weights=gates.top1),
    ):
        torch.testing.assert_close(results(got, inputs), want)


def test_top1_gives_the_router_a_gradient_and_uses_two_heads_at_most():
    inputs = case(6, True, False)
    w2 = inputs[3].w2
    y = mosara_linear(*inputs, weights=gates.top1)
    _, _, dlam, _, dw1, dw2 = results(y, inputs)
    assert dw1.abs().min() > 0
    assert dw2.abs().min() > 0
    used = dlam.abs().sum(1).nonzero().flatten().tolist()
    assert set(used) == {int(w2.argmax()), int(w2.argmin())}
