"""RWKV-6 on a GPU: the kernel of flash-linear-attention that the published checkpoints call."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(scope="module")
def fla():
    return pytest.importorskip("fla", reason="pip install flash-linear-attention")


def test_the_state_of_the_equations_is_that_of_the_kernel_the_checkpoints_call(fla):
    from fla.ops.rwkv6 import fused_recurrent_rwkv6

    from finch import wkv

    torch.manual_seed(0)
    r, k, v, decay, to = (torch.randn(2, 24, 2, 32, device="cuda") for _ in range(5))
    u = torch.randn(2, 32, device="cuda")
    found = []
    for kernel in (False, True):
        given = [part.clone().requires_grad_() for part in (r, decay, k, v, u)]
        log = -torch.exp(given[1])
        if kernel:
            y = fused_recurrent_rwkv6(given[0], given[2], given[3], log, given[4], scale=1.0)[0]
        else:
            y = wkv(given[0], log.exp(), *given[2:])
        found.append([y, *torch.autograd.grad((y * to).sum(), given)])
    for by_loop, by_kernel in zip(*found, strict=True):
        torch.testing.assert_close(by_kernel, by_loop, rtol=1e-3, atol=1e-3)
