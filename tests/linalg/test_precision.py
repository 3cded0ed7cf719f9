"""fp32 products are formed in fp32 whatever was allowed, under both of torch's ways of allowing it,
and what was allowed comes back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svdtune.linalg import precision
from svdtune.linalg.precision import full_precision, ieee
from svdtune.methods.sorsa.math import penalty

CPU = torch.device("cpu")
backends = torch.backends
apart = pytest.mark.skipif(
    not hasattr(backends, "fp32_precision"), reason="torch 2.8 has one setting for GPUs and CPUs"
)


def settings() -> list[Any]:
    return [backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv]


def state() -> list[str]:
    """Everything that can be read: in torch 2.8 the one setting."""
    if not hasattr(backends, "fp32_precision"):
        return [torch.get_float32_matmul_precision()]
    return [setting.fp32_precision for setting in settings()]


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    """Nothing is set by hand before, and after, though a test fails."""
    if not hasattr(backends, "fp32_precision"):
        yield
        return
    kept = backends.cudnn.conv.fp32_precision
    for setting in settings()[:-1]:
        setting.fp32_precision = "none"
    yield
    for setting in settings()[:-1]:
        setting.fp32_precision = "none"
    backends.cudnn.conv.fp32_precision = kept


def use(setting: Callable[[], Any], value: str) -> Callable[[], None]:
    def choose() -> None:
        setting().fp32_precision = value

    return choose


CHOICES = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
}
CHOICES_APART = {
    "everything": use(lambda: backends, "tf32"),
    "everything bf16": use(lambda: backends, "bf16"),
    "cuda": use(lambda: backends.cudnn, "tf32"),
    "cuda matmul": use(lambda: backends.cuda.matmul, "tf32"),
    "cpu matmul": use(lambda: backends.mkldnn.matmul, "bf16"),
    "convolutions": use(lambda: backends.cudnn.conv, "ieee"),
}


@pytest.mark.parametrize(
    "choose", [*CHOICES.values(), *(pytest.param(choose, marks=apart) for choose in CHOICES_APART.values())]
)
@pytest.mark.parametrize("guard", [full_precision, ieee])
def test_a_choice_is_set_aside_and_comes_back(choose: Callable[[], None], guard: Any) -> None:
    choose()
    before = state()
    with guard(CPU):
        during = state()
    assert state() == before
    if len(before) == 1:
        assert during == ["highest"]
    else:
        assert set(during[2:4]) <= {"ieee", "none"}
        assert during[:2] + during[4:] == before[:2] + before[4:]  # what is no product stays


@apart
def test_what_was_inherited_still_is() -> None:
    backends.fp32_precision = "tf32"
    with ieee(CPU):
        pass
    backends.fp32_precision = "none"
    assert backends.cuda.matmul.fp32_precision == "none"
    backends.cuda.matmul.fp32_precision = "tf32"
    backends.fp32_precision = "ieee"
    with ieee(CPU):
        assert backends.cuda.matmul.fp32_precision == "ieee"
    assert backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("choice", ["high", "medium"])
def test_the_older_way_can_still_be_asked_afterwards(choice: str) -> None:
    torch.set_float32_matmul_precision(choice)
    with ieee(CPU):
        pass
    assert torch.get_float32_matmul_precision() == choice
    assert backends.cuda.matmul.allow_tf32


@apart
def test_the_regularizer_works_where_gpus_and_cpus_were_set_apart() -> None:
    backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    norms, (gradient,) = penalty([torch.randn(8, 2)])
    assert norms.isfinite().all()
    assert gradient.isfinite().all()


def test_torch_2_8_is_asked_in_the_one_way_that_it_has() -> None:
    said = ["medium"]
    old = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=True)), mkldnn=SimpleNamespace())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: said[-1])
        patch.setattr(torch, "set_float32_matmul_precision", said.append)
        patch.setattr(torch, "backends", old)
        with precision._Ieee(), precision._Ieee():
            assert said == ["medium", "highest"]
    assert said == ["medium", "highest", "medium"]


@apart
def test_the_last_thread_to_leave_puts_the_choice_back() -> None:
    torch.set_float32_matmul_precision("high")
    first, second = ExitStack(), ExitStack()
    with first:
        first.enter_context(precision._Ieee())
        other = Thread(target=second.enter_context, args=(precision._Ieee(),))
        other.start()
        other.join()
    assert backends.cuda.matmul.fp32_precision == "ieee"
    with pytest.raises(KeyError), second:
        raise KeyError
    assert torch.get_float32_matmul_precision() == "high"


def test_autocast_and_autograd_stay_out() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (weight @ weight).dtype == torch.bfloat16
        with ieee(CPU):
            product = weight @ weight
            assert (product.dtype, product.requires_grad) == (torch.float32, True)
        with full_precision(torch.device("meta")):
            product = weight @ weight
            assert (product.dtype, product.requires_grad) == (torch.float32, False)
