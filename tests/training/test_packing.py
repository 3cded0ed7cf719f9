"""Rows side by side: the same loss and the same gradients as one above the other, and no row sees
another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.data.encoding import IGNORED, Collator
from svdtune.training.packing import ROW_LENGTHS, TOKENS, PackingCollator, best_fit, keeps_rows_apart
from tiny import tiny_gpt2, tiny_llama

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "pad_token_id": 0,
}


def rows(*lengths: int, masked: int = 1) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(sum(lengths))
    made = [torch.randint(1, 60, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]} for ids in made]


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over all labels, as a trainer with a count of its own takes it."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", TOKENS)}
    logits = model(**inputs).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def make(config: Any, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def mistral() -> PreTrainedModel:
    more = {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 4}
    return make(MistralConfig(**SMALL | more))


def gemma2() -> PreTrainedModel:
    more = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "sliding_window": 4}
    return make(Gemma2Config(**SMALL | more), "eager")


def qwen3() -> PreTrainedModel:
    return make(Qwen3Config(**SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}))


def opt() -> PreTrainedModel:
    return make(OPTConfig(**SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}))


APART: list[Callable[[], Any]] = [tiny_llama, tiny_gpt2, mistral, gemma2, qwen3]


@pytest.mark.parametrize("model", APART)
@pytest.mark.parametrize("flat", [False, True])
def test_losses_and_gradients_are_those_of_padded_rows(model: Callable[[], Any], flat: bool) -> None:
    batch = rows(11, 3, 5, 2, 9, 4)
    adapted = get_peft_model(model(), SorsaConfig(r=2, target_modules="all-linear"))
    results = []
    for collator in (Collator(0, 1), PackingCollator(0, flat=flat, multiple_of=1)):
        adapted.zero_grad()
        value = loss(adapted, collator(batch))
        value.backward()
        results.append((value, [p.grad for p in adapted.parameters() if p.grad is not None]))
    (padded, gradients), (packed, found) = results
    assert float(packed) == pytest.approx(float(padded), rel=1e-5)
    for one, other in zip(gradients, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", APART)
@pytest.mark.parametrize("flat", [False, True])
def test_each_row_keeps_its_own_loss(model: Callable[[], Any], flat: bool) -> None:
    """Example by example: only one row has labels."""
    base, batch = model(), rows(11, 3, 5, 2)
    for at in range(len(batch)):
        alone = loss(base, Collator(0, 1)([batch[at]]))
        others = [row if i == at else row | {"labels": [IGNORED] * len(row["labels"])} for i, row in enumerate(batch)]
        packed = loss(base, PackingCollator(0, flat=flat, multiple_of=1)(others))
        assert float(packed) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("model", APART)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_rows_apart_are_found(model: Callable[[], Any], flat: bool, dtype: torch.dtype) -> None:
    base = model().to(dtype).train()
    assert keeps_rows_apart(base, flat=flat)
    assert base.training


@pytest.mark.parametrize(
    "model",
    [
        lambda: make(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=60, state_size=4), "eager"),
        lambda: make(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60), "eager"),
        lambda: get_peft_model(tiny_llama(), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)),
    ],
    ids=["state space", "no position ids", "virtual tokens"],
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_models_that_mix_rows_are_found(model: Callable[[], Any]) -> None:
    assert not keeps_rows_apart(model())


@pytest.mark.parametrize("apart", [True, False])
def test_models_that_round_by_more_than_others_are_judged_by_their_own_rounding(apart: bool) -> None:
    base = tiny_llama() if apart else make(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60), "eager")

    def rounds(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """By 5 %, and by the shape alone, as kernels in 16 bits do through many wide layers."""
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(output.shape[1]))
        return output + 0.05 * output.norm() / noise.norm() * noise

    base.get_output_embeddings().register_forward_hook(rounds)
    assert keeps_rows_apart(base) == apart


@pytest.mark.parametrize("config", [SorsaConfig(r=2), SaraConfig(r=2), MoSaraConfig(r=2)])
def test_adapters_keep_rows_apart(config: Any) -> None:
    config.target_modules = ["q_proj", "down_proj"]
    assert keeps_rows_apart(get_peft_model(tiny_llama(), config))


def test_a_model_that_counts_positions_by_itself_is_judged_by_its_outputs() -> None:
    model = opt()
    batch = rows(11, 3, 5)
    padded, packed = (loss(model, make_batch(batch)) for make_batch in (Collator(0, 1), PackingCollator(0)))
    assert keeps_rows_apart(model) == (float(packed) == pytest.approx(float(padded), rel=1e-4))


def test_a_batch_is_laid_out_row_behind_row() -> None:
    batch = PackingCollator(0, multiple_of=4)(rows(5, 2, 3, masked=0))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 0, 1, 2, 0, 0, 0]]
    assert (batch["labels"] != IGNORED).tolist() == [
        [False, True, True, True, True, False, False, False],
        [False, True, False, True, True, False, False, False],
    ]
    assert int(batch[TOKENS]) == 10
    assert "attention_mask" not in batch


def test_rows_that_do_not_fit_together_are_padded() -> None:
    batch = PackingCollator(0, multiple_of=1)(rows(5, 4, 5))
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1] * 5]
    assert "position_ids" not in batch
    assert int(batch[TOKENS]) == 14


def test_packed_rows_keep_the_lengths_of_their_examples() -> None:
    one = rows(7)[0] | {ROW_LENGTHS: [3, 4]}
    assert PackingCollator(0, multiple_of=1, length=9)([one, rows(2)[0] | {ROW_LENGTHS: [2]}])["labels"].shape == (2, 9)
    batch = PackingCollator(0, multiple_of=1)([one])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["labels"][0, 3] == IGNORED


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_holds_every_row_once_within_the_capacity(seed: int) -> None:
    lengths = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = best_fit(lengths, 30)
    assert sorted(at for group in groups for at in group) == list(range(40))
    assert all(sum(lengths[at] for at in group) <= 30 for group in groups)
    assert len(groups) <= 1.25 * sum(lengths) / 30 + 1
