"""The method on the model: what is adapted, and an error with near matches where a target is not what was meant."""

from pathlib import Path
from typing import Any

import pytest

from svdtune.errors import SvdtuneError
from svdtune.models import load
from svdtune.training.method import adapt, adapted_modules, by_kind
from svdtune.training.preview import masked_text, parameter_counts


def put(tiny_folder: Path, name: str = "lora", **options: Any) -> Any:
    return adapt(load(tiny_folder).model, name, options)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa", "lora"])
def test_adapted_modules_are_listed_by_kind(tiny_folder: Path, name: str) -> None:
    model = put(tiny_folder, name, r=2, target_modules=["q_proj", "v_proj"])
    assert adapted_modules(model)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert by_kind(adapted_modules(model)) == {"self_attn.q_proj": 2, "self_attn.v_proj": 2}


def test_parameters_are_counted(tiny_folder: Path) -> None:
    base = load(tiny_folder).model.num_parameters()
    trained = 2 * 2 * (32 + 32)  # two layers, r = 2, q of 32 × 32
    assert parameter_counts(put(tiny_folder, r=2, target_modules=["q_proj"])) == (trained, base + trained)


def test_full_fine_tuning_trains_everything(tiny_folder: Path) -> None:
    trained, total = parameter_counts(put(tiny_folder, "full"))
    assert trained == total


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"no module is named 'q_prj' .*near matches: q_proj \(×2\)"),
        (["q_proj", "wq"], r"no module is named 'wq' .*; this model has q_proj \(×2\), k_proj \(×2\)"),
        ("q_prj", r"no module matches method.target_modules = 'q_prj'; near matches: q_proj"),
        (
            ["0.self_attn.q_proj"],
            r"matches only 1 of the 2 modules named 'q_proj'; name 'q_proj', and if you mean single",
        ),
    ],
)
def test_targets_that_match_nothing_or_surprisingly_little(tiny_folder: Path, targets: Any, message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        put(tiny_folder, r=2, target_modules=targets)


def test_single_layers_and_single_modules_can_be_meant(tiny_folder: Path) -> None:
    one = put(tiny_folder, r=2, target_modules=["q_proj"], layers_to_transform=[1])
    assert adapted_modules(one) == ["model.layers.1.self_attn.q_proj"]


def test_a_method_that_does_not_fit_is_one_message(tiny_folder: Path) -> None:
    with pytest.raises(SvdtuneError, match=r"r = 4096|r=4096|4096"):
        put(tiny_folder, "sorsa", r=4096)


def test_the_mask_is_visible(tiny_tokenizer: Any) -> None:
    ids = [*tiny_tokenizer.encode("ask"), *tiny_tokenizer.encode("say"), tiny_tokenizer.eos_token_id]
    example = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    assert masked_text(example, tiny_tokenizer) == [(True, "ask"), (False, "say<|end|>")]
