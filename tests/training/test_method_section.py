"""The method on the model: what is adapted, and an error with near matches where a target is not
what was meant."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from svdtune.checkpoint import open_checkpoint
from svdtune.errors import SvdtuneError
from svdtune.lab.study.counts import count as study_count
from svdtune.methods.injection import by_kind
from svdtune.methods.layers.matrices import trained_layers
from svdtune.methods.sites import count, sites
from svdtune.models import load
from svdtune.training.method import adapt
from svdtune.training.preview import masked_text, show_adapted


def put(tiny_folder: Path, name: str = "lora", **options: Any) -> Any:
    return adapt(load(tiny_folder).model, name, options)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa", "lora"])
def test_adapted_modules_are_listed_by_kind(tiny_folder: Path, name: str) -> None:
    model = put(tiny_folder, name, r=2, target_modules=["q_proj", "v_proj"])
    names = [site.name for site in sites(model)]
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert by_kind(names) == {"self_attn.q_proj": 2, "self_attn.v_proj": 2}


def test_parameters_are_counted(tiny_folder: Path) -> None:
    base = load(tiny_folder).model.num_parameters()
    trained = 2 * 2 * (32 + 32)  # two layers, r = 2, q of 32 × 32
    assert count(put(tiny_folder, r=2, target_modules=["q_proj"])) == (trained, 0, base + trained)


def test_full_fine_tuning_trains_everything(tiny_folder: Path) -> None:
    trained, _, total = count(put(tiny_folder, "full"))
    assert trained == total


def test_full_fine_tuning_of_some_layers_leaves_the_others_alone(tiny_folder: Path) -> None:
    model = put(tiny_folder, "full", target_modules=["q_proj", "v_proj"])
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    kinds = by_kind([name.removesuffix(".weight") for name in trained])
    assert kinds == {"self_attn.q_proj": 2, "self_attn.v_proj": 2}
    assert count(model).trained == sum(model.get_parameter(name).numel() for name in trained)
    assert [layer.name for layer in trained_layers(model)] == [
        name.removesuffix(".weight") for name, _ in model.named_parameters() if name in trained
    ]
    method = {"name": "full", "target_modules": ["q_proj", "v_proj"]}
    assert study_count(open_checkpoint(tiny_folder), method) == count(model).trained
    with pytest.raises(SvdtuneError, match="no module is named 'wq'"):
        put(tiny_folder, "full", target_modules=["wq"])


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("sorsa", {"r": 2, "target_modules": ["q_proj"]}, "adapted   2 modules: self_attn.q_proj ×2"),
        ("prompt_tuning", {"num_virtual_tokens": 3}, "adapted   none: virtual tokens are trained"),
        ("full", {}, "adapted   none: the whole model is trained"),
        ("full", {"target_modules": ["q_proj"]}, "adapted   none: some of the model's own weights are trained"),
    ],
)
def test_what_is_shown_before_training(tiny_folder: Path, name: str, options: Any, shown: str) -> None:
    model = put(tiny_folder, name, **options)
    console = Console(file=io.StringIO(), width=200)
    show_adapted(console, sites(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == shown
    assert lines[1].startswith(f"trained   {trained:,} of ")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"no module is named 'q_prj' .*near matches: q_proj \(×2\)"),
        (["q_proj", "wq"], r"no module is named 'wq' .*; this model has q_proj \(×2\), k_proj \(×2\)"),
        ("q_prj", r"no module matches target_modules = 'q_prj'; near matches: q_proj"),
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
    assert [site.name for site in sites(one)] == ["model.layers.1.self_attn.q_proj"]


def test_a_method_that_does_not_fit_is_one_message(tiny_folder: Path) -> None:
    with pytest.raises(SvdtuneError, match=r"r = 4096|r=4096|4096"):
        put(tiny_folder, "sorsa", r=4096)


def test_the_mask_is_visible(tiny_tokenizer: Any) -> None:
    ids = [*tiny_tokenizer.encode("ask"), *tiny_tokenizer.encode("say"), tiny_tokenizer.eos_token_id]
    example = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    assert masked_text(example, tiny_tokenizer) == [(True, "ask"), (False, "say<|end|>")]
