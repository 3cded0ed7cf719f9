"""Attention by rows is attention over each row alone, outputs and gradients. It changes nothing for
inputs that do not say where rows begin."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_packing import gemma2, loss, mistral, qwen3, rows
from torch import Tensor

from svdtune import SorsaConfig
from svdtune.data.encoding import Collator
from svdtune.training.packing import PackingCollator, keeps_rows_apart
from svdtune.training.row_attention import NAME, attend, attend_in_turn, attention_by_rows, kernel_fits
from tiny import tiny_llama


def by_definition(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None) -> Tensor:
    """softmax(QKᵀ·scale)V with everything masked that is of another row or comes later."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    at = torch.arange(len(query), device=query.device)
    row = torch.searchsorted(starts.long(), at, right=True)
    seen = (row[:, None] == row) & (at[:, None] >= at)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or 1 / math.sqrt(query.shape[-1]))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), value)


def gradients(attention: Callable[..., Tensor], inputs: list[Tensor], *more: Any) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    found = attention(*inputs, *more)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).to(found).view_as(found)
    return [found.detach(), *torch.autograd.grad((found * weight).sum(), inputs)]


@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1), (7, 1, 4), (2, 9)])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_rows_in_turn_are_attention_by_definition(
    lengths: tuple[int, ...], heads: tuple[int, int], scale: float | None
) -> None:
    torch.manual_seed(sum(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = [torch.randn(sum(lengths), of, 8, dtype=torch.float64) for of in (heads[0], heads[1], heads[1])]
    found = gradients(attend_in_turn, inputs, starts, scale)
    for one, other in zip(found, gradients(by_definition, inputs, starts, scale), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch.equal(attend(*inputs, starts, max(lengths), scale), found[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_the_kernel_is_attention_by_definition(dtype: torch.dtype, width: int, heads: tuple[int, int]) -> None:
    lengths = (70, 1, 33, 300)
    torch.manual_seed(0)
    starts = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    shapes = [(sum(lengths), of, width) for of in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes]
    exact = gradients(by_definition, [x.double() for x in inputs], starts, None)
    found = gradients(lambda *given: attend(*given[:4], max(lengths), given[4]), inputs, starts, None)
    for one, other in zip(found, exact, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize("model", [tiny_llama, qwen3])
def test_losses_and_gradients_are_those_of_padded_rows(model: Callable[[], Any]) -> None:
    batch = rows(11, 3, 5, 2, 9, 4)
    adapted = get_peft_model(model(), SorsaConfig(r=2, target_modules="all-linear"))
    padded = loss(adapted, Collator(0, 1)(batch))
    exact = torch.autograd.grad(padded, [p for p in adapted.parameters() if p.requires_grad])
    with attention_by_rows(adapted):
        assert keeps_rows_apart(adapted, flat=True)
        packed = loss(adapted, PackingCollator(0, flat=True, multiple_of=16)(batch))
        found = torch.autograd.grad(packed, [p for p in adapted.parameters() if p.requires_grad])
    assert float(packed) == pytest.approx(float(padded), rel=1e-5)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", [tiny_llama, qwen3])
def test_other_inputs_are_attended_to_as_before(model: Callable[[], Any]) -> None:
    base, batch = model(), rows(6, 2)
    before = base.config._attn_implementation
    padded = Collator(0, 1)(batch)
    prompt = {"input_ids": padded["input_ids"][:1], "attention_mask": torch.ones(1, 6, dtype=torch.long)}

    def results() -> list[Tensor]:
        told = base.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        alone = base(input_ids=prompt["input_ids"]).logits
        return [loss(base, padded).detach(), told, alone.detach()]

    expected = results()
    with attention_by_rows(base):
        assert base.config._attn_implementation == NAME
        found = results()
    assert base.config._attn_implementation == before
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model", [mistral, gemma2])
def test_models_that_attend_otherwise_are_found(model: Callable[[], Any]) -> None:
    """A sliding window and softcapped scores are not what the kernel is asked for."""
    base = model()
    with attention_by_rows(base):
        assert not keeps_rows_apart(base, flat=True)
    assert keeps_rows_apart(base, flat=True)


def test_an_error_restores_the_attention() -> None:
    base = tiny_llama()
    before = base.config._attn_implementation
    with pytest.raises(KeyError), attention_by_rows(base):
        raise KeyError
    assert base.config._attn_implementation == before


def test_the_kernel_is_for_16_bits_on_a_gpu() -> None:
    assert not kernel_fits(tiny_llama(), torch.bfloat16)
    assert not kernel_fits(tiny_llama(), None)


@pytest.mark.parametrize("length", [None, 12])
def test_a_sequence_of_all_rows_says_where_they_begin(length: int | None) -> None:
    batch = PackingCollator(0, flat=True, multiple_of=8, length=length)(rows(5, 2, 3))
    size = 16 if length is None else 40  # three rows of 12, rounded up
    assert batch["input_ids"].shape == (1, size)
    # Padding is one more row; where all batches have one shape, none is longer than a sequence.
    padding = [size] if length is None else [22, 34, size]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7, 10, *padding]
    assert batch["max_length_k"] == (6 if length is None else length)
