"""The runs of a study: its cells, their search, what makes two runs one, and which rows the search
holds out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svdtune.errors import SvdtuneError
from svdtune.lab.study import grid, worker
from svdtune.lab.study.grid import Fits, Job, cells
from svdtune.lab.study.records import Place
from svdtune.lab.study.spec import load_study

ALL = {"target_modules": "all-linear"}
LORA, SORSA = {"method": {"name": "lora", **ALL}}, {"method": {"name": "sorsa", **ALL}}
TUNE = {"learning_rates": [1e-2, 1e-3, 3e-3], "share": 0.25, "seed": 7, "extend": 2}


def made(file: Path, **how) -> list[grid.Cell]:
    return cells(*load_study(file), **how)


def test_a_cell_for_each_task_budget_and_arm(write_study) -> None:
    arms = {"lora": LORA, "full": {"method": {"name": "full"}, "budget": False}, "base": {"untrained": True}}
    tasks = {"math": "recipe.yaml", "again": "recipe.yaml"}
    found = made(write_study(arms=arms, tasks=tasks, budgets=[3000, "20%"], tune=TUNE, seeds=[4, 5]))
    share = round(0.2 * grid.opened(grid.model_of(found[0].recipe).name).model.num_parameters())
    assert [(cell.task, cell.budget, cell.arm) for cell in found] == [
        (task, budget, arm)
        for task in tasks
        for budget, arm in [(3000, "lora"), (None, "full"), (None, "base"), (share, "lora")]
    ]
    lora, full, base, larger = found[:4]
    assert lora.method_of(0)["r"] < larger.method_of(0)["r"]
    assert [len(cell.search()) for cell in (lora, full, base)] == [3, 3, 0]
    assert [(job.seed, job.learning_rate) for job in lora.finals([3e-3], [4, 5])] == [(4, 3e-3), (5, 3e-3)]
    (alone,) = base.finals([None], [4, 5])
    assert alone.untrained
    assert alone.learning_rate is None


def test_an_arm_has_the_studys_candidates_its_own_or_the_recipes(write_study) -> None:
    arms = {"a": LORA, "b": LORA | {"learning_rates": [2e-2, 1e-2]}, "c": LORA | {"learning_rates": [5e-3]}}
    assert [cell.candidates for cell in made(write_study(arms=arms, tune=TUNE))] == [
        [1e-3, 3e-3, 1e-2],
        [1e-2, 2e-2],
        [5e-3],
    ]
    assert [cell.searched for cell in made(Path("study.yaml"))] == [True, True, False]
    (cell,) = made(write_study(arms={"a": LORA}))
    assert (cell.candidates, cell.searched) == ([1e-3], False)


def test_the_search_trains_with_its_own_seed_and_scores_nothing(write_study) -> None:
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE, settings={"analysis": {}}))
    for job, rate in zip(cell.search(), cell.candidates, strict=True):
        assert (job.phase, job.seed, job.learning_rate, job.heldout) == ("tune", 7, rate, (0.25, 7))
        assert (job.recipe["training"]["seed"], job.recipe["training"]["learning_rate"]) == (7, rate)
        assert not {"evaluation", "analysis"} & job.recipe.keys()
    (final,) = cell.finals([1e-3], [1])
    assert final.heldout is None
    assert {"evaluation", "analysis"} <= final.recipe.keys()


def test_rows_that_the_recipe_holds_out_are_for_the_search(write_study, study_folder: Path) -> None:
    data = {"train": "sara_math", "prompt": "instruction", "completion": "output", "eval": "held.jsonl"}
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE, settings={"data": data}))
    assert {job.heldout for job in cell.search()} == {None}
    assert cell.search()[0].recipe["data"]["eval"] == "held.jsonl"
    assert "eval" not in cell.finals([1e-3], [1])[0].recipe["data"]
    file = write_study(arms={"a": LORA}, tune=TUNE, settings={"data": data, "training": {"eval_steps": 1}})
    assert made(file)[0].finals([1e-3], [1])[0].recipe["data"]["eval"] == "held.jsonl"


def test_the_lowest_loss_is_chosen_and_an_edge_extends_the_search(write_study) -> None:
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE))
    assert cell.ranked({1e-3: 2.0, 3e-3: 1.0, 1e-2: None}) == [3e-3, 1e-3]
    assert cell.ranked({1e-3: None, 3e-3: None, 1e-2: None}) == []
    assert not cell.extend(None)
    assert not cell.extend(3e-3)
    assert cell.extend(1e-3)
    assert cell.candidates == [3e-4, 1e-3, 3e-3, 1e-2]
    assert len(cell.search()) == 4
    assert cell.extend(1e-2)
    assert cell.candidates[-1] == 3e-2
    assert not cell.extend(3e-2), "no more than twice"
    assert cell.extended == 2


@pytest.mark.parametrize("rates", [[1e-3, 1.2e-3], [0.9e-3, 1e-3], [1e-3, 1.0001e-3], [1e-3, 1e-1]])
def test_an_extended_search_goes_beyond_the_edge_however_near_candidates_are(write_study, rates) -> None:
    for at in (0, -1):
        (cell,) = made(write_study(arms={"a": LORA}, tune={"learning_rates": rates, "extend": 3}))
        for _ in range(3):
            assert cell.extend(cell.candidates[at])
        assert cell.candidates == sorted(set(cell.candidates))
        assert len(cell.candidates) == 5


def test_equal_runs_have_one_key_and_others_another(write_study) -> None:
    def job(rate: float = 1e-3, seed: int = 1, **settings) -> Job:
        (cell,) = made(write_study(**{"arms": {"a": LORA}} | settings))
        return cell.finals([rate], [seed])[0]

    key = job().key
    assert len(key) == 12
    assert job(arms={"another name": LORA}).key == key
    assert job(title="Another study", tasks={"another task": "recipe.yaml"}).key == key
    assert job(tune=TUNE).key == key, "how the learning rate was found does not matter"
    rank = made(write_study(arms={"a": LORA}, budgets=[3000]))[0].method_of(0)
    assert job(budgets=[3000]).key == job(arms={"a": {"method": rank}}).key, "nor how the rank was"
    search = made(write_study(arms={"a": LORA}, tune=TUNE | {"seed": 1}))[0].search()
    others = [
        job(rate=2e-3),
        job(seed=2),
        job(arms={"a": SORSA}),
        job(arms={"a": {"untrained": True}}),
        job(settings={"training": {"warmup": 0.1}}),
        *search,
        replace(search[0], heldout=(0.5, 1)),
    ]
    assert len({key, *(other.key for other in others)}) == 1 + len(others)


def test_a_runs_files_are_named_so_that_any_system_takes_them(write_study) -> None:
    (cell,) = made(write_study(arms={"V = 0, 1/2 Λ": LORA}, tasks={"a b": "recipe.yaml"}, budgets=[3000]))
    (job,) = cell.finals([1e-3], [1])
    assert job.name == f"a_b-V_=_0_1_2_-3000-final-lr0.001-seed1-{job.key}"


def test_an_arm_takes_the_rate_of_the_cell_of_its_budget(write_study) -> None:
    arms = {"lora": LORA, "like": LORA | {"ranks": "sara", "tuned_as": "lora"}}
    found = made(write_study(arms=arms, budgets=[3000, 6000], tune=TUNE))
    assert [(cell.arm, cell.budget, cell.like and cell.like.budget) for cell in found] == [
        ("lora", 3000, None),
        ("like", 3000, 3000),
        ("lora", 6000, None),
        ("like", 6000, 6000),
    ]
    arms["like"] |= {"budget": False, "ranks": "uniform"}
    (one,) = (cell for cell in made(write_study(arms=arms, budgets=[3000], tune=TUNE)) if cell.arm == "like")
    assert (one.budget, one.like.budget, one.searched) == (None, 3000, False)
    file = write_study(arms=arms, budgets=[3000, 6000], tune=TUNE)
    with pytest.raises(SvdtuneError, match="like is tuned as lora, which has several budgets where this one has none"):
        made(file)


def test_no_grid_makes_a_name_that_file_systems_refuse(write_study, tmp_path: Path) -> None:
    many = [f"model.layers.{n}.self_attn.q_proj" for n in range(30)]
    arms = {"lora": {"method": {"name": "lora"}, "grid": {"method.target_modules": [many, many[:15]]}}}
    jobs = [cell.finals([1e-3], [1])[0] for cell in made(write_study(arms=arms))]
    for job in jobs:
        (tmp_path / f"{job.name}.json").touch()
    assert jobs[0].name != jobs[1].name
    assert jobs[0].name.endswith(f"-{jobs[0].key}")


def test_what_cannot_be_fitted_names_the_arm(write_study) -> None:
    file = write_study(arms={"whole": {"method": {"name": "full"}}}, budgets=[3000])
    with pytest.raises(SvdtuneError, match="arm whole on math: no setting of full says how many parameters it trains"):
        made(file)


def test_fits_are_kept_and_a_damaged_file_is_made_anew(write_study, tmp_path: Path, monkeypatch) -> None:
    file, kept = write_study(arms={"lora": LORA}, budgets=[3000]), tmp_path / "out" / "fits.json"
    method = made(file, fits=Fits(kept))[0].method_of(0)
    with monkeypatch.context() as without:
        without.setattr(grid, "fit", None)
        assert made(file, fits=Fits(kept))[0].method_of(0) == method
    with monkeypatch.context() as later:
        later.setattr(grid, "RULES", grid.RULES + 1)
        made(file, fits=Fits(kept))
        assert len(json.loads(kept.read_text())) == 2
    for damaged in ("", "[1]", "3", '{"a'):
        kept.write_text(damaged)
        assert made(file, fits=Fits(kept))[0].method_of(0) == method
        assert len(json.loads(kept.read_text())) == 1


def held_out(job: Job, folder: Path) -> tuple[list[dict], list[dict]]:
    """The rows that a run of the search trains on, and those that it holds out."""
    recipe = worker._with_heldout(
        {"recipe": job.recipe, "heldout": job.heldout and list(job.heldout)}, Place.of(job, folder)
    )
    files = [recipe["data"][part]["source"] for part in ("train", "eval")]
    return tuple([json.loads(line) for line in Path(file).read_text().splitlines()] for file in files)


def test_held_out_rows_are_a_share_and_every_row_is_in_one_part(write_study, tmp_path: Path) -> None:
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE))
    train, held = held_out(cell.search()[0], tmp_path / "one")
    assert (len(train), len(held)) == (30, 10)
    assert len({row["instruction"] for row in train + held}) == 40
    assert held_out(cell.search()[1], tmp_path / "two") == (train, held), "the same for every candidate"
    (other,) = made(write_study(arms={"a": LORA}, tune=TUNE | {"seed": 8}))
    assert held_out(other.search()[0], tmp_path / "three")[1] != held


def test_each_training_set_has_held_out_rows_of_its_own(write_study, tmp_path: Path) -> None:
    few = LORA | {"settings": {"data": {"train": {"source": "sara_math", "limit": 8}}}}
    all_rows, few_rows = (cell.search()[0] for cell in made(write_study(arms={"all": LORA, "few": few}, tune=TUNE)))
    assert [len(part) for part in held_out(all_rows, tmp_path / "out")] == [30, 10]
    assert [len(part) for part in held_out(few_rows, tmp_path / "out")] == [6, 2]


def test_questions_in_a_template_are_compared_without_their_answers(write_study, tmp_path: Path) -> None:
    path = tmp_path / "data" / "sara_math" / "math_data.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, *(row | {"output": "In other words."} for row in rows)]))
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE, settings={"data": {"prompt": "Q: {instruction}"}}))
    train, held = held_out(cell.search()[0], tmp_path / "out")
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in held}


def test_a_held_out_row_whose_question_is_trained_on_is_left_out_of_both(write_study, tmp_path: Path) -> None:
    path = tmp_path / "data" / "sara_math" / "math_data.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, *(row | {"instruction": row["instruction"].upper()} for row in rows)]))
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE))
    train, held = held_out(cell.search()[0], tmp_path / "out")
    asked = {row["instruction"].upper() for row in train}
    assert len(train) == 60
    assert 0 < len(held) < 20
    assert not asked & {row["instruction"].upper() for row in held}


ASKED, SAID = {"role": "user", "content": "what is {}?"}, {"role": "assistant", "content": "it is {}"}
FORMATS = {
    "messages": lambda n: {"messages": [turn | {"content": turn["content"].format(n)} for turn in (ASKED, SAID)]},
    "alpaca": lambda n: {"instruction": f"add to {n}", "input": "", "output": str(n)},
    "text": lambda n: {"text": f"a story of {n}"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format_are_held_out(name: str, write_study, tmp_path: Path) -> None:
    rows = [FORMATS[name](n) for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0]]))
    data = {"train": "rows.json", "prompt": "prompt", "completion": "completion"}
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE, settings={"data": data}))
    train, held = held_out(cell.search()[0], tmp_path / "out")
    assert len(held) in (1, 2)
    assert all(row in rows for row in train + held)
    assert not [row for row in held if row in train]


def test_too_few_rows_to_hold_any_out(write_study, tmp_path: Path) -> None:
    path = tmp_path / "data" / "sara_math" / "math_data.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    (cell,) = made(write_study(arms={"a": LORA}, tune=TUNE))
    with pytest.raises(SvdtuneError, match=r"sara_math has 1 rows, too few to hold a share of 0\.25 out"):
        held_out(cell.search()[0], tmp_path / "out")
