"""Methods that are fitted to a budget, counted again in the model that PEFT builds from the
section."""

import re
from functools import cache

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from svdtune.errors import SvdtuneError
from svdtune.lab.study.budget import fit
from svdtune.lab.study.counts import count, opened
from svdtune.methods import injection
from svdtune.training.method import adapt, method_problems
from tiny import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
]


def llama():
    return tiny_llama(num_hidden_layers=1, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=True).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "model"
    llama().save_pretrained(path)
    return str(path)


def trained(section, model=None):
    """What the section trains in a model with weights, built as a run builds it."""
    options = {key: value for key, value in section.items() if key != "name"}
    assert not list(method_problems(section["name"], options))
    adapted = adapt(model or llama(), section["name"], options)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


ALL = {"target_modules": "all-linear"}
SECTIONS = {
    "lora": {"name": "lora", **ALL},
    "dora": {"name": "lora", "use_dora": True, **ALL},
    "pissa": {"name": "lora", "init_lora_weights": "pissa", **ALL},
    "adalora": {"name": "adalora", **ALL},
    "sara": {"name": "sara", **ALL},
    "sara, one rank": {"name": "sara", "r": 3, **ALL},
    "sara without λ": {"name": "sara", "use_lambda": False, **ALL},
    "mosara": {"name": "mosara", "num_heads": 3, **ALL},
    "mosara without a gate": {"name": "mosara", "gate": "none", **ALL},
    "mosara without v": {"name": "mosara", "use_v": False, **ALL},
    "sorsa": {"name": "sorsa", **ALL},
    "sorsa by threshold": {"name": "sorsa", "threshold": 0.3, **ALL},
    "vera": {"name": "vera", **ALL},
    "dylora": {"name": "dylora", "r_min": 2, **ALL},
    "bottleneck": {"name": "bottleneck", **ALL},
    "delora": {"name": "delora", **ALL},
    "randlora": {"name": "randlora", **ALL},
    "hra": {"name": "hra", **ALL},
    "oft": {"name": "oft", **ALL},
    "prefix": {"name": "prefix_tuning"},
    "prompt": {"name": "prompt_tuning"},
}


@pytest.fixture(scope="module")
def fits(folder):
    """What a section is fitted to, by its name and the budget: asked for by several tests, searched
    for once."""
    return cache(lambda name, budget: fit(SECTIONS[name], folder, budget))


# What sizes a method, where it is not its rank.
KNOBS = ("threshold", "init_r", "bottleneck_size", "oft_block_size", "num_virtual_tokens", "r")


def knob(section):
    return next(name for name in KNOBS if name in section)


@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_counted_is_what_peft_trains(fits, folder, name):
    fitted = fits(name, 3000)
    assert count(opened(folder), fitted) == trained(fitted)
    changed = {key for key, value in fitted.items() if SECTIONS[name].get(key) != value}
    assert changed <= {knob(fitted), "lora_alpha", "target_r"}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.family(3)
def test_more_budget_never_gives_less_and_the_next_value_would_go_over(fits, name):
    fitted = [fits(name, budget) for budget in (700, 3000, 10**7)]
    less, middle, most = map(trained, fitted)
    assert less <= middle <= most
    sized = knob(fitted[1])
    if sized == "threshold" or middle == most:
        return  # a share of the singular values has no next value; what has ended goes no further
    if name in ("randlora", "oft"):
        return  # these round, so that the next value may cost less
    assert trained(fitted[1] | {sized: fitted[1][sized] + 1}) > 3000


def test_a_threshold_is_the_largest_that_the_budget_allows(fits):
    fitted = fits("sara", 3000)
    assert trained(fitted) <= 3000
    # of the largest layer: the next step of the threshold adds at least one somewhere
    one_rank = 32 + 48 + 1
    assert trained(fitted | {"threshold": min(1.0, fitted["threshold"] * 1.3)}) > 3000 - one_rank


def test_without_a_budget_a_method_stays_as_it_stands(folder):
    for section in (
        {"name": "lora", "r": 3, **ALL},
        {"name": "sara", **ALL},
        {"name": "sorsa", "r": 5, **ALL},
        {"name": "full"},
        {"name": "ia3", **ALL, "feedforward_modules": []},
    ):
        assert fit(section, folder, None) == section
        assert count(opened(folder), section) == trained(section)


def test_a_method_that_cannot_come_near_takes_its_nearest(fits):
    least = fits("lora", 10)
    assert least["r"] == 1
    assert trained(least) > 10
    assert trained(fits("sara", 10)) == trained(least) + 7  # a λ in each of 7 layers
    assert fits("mosara", 10**7)["threshold"] == 1.0
    assert fits("vera", 10**7)["r"] == 32
    assert fits("adalora", 10**7)["init_r"] == 32
    assert fits("sorsa", 10**7)["r"] == 16  # the k and v projections are [16, 32]


def test_lora_alpha_follows_the_rank(fits, folder):
    assert fits("lora", 3000)["lora_alpha"] == 2 * fits("lora", 3000)["r"]
    both = fit(SECTIONS["lora"] | {"r": 8, "lora_alpha": 32}, folder, 6000)
    assert both["lora_alpha"] == 4 * both["r"]
    assert both["r"] != 8
    assert fit(SECTIONS["lora"] | {"lora_alpha": 5}, folder, 6000)["lora_alpha"] == 5
    stable = fit(SECTIONS["lora"] | {"r": 8, "lora_alpha": 5, "use_rslora": True}, folder, 6000)
    assert stable["lora_alpha"] == 5
    assert "lora_alpha" not in fits("vera", 3000)


@pytest.mark.parametrize(
    ("section", "budget", "starts", "ends", "alpha"),
    [
        ({}, 1, 1, 1, 2),
        ({}, 1000, 2, 1, 4),
        ({}, 2000, 4, 3, 8),
        ({}, 4000, 8, 5, 16),
        ({"init_r": 12, "target_r": 8, "lora_alpha": 12}, 4000, 8, 5, 8),
        ({"init_r": 64, "target_r": 64, "lora_alpha": 64}, 4000, 8, 8, 8),
        ({"init_r": 64, "target_r": 1}, 4000, 8, 1, 16),
        ({"target_r": 8, "lora_alpha": 5}, 4000, 8, 5, 5),
    ],
)
def test_adalora_is_sized_by_the_rank_it_starts_with(folder, section, budget, starts, ends, alpha):
    method = fit(SECTIONS["adalora"] | section, folder, budget)
    assert (method["init_r"], method["target_r"], method["lora_alpha"]) == (starts, ends, alpha)


def test_slices_of_fused_projections_are_counted(tmp_path):
    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))

    gpt2().save_pretrained(tmp_path)
    for name in ("sara", "mosara", "sorsa"):
        section = {"name": name, "target_modules": ["c_attn"], "fused_slices": {"c_attn": ["q", "v"]}}
        fitted = fit(section, str(tmp_path), 900)
        assert count(opened(str(tmp_path)), fitted) == trained(fitted, gpt2()) <= 900


def test_what_a_section_fixes_by_itself_stays_and_is_counted(folder):
    section = {"name": "sara", **ALL, "rank_pattern": {"down_proj": 5}, "modules_to_save": ["norm"]}
    fitted = fit(section, folder, 6000)
    assert count(opened(folder), fitted) == trained(fitted) <= 6000
    assert fitted["rank_pattern"] == {"down_proj": 5}


@pytest.mark.parametrize(
    ("section", "budget", "ranks", "message"),
    [
        ({"name": "lorra"}, 1000, "uniform", "'lorra' is no method"),
        ({}, 1000, "uniform", "None is no method"),
        ({"name": "full"}, 1000, "uniform", "no setting of full says how many"),
        ({"name": "ia3"}, 1000, "uniform", "no setting of ia3 says how many"),
        ({"name": "lora", **ALL}, 0, "uniform", "at least 1; got 0"),
        ({"name": "lora", **ALL}, 1000, "best", "'random', 'reverse'; got 'best'"),
        ({"name": "vera", **ALL}, 1000, "sara", "vera takes no ranks by layer"),
        ({"name": "adalora", **ALL}, 1000, "random", "adalora takes no ranks by layer"),
        ({"name": "lora", "target_modules": ["q_porj"]}, 1000, "uniform", "no module is named 'q_porj'"),
        ({"name": "lora", "rank": 3}, 1000, "uniform", "rank"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(folder, section, budget, ranks, message):
    with pytest.raises(SvdtuneError, match=re.escape(message)):
        fit(section, folder, budget, ranks)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            NotImplementedError(),
            "what lora trains cannot be counted without the model's weights; put it on the loaded model",
        ),
        (TypeError("no such layer"), "the method lora cannot be put on this model: no such layer"),
    ],
)
def test_what_peft_cannot_set_up_without_weights(folder, monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(injection, "get_peft_model", refuse)
    with pytest.raises(SvdtuneError, match=re.escape(message)):
        fit({"name": "lora", **ALL}, folder, 1000)
