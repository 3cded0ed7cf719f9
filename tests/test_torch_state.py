"""No test leaves PyTorch in another state than it found: the fixture that sees to it, held to what
it promises."""

import pytest
import torch

from torch_state import allow_tf32, kept_torch_state


def state():
    found = [torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_grad_enabled()]
    return [*found, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()]


def change_everything():
    allow_tf32()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("error", [None, KeyError])
def test_everything_is_put_back(error):
    before = state()
    try:
        with kept_torch_state():
            change_everything()
            assert all(now != then for now, then in zip(state(), before, strict=True))
            if error:
                raise error
    except KeyError:
        assert error
    assert state() == before


def test_a_test_begins_in_full_fp32():
    allow_tf32()
    with kept_torch_state():
        assert torch.get_float32_matmul_precision() == "highest"


def test_compiled_code_is_forgotten():
    compiled = 0

    def backend(graph, _):
        nonlocal compiled
        compiled += 1
        return graph.forward

    def double(x):
        return x * 2

    for _ in range(2):
        with kept_torch_state():
            faster = torch.compile(double, backend=backend)
            faster(torch.ones(3))
            faster(torch.ones(3))
    assert compiled == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_may_wait_again():
    with kept_torch_state():
        torch.ones(1, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
    assert float(torch.ones(1, device="cuda")) == 1
