"""Groups of layers: their scores beside the ranks that SARA gives them, in results, tables and the
figure."""

from pathlib import Path
from statistics import fmean

import pytest
import torch
from made_results import SEEDS, made_run, read

from svdtune.lab.study.arms import tables
from svdtune.lab.study.layers import layer_figures, layer_sections, ranks_by_layer
from svdtune.lab.study.results import LayerRanks
from svdtune.lab.study.spec import Study
from svdtune.linalg import rank_at_threshold
from svdtune.models import load

THRESHOLDS = [0.1, 0.3, 0.6]
RANKS = LayerRanks(thresholds=THRESHOLDS, k=[[1, 8, 5], [3, 6, 5], [2, 4, 5], [2, 2, 5], [6, 0, 5]])


def groups(*pairs: tuple[str, list[int] | None, float]) -> list[dict]:
    """Finished runs of arms that train some layers, with an accuracy of about so much."""
    runs = []
    for name, layers, score in pairs:
        method = {"name": name, "r": 2} | ({} if layers is None else {"layers_to_transform": layers})
        for seed in SEEDS:
            run = made_run(f"{name} {layers}", seed, budget=None, method=method)
            for one in run["scores"].values():
                one |= {"value": score, "correct": None}
            runs.append(run)
    return runs


def test_scores_stand_beside_the_mean_ranks_of_their_layers() -> None:
    runs = groups(
        ("lora", [0, 1], 0.4), ("lora", [2, 3], 0.3), ("lora", [4, 4], 0.1), ("sara", [0, 1], 0.25), ("lora", None, 0.9)
    )
    ((heading, text),) = layer_sections(tables(read(runs))[0], RANKS)
    assert heading == "Ranks of the layers"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["layers", "lora, %", "θ = 0.1", "θ = 0.3", "θ = 0.6"]  # one group of sara's compares nothing
    assert rows[2:5] == [
        ["0–1", "40.0", "2.0", "7.0", "5.0"],
        ["2–3", "30.0", "2.0", "3.0", "5.0"],
        ["4–4", "10.0", "6.0", "0.0", "5.0"],
    ]
    # Pearson's of (40, 30, 10) with (2, 2, 6) and (7, 3, 0)
    assert rows[5] == ["correlation with lora", "", "−0.94", "0.96", "–"]


def test_bars_are_as_wide_as_their_layers_and_k_lies_over_them() -> None:
    runs = groups(("lora", [0, 1], 0.4), ("lora", [2, 4], 0.3), ("sara", [0, 1], 0.2), ("sara", [2, 4], 0.1))
    ((name, caption, figure),) = layer_figures(tables(read(runs))[0], RANKS)
    assert (name, caption) == ("layers-math", "math: average by group of layers, and k by layer")
    bars, over = figure.axes
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([40, 30, 20, 10])
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.8, 1.3, 0.8, 1.3])
    assert [list(line.get_ydata()) for line in over.lines] == [[1, 3, 2, 2, 6], [8, 6, 4, 2, 0]]  # θ = 0.6 is not drawn


@pytest.mark.parametrize("ranks", [None, RANKS], ids=["no ranks", "no groups"])
def test_without_groups_or_ranks_there_is_nothing(ranks: LayerRanks | None) -> None:
    runs = groups(("lora", [0, 1], 0.4), ("lora", [2, 3], 0.3)) if ranks is None else groups(("lora", None, 0.4))
    found = tables(read(runs))[0]
    assert [*layer_sections(found, ranks), *layer_figures(found, ranks)] == []


def study(**arms: dict) -> Study:
    return Study.model_validate({"title": "t", "tasks": {"math": "recipe.yaml"}, "arms": arms, "seeds": [1]})


def test_ranks_are_those_of_the_model_at_the_arms_thresholds_too(tiny_folder: Path) -> None:
    sara = {"name": "sara", "threshold": 0.05, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}
    lora = {"name": "lora", "r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    found = ranks_by_layer(study(a={"method": sara}, b={"method": lora}), {"math": {"model": str(tiny_folder)}})
    thresholds = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    k = []
    for layer in load(tiny_folder).model.model.layers:
        weights = [layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight]
        values = [torch.linalg.svdvals(weight.detach().double()) for weight in weights]
        k.append([fmean(rank_at_threshold(each, threshold) for each in values) for threshold in thresholds])
    assert found == {"math": {"thresholds": thresholds, "k": k}}
    whole = {name: value for name, value in lora.items() if name != "layers_to_transform"}
    assert ranks_by_layer(study(a={"method": whole}), {"math": {"model": "none"}}) == {}
