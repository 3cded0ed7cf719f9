"""`svdtune study new`: a file of one's own rows becomes a study that runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from svdtune.cli import app
from svdtune.lab.study.spec import load_study
from svdtune.training import load_recipe

SUMS = [{"prompt": f"{n} plus {n}?", "completion": f"It is {2 * n}.", "sum": 2 * n} for n in range(30)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", SUMS)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def study(*words: str) -> Result:
    return CliRunner().invoke(app, ["study", *words])


def test_the_study_of_ones_own_rows_runs(tiny_folder: Path) -> None:
    made = study("new", str(tiny_folder), "rows.jsonl", "--methods", "lora,sara", "--budget", "3k", "--answer", "sum")
    assert made.exit_code == 0, made.output
    assert "format    prompts and completions" in made.stdout
    assert "rows      24 to train on" in made.stdout
    assert "written   study.yaml and study-recipe.yaml: 13 runs" in made.stdout
    recipe = load_recipe("study-recipe.yaml")
    assert recipe.evaluation is not None
    assert (recipe.evaluation.task, recipe.evaluation.answer, recipe.evaluation.max_new_tokens) == ("number", "sum", 16)
    planned = study("study.yaml", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "rows · sara at 3,000 parameters" in planned.stdout
    assert "13 runs" in planned.stdout
    text = Path("study.yaml").read_text().replace("budgets", "settings: {training: {epochs: 0.1}}\nbudgets")
    text = text.replace("seeds: [1, 2, 3]", "seeds: [1]").replace("[0.0003, 0.001, 0.003]", "[0.001]")
    Path("study.yaml").write_text(text.replace("[0.003, 0.01, 0.03]", "[0.01]"))
    ran = study("study.yaml", "--eval-batch-size", "4")
    assert ran.exit_code == 0, ran.output
    assert "failed" not in ran.stdout
    page = Path("runs/studies/study/README.md").read_text()
    assert "Which method scores best on rows" in page
    results = json.loads(Path("runs/studies/study/results.json").read_text())
    assert [run["scores"]["rows.jsonl"]["n"] for run in results["runs"]] == [6, 6, 6]


@pytest.mark.parametrize(
    ("rows", "words", "task"),
    [
        (SUMS, [], "exact"),
        ([row | {"completion": str(row["sum"])} for row in SUMS], [], "number"),
        (SUMS, ["--task", "my_grading:near"], "my_grading:near"),
        (SUMS, ["--test", "test.jsonl"], "exact"),
        ([{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in SUMS], [], "exact"),
        (
            [{"q": row["prompt"], "a": row["completion"]} for row in SUMS],
            ["--prompt", "q", "--completion", "a"],
            "exact",
        ),
    ],
    ids=["sentences", "numbers", "function", "test", "alpaca", "columns"],
)
def test_what_is_scored_and_how(rows: list[dict[str, Any]], words: list[str], task: str, tiny_folder: Path) -> None:
    write("rows.jsonl", rows)
    write("test.jsonl", [row | {"prompt": "another"} for row in SUMS[:3]])
    made = study("new", str(tiny_folder), "rows.jsonl", "--budget", "3k", *words)
    assert made.exit_code == 0, made.output
    _, tasks = load_study("study.yaml")
    recipe = load_recipe("study-recipe.yaml")
    assert recipe.evaluation is not None
    assert (recipe.evaluation.task, [*tasks]) == (task, ["rows"])
    (scored,) = recipe.evaluation.sources
    own = "--test" in words
    assert (scored.source, scored.only) == (("test.jsonl", None) if own else ("rows.jsonl", 0.2))
    assert recipe.data.train[0].without == (None if own else 0.2)


@pytest.mark.parametrize(
    "words", [[], ["--test", "test.jsonl"], ["--prompt", "Q: {prompt}"]], ids=["share", "test", "form"]
)
@pytest.mark.family(1)
def test_answers_are_scored_by_their_loss(words: list[str], tiny_folder: Path) -> None:
    write("test.jsonl", [row | {"prompt": f"another, {row['prompt']}"} for row in SUMS[:3]])
    made = study("new", str(tiny_folder), "rows.jsonl", "--task", "nll", "--methods", "lora", "--budget", "3k", *words)
    assert made.exit_code == 0, made.output
    text = Path("study.yaml").read_text().replace("[0.0003, 0.001, 0.003]", "[0.001]").replace("[1, 2, 3]", "[1]")
    Path("study.yaml").write_text(text.replace("budgets", "settings: {training: {epochs: 0.1}}\nbudgets"))
    ran = study("study.yaml")
    assert ran.exit_code == 0, ran.output
    assert "failed" not in ran.stdout, ran.output
    runs = json.loads(Path("runs/studies/study/results.json").read_text())["runs"]
    losses = [run["measured"]["sets"]["rows"]["nll"] for run in runs if run["arm"] == "lora"]
    assert [len(one["items"].split()) for one in losses] == [3 if "--test" in words else 6]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (SUMS, ["--methods", "lora,lora"], "expected different methods, such as lora,sorsa,sara; got lora, lora"),
        (SUMS, ["--methods", "lorra"], "did you mean lora"),
        (SUMS, ["--budget", "many"], "many"),
        (SUMS, ["--task", "exakt"], "there is no task 'exakt'"),
        (SUMS, ["--answer", "summ"], "did you mean 'sum'?"),
        ([{"text": "a story"}, {"text": "another"}], ["--answer", "answer"], "has no field 'answer'"),
        ([row | {"sum": " "} for row in SUMS], ["--answer", "sum"], "have no answer to grade against; name its field"),
    ],
)
def test_what_cannot_be_is_one_message(
    rows: list[dict[str, Any]], words: list[str], message: str, tiny_folder: Path
) -> None:
    write("rows.jsonl", rows)
    made = study("new", str(tiny_folder), "rows.jsonl", *words)
    assert made.exit_code == 2, made.output
    assert message in made.stderr
    assert not Path("study.yaml").exists()


def test_files_that_are_there_stay(tiny_folder: Path) -> None:
    Path("study-recipe.yaml").write_text("mine")
    made = study("new", str(tiny_folder), "rows.jsonl", "--budget", "3k")
    assert made.exit_code == 2
    assert "study-recipe.yaml is there already; name another --output, or give --overwrite" in made.stderr
    assert Path("study-recipe.yaml").read_text() == "mine"


def test_the_verb_still_runs_files_and_explains_itself() -> None:
    assert "there is no study file none.yaml" in study("none.yaml").stderr
    shown = study("--help").stdout
    assert "svdtune study new" in shown
    assert "--dry-run" in study("run", "--help").stdout
