"""A study's tables: what every cell says, and that no run and no arm is left out."""

import pytest
from made_results import SEEDS, broken, made_run, read, search, whole_study

from svdtune.lab.study.arms import AVERAGE, tables
from svdtune.lab.study.table import comparison_table, score_table, search_table


def rows(text):
    """The cells of a table's rows by the first, and the head's under None."""
    lines = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {None: lines[0]} | {line[0]: line for line in lines[2:]}


def cell(text, arm, column):
    found = rows(text)
    return found[arm][found[None].index(column)]


def study(**rates):
    return [made_run(arm, seed, {"svamp": rate, "gsm8k": 0.3}) for arm, rate in rates.items() for seed in SEEDS]


def test_scores_are_means_over_seeds_with_their_deviation():
    runs = [made_run("lora", s, scores={"svamp": {"metric": "accuracy", "value": s / 10, "n": 10}}) for s in SEEDS]
    text = score_table(tables(read(runs))[0])
    assert cell(text, "lora", "svamp, %") == "20.0 ± 10.0 (−4.8 to 44.8)"
    assert cell(text, "lora", "trained") == "299,520"
    assert cell(text, "lora", "share") == "0.222%"
    assert cell(text, "lora", "seeds") == "3"
    assert cell(text, "lora", "training loss") == "0.270 ± 0.010"
    assert cell(text, "lora", "seconds") == "62"
    assert AVERAGE not in text  # of one set


def test_the_average_is_that_of_the_sets():
    found = tables(read(study(lora=0.4)))[0]
    lora = found.arms[0]
    assert lora.cells[AVERAGE].mean == pytest.approx((lora.cells["svamp"].mean + lora.cells["gsm8k"].mean) / 2)
    assert found.main == AVERAGE


def test_a_table_for_each_task_and_budget_with_unfitted_arms_in_each():
    runs = study(lora=0.4) + [run | {"budget": 5} for run in study(lora=0.4)]
    runs += [made_run("full", s, budget=None) for s in SEEDS] + [
        made_run("lora", s, task="e2e", budget=None) for s in SEEDS
    ]
    found = tables(read(runs))
    assert [(one.task, one.budget) for one in found] == [("math", 5), ("math", 300_000), ("e2e", None)]
    assert [arm.name for arm in found[0].arms] == ["lora", "full"]
    assert "full*" in rows(score_table(found[1]))
    assert r"\* not fitted to the budget" in score_table(found[1])
    assert "of the budget)" in cell(score_table(found[0]), "lora", "trained")
    assert "not fitted" not in score_table(found[2])


@pytest.mark.parametrize(("trained", "told"), [(271_000, "271,000"), (150_000, "150,000 (0.5 of the budget)")])
def test_a_size_far_from_the_budget_says_so(trained, told):
    runs = [made_run(seed=s, trained_parameters=trained) for s in SEEDS]
    assert cell(score_table(tables(read(runs))[0]), "lora", "trained") == told


def test_failed_diverged_and_missing_seeds_are_told():
    runs = study(lora=0.4)[:2] + study(sara=0.4)
    runs[2:4] = [broken(run, "diverged", "the loss was not a number") for run in runs[2:4]]
    runs += [broken(made_run("dora", s), "failed", "out of memory") for s in SEEDS]
    text = score_table(tables(read(runs))[0])
    assert cell(text, "lora", "seeds") == "1 of 3 seeds not run"
    assert cell(text, "sara", "seeds") == "2 of 3 seeds diverged"
    assert cell(text, "dora", "seeds") == "3 of 3 seeds failed"
    assert cell(text, "dora", "average, %") == "–"
    assert cell(text, "dora", "trained") == "299,520"
    assert "- sara, seed 2, learning rate 0.001: diverged: the loss was not a number" in text
    assert text.count("failed: out of memory") == 3


def test_a_finished_run_without_all_scores_does_not_count():
    runs = study(lora=0.4)
    del runs[0]["scores"]["gsm8k"]
    found = tables(read(runs))[0]
    assert [run.seed for run in found.arms[0].finished] == [2, 3]
    assert cell(score_table(found), "lora", "seeds") == "1 of 3 seeds unscored"
    assert "- lora, seed 1, learning rate 0.001: has not all scores" in score_table(found)


@pytest.mark.parametrize(
    ("losses", "collapsed"),
    [
        ([5.0, *[4.0 - i / 10 for i in range(30)]], False),
        ([*[5.0] * 3, *[1.0] * 20, *[3.1] * 10], True),
        ([*[5.0] * 3, *[1.0] * 20, *[2.9] * 10], False),
        ([1.0, *[2.0] * 9], True),  # it never fell
        ([1.0] * 10, False),
        ([1.0, *[2.0] * 8], False),  # too short to say
        ([0.8, 1.1, 4.3, 12.0, *[4.0] * 36], True),  # the first tenth holds the explosion
        ([1.0 + 0.05 * (-1) ** i for i in range(59)] + [1.1], False),  # flat but for noise
        ([*[5.0 - i / 10 for i in range(40)], 6.0], False),  # one spike
        ([5.0, 1.0, None, *[1.0] * 10, 5.0, 5.0], True),
        ([], False),
    ],
)
def test_a_finished_run_that_lost_what_it_had_learned_is_named_and_counts(losses, collapsed):
    runs = study(lora=0.4)
    runs[1]["curve"] = list(enumerate(losses))
    # not a final run
    runs += [run | {"curve": runs[1]["curve"]} for run in search("lora", {1e-3: 0.4, 3e-3: 0.5})]
    text = score_table(tables(read(runs))[0])
    assert cell(text, "lora", "seeds") == ("1 of 3 seeds collapsed" if collapsed else "3")
    assert ("They count in the means:\n\n- lora, seed 2, learning rate 0.001" in text) == collapsed
    assert cell(text, "lora", "average, %") == cell(score_table(tables(read(study(lora=0.4)))[0]), "lora", "average, %")


def test_an_arm_without_any_run_and_one_that_only_searched_have_rows():
    runs = study(lora=0.4) + search("sara", {1e-3: None, 1e-2: None})
    spec = {"arms": {"sorsa": {}, "lora": {}}, "seeds": [1, 2, 3]}
    found = tables(read(runs, spec=spec))[0]
    assert [arm.name for arm in found.arms] == ["sorsa", "lora", "sara"]
    assert cell(score_table(found), "sorsa", "seeds") == "not run"
    assert cell(score_table(found), "sara", "seeds") == "not run: 2 of 2 learning rates diverged"
    assert cell(comparison_table(found), "sara", "difference, points") == "–"


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ({1e-3: 0.4, 3e-3: 0.5}, "0.001 (lowest tried)"),
        ({3e-4: 0.5, 1e-3: 0.4}, "0.001 (highest tried)"),
        ({3e-4: 0.5, 1e-3: 0.4, 3e-3: None}, "0.001"),  # beyond it diverges: no edge
        ({1e-3: 0.4}, "0.001"),
        ({}, "0.001"),
    ],
)
def test_a_learning_rate_at_the_edge_is_marked(losses, told):
    found = tables(read(study(lora=0.4) + search("lora", losses)))[0]
    assert cell(score_table(found), "lora", "learning rate") == told
    assert (search_table(found) is None) == (not losses)


def test_a_learning_rate_found_for_another_arm_says_so():
    spec = {"arms": {"lora": {}, "sara": {"tuned_as": "lora"}}, "seeds": list(SEEDS)}
    found = tables(read(study(lora=0.4, sara=0.4) + search("lora", {3e-4: 1.0, 1e-3: 0.4, 3e-3: 2.0}), spec=spec))[0]
    assert cell(score_table(found), "sara", "learning rate") == "0.001 (as lora)"


def test_the_search_shows_every_candidate():
    runs = study(lora=0.4) + search("lora", {3e-4: 0.5, 1e-3: 0.4, 3e-3: None})
    text = search_table(tables(read(runs))[0])
    assert rows(text)["lora"] == ["lora", "0.5000", "**0.4000**", "diverged"]


def test_differences_have_both_uncertainties_and_corrected_p():
    found = tables(read(study(lora=0.3, sara=0.35, sorsa=0.9)))[0]
    lora, sara, sorsa = found.arms
    assert (lora.seeds, lora.items) == (None, None)
    assert sorsa.items.p < 0.001
    assert sorsa.seeds.p < sara.seeds.p
    assert sorsa.seeds.value == pytest.approx(sorsa.items.value)
    text = comparison_table(found)
    assert list(rows(text)) == [None, "sara", "sorsa"]
    assert cell(text, "sorsa", "items") == "240"
    assert rows(text)["sorsa"][6] == "< 0.001"


def test_one_seed_has_items_to_compare_by():
    runs = [made_run("lora", 1), made_run("sara", 1, {"svamp": 0.9, "aqua": 0.9})]
    found = tables(read(runs, spec={"seeds": [1]}))[0]
    assert found.arms[1].seeds.p is None
    assert found.arms[1].items.p < 0.001
    assert rows(comparison_table(found))["sara"][2:5] == ["–", "–", "1"]
    assert "±" not in score_table(found)


def test_only_the_common_seeds_are_compared():
    found = tables(read(study(lora=0.4)[:2] + study(sara=0.4)[1:]))[0]
    assert found.arms[1].seeds.n == 1
    assert found.arms[1].seeds.value == pytest.approx(found.arms[1].items.value)
    apart = tables(read(study(lora=0.4)[:1] + study(sara=0.4)[1:]))[0]
    assert (apart.arms[1].seeds, apart.arms[1].items) == (None, None)


@pytest.mark.parametrize(
    ("baseline", "told"), [(None, "names no baseline"), ("pissa", "The baseline, pissa, has no score here")]
)
def test_without_a_baseline_nothing_is_compared(baseline, told):
    assert told in comparison_table(tables(read(study(lora=0.4, sara=0.4), baseline=baseline))[0])


def test_a_baseline_that_diverged_is_no_baseline():
    runs = [broken(run, "diverged", None) for run in study(lora=0.4)] + study(sara=0.4)
    found = tables(read(runs))[0]
    assert "has no score here" in comparison_table(found)
    assert found.arms[1].seeds is None


def test_scores_that_are_not_of_items_are_compared_over_seeds_alone():
    found = {one.task: one for one in tables(read(whole_study()["runs"]))}["e2e"]
    text = score_table(found)
    assert "e2e, BLEU" in text
    assert "8.100 ± 0.000" in text
    assert cell(comparison_table(found), "sara", "difference") == "+0.0022"
    assert next(arm for arm in found.arms if arm.name == "sara").items is None


def test_chance_and_the_base_are_named_for_what_they_are():
    base = [
        made_run("base", 1, {"svamp": 0.3, "aqua": 0.2, "boolq": 0.2}, method=None, budget=None, trained_parameters=0)
    ]
    rates = {"lora": {"svamp": 0.9, "aqua": 0.2, "boolq": 0.02}, "sara": {"svamp": 0.25, "aqua": 0.9, "boolq": 0.5}}
    runs = base + [made_run(arm, seed, rate) for arm, rate in rates.items() for seed in SEEDS]
    found = tables(read(runs))[0]
    text = score_table(found)
    marks = {arm: [cell(text, arm, f"{name}, %")[-1] for name in ("svamp", "aqua", "boolq")] for arm in rates}
    assert marks["lora"][1:] == ["†", "‡"]
    assert marks["sara"][0] == "§"
    assert marks["sara"][2] == "†"
    assert marks["lora"][0] not in "†‡§"
    assert marks["sara"][1] not in "†‡§"
    # Of 120 items, for which no one answer was counted.
    assert "one answer to every question comes to (aqua 20.0%, boolq 50.0%)" in text
    assert "guessing comes to (aqua 20%, boolq 50%)" in text
    assert cell(text, "base", "seeds") == "1"
    assert "base" not in rows(comparison_table(found))


def test_the_papers_grading_has_a_column_where_it_is_another():
    runs = study(lora=0.4)
    for run in runs:
        run["scores"]["gsm8k"]["others"] = {"paper": 1.0, "unended": 3.0}
    found = tables(read(runs))[0]
    lora = found.arms[0]
    assert lora.cells["average as the papers grade"].mean == pytest.approx((lora.cells["svamp"].mean + 1) / 2)
    assert "unended" not in score_table(found)


def test_movement_has_columns():
    runs = study(lora=0.4)
    for run in runs:
        run["movement"] = {"delta_sigma": 0.000123, "delta_d": 0.2, "angle": None, "samples": [[0, 0, 0, 0]]}
    text = score_table(tables(read(runs))[0])
    assert cell(text, "lora", "ΔΣ") == "0.000123 ± 0.000000"
    assert "angle" not in text
