"""Ranks for stock LoRA by each rule: the formula, the budget, and one scaling in every layer."""

import json
import math
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from svdtune import SvdtuneError
from svdtune.cli import app
from svdtune.linalg import rank_at_threshold, spectrum
from svdtune.planning import plan
from svdtune.planning.rank_table import RULES, RankTable, effective_rank
from tiny import tiny_llama

QV = ["q_proj", "v_proj"]
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "alpha 12": {"lora_alpha": 12}}


def model():
    return tiny_llama(num_key_value_heads=2)


def by_formula(rule: str, threshold: float) -> dict[str, int]:
    found = {}
    for name, module in model().named_modules():
        if name.endswith(tuple(QV)):
            s = torch.linalg.svdvals(module.weight.double())
            p = s / s.sum()
            whole = {"entropy": math.exp(-float((p * p.log()).sum())), "stable": float(s.square().sum() / s[0] ** 2)}
            if rule == "sara":
                found[name] = rank_at_threshold(s, threshold)
            else:
                found[name] = math.ceil(threshold * whole[rule])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_are_the_formulas_and_every_layer_is_scaled_alike(rule, kind):
    config = LoraConfig(target_modules=QV, **KINDS[kind])
    made = plan(model(), config, threshold=0.4, ranks=rule)
    assert made.sites.ranks == by_formula(rule, 0.4)
    assert len(set(made.sites.ranks.values())) > 1
    adapted = get_peft_model(model(), made.config)
    layers = [layer for layer in adapted.modules() if getattr(layer, "lora_A", None)]
    assert [layer.r["default"] for layer in layers] == list(made.sites.ranks.values())
    assert adapted.get_nb_trainable_parameters()[0] == made.trained
    if kind == "rslora":  # made for ranks that differ: its alpha / √r stays
        assert all(layer.scaling["default"] == pytest.approx(8 / layer.r["default"] ** 0.5) for layer in layers)
    else:
        assert {layer.scaling["default"] for layer in layers} == {1.5 if kind == "alpha 12" else 1.0}


@pytest.mark.parametrize("rule", ["entropy", "stable"])
def test_alone_a_rule_is_the_whole_of_it(rule):
    made = plan(model(), LoraConfig(target_modules=QV), ranks=rule)
    assert (made.sites.ranks, made.threshold) == (by_formula(rule, 1.0), 1.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_is_filled_and_not_passed(rule):
    most = 700
    made = plan(model(), LoraConfig(target_modules=QV), budget=most, ranks=rule)
    assert made.trained <= most
    assert (
        made.sites.ranks
        == plan(model(), LoraConfig(target_modules=QV), threshold=made.threshold, ranks=rule).sites.ranks
    )
    spectra = {name: spectrum(model().get_submodule(name).weight) for name in made.sites.ranks}
    table = RankTable(spectra, rule)
    after = min(
        step for step in table.steps if table.at(step) != list(made.sites.ranks.values()) and step > made.threshold
    )
    more = plan(model(), LoraConfig(target_modules=QV), threshold=min(1.0, after * (1 + 1e-9)), ranks=rule)
    assert more.trained > most


@pytest.mark.parametrize("rule", ["entropy", "stable"])
def test_effective_ranks_of_known_spectra(rule):
    assert effective_rank(torch.ones(7), rule) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0]), rule) == pytest.approx(1)
    table = RankTable({"flat": spectrum(torch.eye(7)), "zero": spectrum(torch.zeros(4, 5))}, rule)
    assert [table.at(threshold) for threshold in (0.01, 0.5, 1.0)] == [[1, 1], [4, 1], [7, 1]]


def test_ranks_of_single_layers_stay():
    config = LoraConfig(target_modules=QV, rank_pattern={r"layers\.1\..*q_proj": 7})
    made = plan(model(), config, ranks="stable")
    assert made.sites.ranks["model.layers.1.self_attn.q_proj"] == 7
    assert (
        made.sites.ranks["model.layers.0.self_attn.q_proj"]
        == by_formula("stable", 1.0)["model.layers.0.self_attn.q_proj"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "best"}, "ranks come from a spectrum by one of sara, entropy, stable; got 'best'"),
        ({"ranks": "stable", "threshold": 2.0}, r"threshold must lie in \(0, 1\]"),
    ],
)
def test_what_is_no_rule(options, message):
    with pytest.raises(SvdtuneError, match=message):
        plan(model(), LoraConfig(target_modules=QV), **options)


def test_a_plan_written_by_the_command_line_is_a_loras(tmp_path):
    model().save_pretrained(tmp_path / "base")
    words = ["--method", "lora", "--ranks", "entropy", "--threshold", "0.3", "--target-modules", "q_proj,v_proj"]
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "base"), *words, "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    section = json.loads((tmp_path / "plan.json").read_text())["method"]
    assert section.pop("name") == "lora"
    adapted = get_peft_model(model(), LoraConfig(**section))
    ranks = {layer.r["default"] for layer in adapted.modules() if getattr(layer, "lora_A", None)}
    assert ranks == set(by_formula("entropy", 0.3).values())


def test_the_largest_threshold_is_not_a_step_early():
    """Partial sums divided by their total and multiplied by it again may come out above
    themselves."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(3)]
        table = RankTable({str(at): spectrum(weight) for at, weight in enumerate(weights)})
        ranks = [table.at(sum(pair) / 2) for pair in pairwise([0.0, *table.steps])]
        for limit in range(3, 18):
            found = table.largest_threshold(lambda given, limit=limit: sum(given) <= limit)
            assert table.at(found) == max((given for given in ranks if sum(given) <= limit), key=sum)
