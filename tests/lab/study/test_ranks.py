"""SARA's ranks in other methods, and the shuffled control."""

import re
from collections import Counter
from functools import cache

import pytest
import torch
from transformers import LlamaForCausalLM

from svdtune.lab.study.budget import fit
from svdtune.lab.study.counts import count, opened
from svdtune.lab.study.ranks import solve_ranks
from svdtune.linalg import rank_at_threshold
from svdtune.training.method import adapt, method_problems
from tiny import tiny_llama

ALL = {"target_modules": "all-linear"}
SECTIONS = {
    "lora": {"name": "lora", **ALL},
    "dora": {"name": "lora", "use_dora": True, "r": 4, "lora_alpha": 12, **ALL},
    "dylora": {"name": "dylora", **ALL},
    "sorsa": {"name": "sorsa", "gamma": 0.1, **ALL},
    "sara": {"name": "sara", **ALL},
    "mosara": {"name": "mosara", "num_heads": 3, **ALL},
}
BUDGETS = {"mosara": 3000}  # it ends at 3,992 here
BUDGET = 7000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "model"
    model = tiny_llama(num_hidden_layers=4, num_key_value_heads=2, vocab_size=64)
    with torch.no_grad():  # spectra that differ from layer to layer, as trained ones do
        for index, parameter in enumerate(p for p in model.parameters() if p.ndim == 2):
            U, s, Vh = torch.linalg.svd(parameter, full_matrices=False)
            parameter.copy_(U @ torch.diag(s * 0.97 ** (index * torch.arange(len(s)))) @ Vh)
    model.save_pretrained(path)
    return str(path)


def built(section, folder):
    options = {key: value for key, value in section.items() if key != "name"}
    assert not list(method_problems(section["name"], options))
    return adapt(LlamaForCausalLM.from_pretrained(folder), section["name"], options)


def trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def ranks_of(model):
    """Rank by layer, in the model that runs."""
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "r", None), dict) and "default" in module.r
    }


def shapes(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if hasattr(m, "weight")}


@pytest.fixture(scope="module")
def fits(folder):
    """What a section is fitted to, by its name, its ranks' source and a seed: asked for by several
    tests."""
    return cache(lambda name, source, seed=1: fit(SECTIONS[name], folder, BUDGETS.get(name, BUDGET), source, seed))


@pytest.mark.parametrize("source", ["sara", "random", "reverse"])
@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.family(3)
def test_the_ranks_reach_the_model_and_hold_the_budget(fits, folder, name, source):
    fitted = fits(name, source)
    model = built(fitted, folder)
    assert trained(model) == count(opened(folder), fitted) <= BUDGETS.get(name, BUDGET)
    assert "threshold" not in fitted
    ranks = ranks_of(model)
    assert len(ranks) == 28
    assert len(set(ranks.values())) > 2
    assert {f"^{re.escape(name)}": rank for name, rank in ranks.items()} == fitted["rank_pattern"]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_ranks_are_saras_at_the_threshold(fits, folder, name):
    section, budget = SECTIONS[name], BUDGETS.get(name, BUDGET)
    ranks, threshold = solve_ranks(opened(folder), section, budget)
    built_ranks = ranks_of(built(fits(name, "sara"), folder))
    assert built_ranks == ranks
    weights = dict(LlamaForCausalLM.from_pretrained(folder).named_modules())
    for layer, rank in built_ranks.items():
        values = torch.linalg.svdvals(weights[layer].weight.double())
        assert rank == rank_at_threshold(values, threshold), layer


def test_the_control_moves_saras_ranks_among_layers_of_a_shape(fits, folder):
    shape = shapes(folder)
    sara = ranks_of(built(fits("lora", "sara"), folder))
    control = fits("lora", "random", 7)
    moved = ranks_of(built(control, folder))
    assert count(opened(folder), control) == count(opened(folder), fits("lora", "sara"))
    assert moved != sara
    for one in set(shape.values()):
        of_shape = [name for name in sara if shape[name] == one]
        assert Counter(moved[name] for name in of_shape) == Counter(sara[name] for name in of_shape)


@pytest.mark.parametrize("name", SECTIONS)
def test_reversed_ranks_fall_where_saras_rise(fits, folder, name):
    shape = shapes(folder)
    sara = ranks_of(built(fits(name, "sara"), folder))
    other = ranks_of(built(fits(name, "reverse"), folder))
    assert other != sara
    for one in set(shape.values()):
        of_shape = sorted((name for name in sara if shape[name] == one), key=sara.__getitem__)
        assert [other[name] for name in of_shape] == sorted((sara[name] for name in of_shape), reverse=True)


def test_a_seed_gives_one_draw_and_another_seed_another(folder):
    draws = [fit(SECTIONS["sorsa"], folder, BUDGET, "random", seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_every_layer_of_lora_is_scaled_alike(fits, folder):
    for name, ratio in (("lora", 2), ("dora", 3)):
        model = built(fits(name, "sara"), folder)
        found = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
        assert found == {ratio}


def test_without_a_budget_what_the_method_trains_is_the_budget(folder):
    stands, sara = {"name": "lora", "r": 6, **ALL}, {"name": "sara", "threshold": 0.2, **ALL}
    given, control = fit(stands, folder, None, "sara"), fit(sara, folder, None, "random", seed=3)
    model = opened(folder)
    assert 0.97 * count(model, stands) < count(model, given) <= count(model, stands)
    assert count(model, control) == count(model, sara)


def test_ranks_that_the_section_gives_stay(folder):
    section = {"name": "sorsa", "rank_pattern": {"down_proj": 9}, **ALL}
    ranks = ranks_of(built(fit(section, folder, 9000, "sara"), folder))
    assert {rank for name, rank in ranks.items() if name.endswith("down_proj")} == {9}
    assert any(rank != 9 for name, rank in ranks.items())
