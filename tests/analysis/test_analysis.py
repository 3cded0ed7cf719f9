"""Analysis of runs that were really trained: what each part says against the weights themselves,
and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from svdtune.analysis import THRESHOLDS, after, base, before, open_run, read_facts, routing
from svdtune.analysis.after import energy, spectrum_of_change
from svdtune.analysis.routing import described, gate_of
from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.linalg import rank_at_threshold
from svdtune.linalg.deviation import compared_factors, deviation
from svdtune.methods.mosara import reference
from svdtune.models import load
from svdtune.training import check_recipe, train

METHODS: dict[str, dict[str, Any]] = {
    "sorsa": {"name": "sorsa", "r": 4, "target_modules": "all-linear"},
    "lora": {"name": "lora", "r": 4, "target_modules": "all-linear"},
    "pissa": {"name": "lora", "r": 4, "init_lora_weights": "pissa", "target_modules": "all-linear"},
    "mosara": {"name": "mosara", "threshold": 0.4, "num_heads": 3, "target_modules": "all-linear"},
    "full": {"name": "full"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    """A short run of each method on the tiny model."""
    torch.manual_seed(0)
    made = {}
    for name, method in METHODS.items():
        settings = {
            "model": str(tiny_folder),
            "method": method,
            "data": {
                "train": {"source": "arithmetic", "limit": 4},
                "eval": {"source": "arithmetic", "split": "test", "limit": 4, "seed": 1},
                "prompt": "question",
                "completion": "solution",
                "answer": "answer",
                "max_length": 256,
            },
            "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1},
            "output": {"dir": str(tmp_path_factory.mktemp("runs") / name)},
        }
        made[name] = train(check_recipe(settings)).folder
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in load(folder).model.named_parameters()}


@pytest.mark.parametrize("name", ["sorsa", "lora", "pissa", "full"])
def test_the_change_of_every_layer(name: str, runs: dict[str, Path], tiny_folder: Path) -> None:
    opened = open_run(runs[name])
    found = after(opened)["layers"]
    first = weights(tiny_folder)
    assert len(found) == 14
    for layer in opened.matrices:
        start, now, said = first[f"{layer.name}.weight"], layer.weight(), found[layer.name]
        delta = (now - start).double()
        expected = deviation(compared_factors(start), compared_factors(now))
        assert said["delta_sigma"] == pytest.approx(expected.delta_sigma, rel=1e-3, abs=1e-7)
        assert said["relative_change"] == pytest.approx(float(delta.norm() / start.norm()), rel=1e-3)
        values = torch.linalg.svdvals(delta)
        assert said["delta"]["values"][:3] == pytest.approx(values[:3].tolist(), rel=1e-3, abs=1e-6)
        rank = len(said["delta"]["values"])
        assert rank <= {"sorsa": 8, "lora": 4, "pissa": 8, "full": 32}[name]
        left = compared_factors(start).U.double()[:, :4].mT @ delta
        assert said["energy"]["left"][2] == pytest.approx(float(left.square().sum() / delta.square().sum()), rel=1e-2)
        assert (said["condition"] is None) == (name == "full")


def test_spectra_and_ranks_are_those_of_the_base(runs: dict[str, Path], tiny_folder: Path) -> None:
    first = weights(tiny_folder)
    for name in ("sorsa", "pissa", "mosara", "full"):
        found = before(open_run(runs[name], ["q_proj"]))
        assert found["thresholds"] == list(THRESHOLDS)
        assert list(found["layers"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        for layer, said in found["layers"].items():
            values = torch.linalg.svdvals(first[f"{layer}.weight"].double())
            assert said["k"] == [rank_at_threshold(values, threshold) for threshold in THRESHOLDS]
            assert said["sum"] == pytest.approx(float(values.sum()))
            assert [value for _, value in said["values"]] == pytest.approx(
                [float(values[i - 1]) for i, _ in said["values"]], rel=1e-5
            )
            assert said["values"][-1][0] == len(values)
            if name != "mosara":
                assert said["rank"] == {"sorsa": 4, "pissa": 4, "full": None}[name]


def test_gates_are_the_paper_equation_on_what_each_layer_reads(runs: dict[str, Path]) -> None:
    opened = open_run(runs["mosara"])
    items = [[5, 6, 7, 8], [9, 10, 11]]
    found = routing(opened, {"one": items, "two": items[:1]})
    assert found["heads"] == 3
    assert found["tasks"]["one"]["tokens"] == 7
    model, name = opened.loaded.model, "model.layers.1.self_attn.q_proj"
    layer = next(each.module for each in opened.layers if each.name == name)
    parts = [layer.adapter_tensor(part, "default") for part in ("frozen_V", "mosara_w1", "mosara_w2")]
    gates = []
    for item in items:
        hidden = model(input_ids=torch.tensor([item]), output_hidden_states=True).hidden_states[1]
        x = model.base_model.model.model.layers[1].input_layernorm(hidden)[0]
        gates.append(reference.gate(x, *parts))
    expected = torch.cat(gates).mean(0)
    torch.testing.assert_close(
        torch.tensor(found["tasks"]["one"]["layers"][name]["gate"]), expected.detach(), rtol=1e-4, atol=1e-6
    )


def test_entropy_and_the_dominating_head() -> None:
    even = described(torch.full((4, 3), 1 / 3))
    assert even.entropy == pytest.approx(1)
    sure = described(torch.tensor([[0.0, 1, 0], [0, 1, 0], [1, 0, 0]]))
    assert sure.entropy == 0
    assert sure.dominant == 1
    assert sure.share == pytest.approx(2 / 3)
    assert sure.gate == pytest.approx([1 / 3, 2 / 3, 0])
    gate = gate_of(torch.randn(5, 4), torch.randn(4, 2), torch.randn(2), torch.randn(3))
    torch.testing.assert_close(gate.sum(1), torch.ones(5))


def test_measures_of_a_known_change() -> None:
    said = spectrum_of_change(torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64))
    assert said["stable_rank"] == pytest.approx(2)
    assert said["effective_rank"] == pytest.approx(2)
    assert said["values"] == [2.0, 2.0]
    base = compared_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    shares = energy(torch.diag(torch.tensor([0.0, 1.0, 0.0])), base)
    assert shares == {"count": [1, 2, 3], "left": [0.0, 1.0, 1.0], "right": [0.0, 1.0, 1.0]}
    assert math.isfinite(spectrum_of_change(torch.zeros(3))["effective_rank"])


def test_the_verb_writes_what_the_report_reads(runs: dict[str, Path]) -> None:
    result = CliRunner().invoke(app, ["analyze", str(runs["lora"]), str(runs["mosara"]), "--items", "2"])
    assert result.exit_code == 0, result.output
    assert "moved most: model.layers." in result.stdout
    assert "mean entropy" in result.stdout
    lora, mosara = read_facts(runs["lora"]), read_facts(runs["mosara"])
    assert lora["after"] == json.loads((runs["lora"] / "analysis" / "after.json").read_text())
    assert list(mosara["routing"]["tasks"]) == ["arithmetic"]
    assert mosara["after"] is None
    assert mosara["missing"] == ["scores: svdtune evaluate RUN"]


def test_what_is_no_run_and_layers_that_are_not_there(runs: dict[str, Path], tmp_path: Path) -> None:
    for command, folder in (("analyze", tmp_path), ("report", tmp_path)):
        result = CliRunner().invoke(app, [command, str(folder)])
        assert result.exit_code == 2
        assert "not a run of svdtune" in result.stderr
    with pytest.raises(SvdtuneError, match=r"matches no trained layer of .*; there are q_proj, k_proj"):
        _ = open_run(runs["sorsa"], ["nothing"]).layers
    with pytest.raises(SvdtuneError, match="has no router: only Mo-SARA with at least two heads"):
        routing(open_run(runs["sorsa"]), {"x": [[1, 2]]})


def test_ranks_of_an_untrained_model_are_told_and_drawn(tiny_folder: Path, tmp_path: Path) -> None:
    found = base(str(tiny_folder), ["q_proj"])
    assert list(found["layers"]) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    stored = weights(tiny_folder)
    for name, layer in found["layers"].items():
        values = torch.linalg.svdvals(stored[f"{name}.weight"].double())
        assert layer["k"] == [rank_at_threshold(values, threshold) for threshold in THRESHOLDS]
    told = CliRunner().invoke(
        app, ["analyze", str(tiny_folder), "--modules", "q_proj", "--figures", str(tmp_path / "figures")]
    )
    assert told.exit_code == 0, told.output
    shown = ", ".join(map(str, found["layers"]["model.layers.1.self_attn.q_proj"]["k"]))
    assert f"model.layers.1.self_attn.q_proj: {shown}" in told.output
    drawn = (tmp_path / "figures" / "ranks-self_attn.q_proj.csv").read_text("utf-8")
    assert len(drawn.splitlines()) == 1 + 2 * len(THRESHOLDS)
    with pytest.raises(SvdtuneError, match="no module is named 'wq'"):
        base(str(tiny_folder), ["wq"])
