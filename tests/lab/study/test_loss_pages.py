"""The page of a study that measures losses: its contrasts answered, what was named before told from
what was found, whole rounds alone, and the same bytes from the same records."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_results import made_run
from scipy import stats

from svdtune.lab.study.arms import left_out, tables
from svdtune.lab.study.contrasts import answers, at_equal_loss
from svdtune.lab.study.loss_plots import by_forgetting, by_size, loss_figures, regret
from svdtune.lab.study.loss_tables import loss_sections, tied
from svdtune.lab.study.page import main
from svdtune.lab.study.results import Results
from svdtune.lab.study.spec import plan_of

ARMS = {
    "base": {"untrained": True},
    "lora": {"learning_rates": [1e-3, 3e-3]},
    "lora hot": {"learning_rates": [1e-3, 3e-3]},
    "sara": {"learning_rates": [1e-3, 3e-3]},
    "twin": {"learning_rates": [1e-3, 3e-3]},
}
# the loss of answers less LoRA's, the loss on held-out rows, the KL
TRUTH = {"lora": (0.0, 0.40, 0.5), "lora hot": (0.02, 0.39, 0.6), "sara": (-0.03, 0.38, 0.2), "twin": (0.02, 0.41, 0.6)}
CONTRASTS = [
    {"arm": "sara", "against": ["lora", "lora hot"], "on": "answers", "margin": 0.005},
    {"arm": "twin", "against": ["lora hot"], "on": "answers", "margin": 0.005},
    {"arm": "sara", "against": ["lora"], "on": "kl", "margin": 0.005},
    {"arm": "sara", "against": ["lora"], "on": "kl at equal loss", "margin": 0.005},
]
SPEC = {
    "tasks": {"math": "math.yaml"},
    "arms": ARMS,
    "seeds": [1, 2, 3],
    "tune": {"learning_rates": [1e-3], "finish": 2},
    "measure": {"answers": {"svamp": "svamp"}, "text": {"code": "humaneval"}},
    "contrasts": CONTRASTS,
}
N = 300


def measured(loss: float, kl: float, seed: int, arm: str) -> dict[str, Any]:
    items = 0.6 + np.random.default_rng(0).exponential(0.5, N)  # the same of every run
    own = np.random.default_rng([seed, *arm.encode()])
    nll = items + loss + own.normal(0, 0.01, N) + own.normal(0, 0.0005)
    of_text = kl * (1 + own.normal(0, 0.05, 40))

    def one(values: np.ndarray, start: float) -> dict[str, Any]:
        path = [start + (values.mean() - start) * share for share in (0, 1 / 3, 2 / 3, 1)]
        return {"path": path, "items": " ".join(f"{value:.4g}" for value in values)}

    text = {"nll": one(3 + of_text, 3.0), "kl": one(of_text, 0.0)}
    return {"steps": [0, 10, 20, 30], "sets": {"svamp": {"nll": one(nll, 2.0)}, "code": text}}


def study(seeds: tuple[int, ...] = (1, 2, 3), without: tuple[str, int] | None = None, **changes: Any) -> dict[str, Any]:
    """Results of four arms at two rates, the first of them the better one."""
    plan = plan_of(SPEC)
    runs = [
        made_run(
            "base",
            1,
            {},
            method=None,
            trained_parameters=0,
            budget=None,
            learning_rate=None,
            measured=measured(1.0, 0.0, 1, "base"),
        )
    ]
    for arm, (loss, held_out, kl) in TRUTH.items():
        for seed in seeds:
            for rate, worse in ((1e-3, 0.0), (3e-3, 0.05)):
                if (arm, seed) != without or not worse:
                    found = measured(loss + worse, kl, seed, arm)
                    more = {"learning_rate": rate, "eval_loss": held_out + worse + seed / 1e4, "budget": None}
                    size = {"saved_bytes": 5_000_000, "peak_bytes": 2**31, "plans": [plan]}
                    runs.append(made_run(arm, seed, {}, key=f"{arm}{seed}{rate}", measured=found, **more, **size))
    head = {"title": "Losses", "question": "Which?", "baseline": "lora", "spec": SPEC, "svdtune": "0.2.0"}
    return {**head, "machines": [{"device": "a GPU"}], "runs": runs} | changes


def answered(results: dict[str, Any]):
    read = Results.model_validate(results)
    (table,) = tables(read)
    return read, table, answers(read, table)


def test_every_contrast_is_answered_over_seeds_and_items() -> None:
    _, _, (lower, alike, kl, equal) = answered(study())
    assert (lower.arm, lower.baseline) == ("sara", "lora hot"), "the one with the lower loss on held-out rows"
    assert lower.found.value == pytest.approx(-0.05, abs=0.003)
    assert lower.p < 0.05
    assert alike.alike < 0.05
    assert alike.found.interval.low < 0 < alike.found.interval.high
    assert kl.found.value == pytest.approx(-0.3, abs=0.03)
    # SARA comes to LoRA's loss, 0.03 above its own end, with a little less than its last KL
    assert -0.35 < equal.found.value < kl.found.value
    assert all(one.named for one in (lower, alike, kl, equal))


def test_corrected_for_as_many_contrasts_as_there_are() -> None:
    _, _, found = answered(study())
    ps = sorted(one.found.p for one in found)
    assert min(one.p for one in found) == pytest.approx(len(found) * ps[0])


def test_the_loss_at_which_kl_is_compared_is_one_that_both_come_to() -> None:
    """Straight paths: the KL at a loss is in proportion."""
    _, table, (*_, equal) = answered(study())
    sara, lora = (next(arm for arm in table.arms if arm.name == name) for name in ("sara", "lora"))
    level = np.mean([run.measured.path("answers")[-1] for run in lora.finished])
    expected = []
    for run in sara.finished:
        losses, kl = run.measured.path("answers"), run.measured.path("kl")
        expected.append(np.interp(-level, -losses, kl))
    theirs = [
        np.interp(-max(level, run.measured.path("answers")[-1]), -run.measured.path("answers"), run.measured.path("kl"))
        for run in lora.finished
    ]
    assert equal.found.value == pytest.approx(np.mean(expected) - np.mean(theirs))
    over_seeds = stats.ttest_ind(expected, theirs).confidence_interval(0.95)
    assert equal.found.interval == pytest.approx(over_seeds, abs=0.005)


def test_a_run_with_one_checkpoint_counts_with_its_end() -> None:
    run = Results.model_validate(study()).runs[0].measured
    cut = {
        name: {kind: one.model_copy(update={"path": one.path[-1:]}) for kind, one in measures.items()}
        for name, measures in run.sets.items()
    }
    short = run.model_copy(update={"sets": cut})
    ours, theirs = at_equal_loss([short], [run])
    assert np.allclose(ours[0], run.items("kl"))
    assert ours.shape == theirs.shape


def test_the_interval_of_kl_at_equal_loss_is_over_items_too() -> None:
    """Some items move far in all of the arm's runs: other items might say another thing."""
    results = study()
    for run in results["runs"]:
        if run["arm"] == "sara":
            kl = run["measured"]["sets"]["code"]["kl"]
            values = np.array(kl["items"].split(), float) * np.where(np.arange(40) % 8, 0.2, 6.6)
            kl["items"] = " ".join(f"{value * kl['path'][-1] / values.mean():.6g}" for value in values)
    (_, _, kl, equal), (*_, before) = answered(results)[2], answered(study())[2]
    assert equal.found.value == pytest.approx(before.found.value, abs=1e-6)
    widths = [np.ptp(one.found.interval) for one in (kl, equal, before)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[1] > 4 * widths[2]


def test_a_contrast_could_see_what_its_corrected_test_sees() -> None:
    """At that difference p, corrected beside the other contrasts, is at most 5 % four times in
    five."""
    results = study()
    results["spec"] = SPEC | {"contrasts": [CONTRASTS[1], {**CONTRASTS[1], "on": "kl"}]}
    _, table, (alike, kl) = answered(results)
    assert min(alike.found.p, kl.found.p) > 0.05, "nothing is rejected, so each stands at half the level"
    for one in (alike, kl):
        found = one.found
        quantiles = stats.t.ppf(1 - 0.05 / 2 / 2, found.df) + stats.t.ppf(0.8, found.df)
        assert one.least == pytest.approx(quantiles * found.error)
    assert f"| {alike.least:.4f} |" in dict(loss_sections(Results.model_validate(results), table))["Contrasts"]


@pytest.mark.parametrize("changed", ["margin", "plans"])
def test_a_contrast_that_was_not_named_before_every_run_is_exploratory(changed: str) -> None:
    results = study()
    if changed == "margin":
        contrasts = [{**CONTRASTS[0], "margin": 0.01}]
        results["spec"] = SPEC | {"contrasts": contrasts}
    else:
        results["runs"][3]["plans"] = []
    read, table, found = answered(results)
    assert not found[0].named
    text = dict(loss_sections(read, table))["Contrasts"]
    assert "lower (exploratory: not named before every run)" in text


def test_one_seed_decides_nothing() -> None:
    read, table, found = answered(study(seeds=(1,)))
    assert found[0].p < 0.05, "over items alone"
    text = dict(loss_sections(read, table))["Contrasts"]
    assert text.count("not decided: one seed") == len(CONTRASTS)


def test_the_tables_of_a_page() -> None:
    read, table, _ = answered(study())
    sections = dict(loss_sections(read, table))
    assert list(sections) == [
        "Contrasts",
        "Losses (exploratory)",
        "Against lora (exploratory)",
        "Learning rates",
        "What a run costs",
    ]
    for body in sections.values():
        heads = [line for line in body.splitlines() if line.startswith("| ")]
        assert all(line.count(" | ") < 8 for line in heads), "eight columns at most"
    assert "lower" in sections["Contrasts"]
    assert "alike within 0.005" in sections["Contrasts"]
    assert "| sara | 0.001 | 0.3802 | 0.003: 0.4302 |" in sections["Learning rates"]
    assert "| lora | 62 | 2.00 | 5.00 |" in sections["What a run costs"]
    assert sections["Losses (exploratory)"].count("\n| ") == 1 + len(ARMS)


def test_a_seed_that_not_every_arm_has_made_is_left_out(tmp_path: Path) -> None:
    whole, part = study(seeds=(1, 2)), study(without=("twin", 3))
    (found,), (expected,) = (tables(Results.model_validate(one)) for one in (part, whole))
    assert [len(arm.finished) for arm in found.arms] == [1, 2, 2, 2, 2]
    assert [arm.cells for arm in found.arms] == [arm.cells for arm in expected.arms]
    (tmp_path / "results.json").write_text(json.dumps(part))
    assert main([str(tmp_path)]) == 0
    assert "| left out | math: seeds 3, with which not every arm was run |" in (tmp_path / "README.md").read_text()


def test_a_rate_that_an_arm_never_made_leaves_the_rule_as_it_is() -> None:
    part = study(without=("twin", 3))
    part["runs"] = [run for run in part["runs"] if (run["arm"], run["learning_rate"]) != ("sara", 3e-3)]
    results = Results.model_validate(part)
    assert left_out(results, results.runs) == [3]


def test_arms_that_were_measured_on_other_items_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = study()
    nll = results["runs"][-1]["measured"]["sets"]["svamp"]["nll"]
    nll["items"] = nll["items"].rpartition(" ")[0]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main([str(tmp_path)]) == 1
    assert "runs disagree on how many items a set has" in (said := capsys.readouterr().err)
    assert "('measured svamp', 299), ('measured svamp', 300)" in said


def test_a_page_is_made_again_bit_for_bit(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(study()))
        assert main([str(folder)]) == 0
        pages.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert pages[0] == pages[1]
    text = pages[0]["README.md"].decode()
    assert set(re.findall(r"\]\(([\w.-]+\.svg)\)", text)) == {name for name in pages[0] if name.endswith(".svg")}
    assert "| measured on | svamp (300), code (40); 3 times along a run |" in text


def test_rates_that_cannot_be_told_apart_are_tied() -> None:
    assert tied([0.40, 0.41, 0.42], [0.40, 0.41, 0.40])
    assert not tied([0.50, 0.51, 0.52], [0.40, 0.41, 0.40])


def test_a_rate_at_which_a_run_collapsed_is_not_tied() -> None:
    """Its spread is so large that no difference could be told."""
    results = study()
    for run in results["runs"]:
        if run["arm"] == "sara" and run["learning_rate"] == 3e-3 and run["seed"] == 2:
            run |= {"eval_loss": 5.0, "curve": [[step, 1.0 if step < 20 else 6.0] for step in range(40)]}
    read, table, _ = answered(results)
    text = dict(loss_sections(read, table))["Learning rates"]
    assert "| sara | 0.001 | 0.3802 | 0.003: 1.9535, 1 of 3 collapsed |" in text


def test_the_figures_show_the_numbers() -> None:
    _, table, _ = answered(study())
    arms = {arm.name: arm for arm in table.arms}
    for lines in (by_forgetting(table), by_size(table)):
        assert [one.name for one in lines.series] == list(TRUTH), "the base has no place there"
        for one in lines.series:
            arm = arms[one.name]
            assert one.y[-1] == pytest.approx(
                arm.values("answers").mean() - arms["lora"].values("answers").mean(), abs=2e-5
            )
            low, high = one.spread[-1]
            assert (low, high) == (arm.measured["answers"].interval if arm.measured else (one.y[-1],) * 2)
    assert by_forgetting(table).series[2].x[-1] == pytest.approx(0.2, abs=0.01)
    assert not regret(table).series, "two rates are no curve"


def test_regret_is_cut_and_has_the_rates_that_did_not_finish() -> None:
    results = study()
    for seed in (1, 2, 3):
        for arm, more in (("lora", {"measured": measured(0.02, 0.5, seed, "lora")}), ("sara", {"status": "diverged"})):
            size = {"learning_rate": 1e-2, "budget": None, "eval_loss": 0.6, "plans": []}
            results["runs"].append(made_run(arm, seed, {}, key=f"{arm}{seed}more", **size | more))
    _, table, _ = answered(results)
    lora, sara = regret(table).series
    assert (lora.x, sara.x) == ([1e-3, 3e-3, 1e-2],) * 2
    assert lora.y == pytest.approx([0, 0.05, 0.02], abs=2e-3)
    assert sara.y == pytest.approx([0, 0.05, 0.05], abs=2e-3)
    assert max(*lora.y, *sara.y) <= 0.05
    names = [name for name, _, _ in loss_figures([table])]
    assert names == ["forgetting-math", "size-math", "regret-math"]
