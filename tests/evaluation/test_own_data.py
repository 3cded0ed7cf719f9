"""A recipe is scored on the user's own rows, by a task or a function of theirs; what is graded
differently, or is a part of the same rows, is never averaged."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner, Result

from svdtune.analysis.facts import read_facts
from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.evaluation import get_task
from svdtune.evaluation.averages import no_average
from svdtune.evaluation.questions import sets_to_ask
from svdtune.models import load
from svdtune.training import train
from svdtune.training.recipe import check_recipe, dump_recipe
from svdtune.training.yaml_files import read_yaml

ROWS = [{"ask": f"{n}+{n}", "say": f"it is {2 * n}", "sum": str(2 * n)} for n in range(20)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "more"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def settings(model: Path, evaluation: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": "arithmetic", "prompt": "ask", "completion": "say", "max_length": 256} | data,
        "training": {"learning_rate": 1e-3, "max_steps": 1},
        "evaluation": {"max_new_tokens": 2} | evaluation,
        "output": {"dir": "run"},
    }


def evaluate(model: Path, evaluation: dict[str, Any], *words: str, **data: Any) -> Result:
    """What `svdtune evaluate` says of a run with this evaluation section."""
    if not Path("run").exists():
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(load(model).model, config).save_pretrained("run/adapter")
        Path("run/training.json").write_text("{}")
    Path("run/recipe.yaml").write_text(dump_recipe(check_recipe(settings(model, evaluation, **data))))
    return CliRunner().invoke(app, ["evaluate", "run", "--device", "cpu", *words])


def result(name: str) -> dict[str, Any]:
    return json.loads(Path("run", "evaluations", name, "result.json").read_text())


def test_the_section_says_what_is_asked_graded_and_how_much_of_it(tiny_folder: Path) -> None:
    section = {"data": "rows.jsonl", "task": "number", "prompt": "What is {ask}?", "answer": "sum", "limit": 3}
    found = evaluate(tiny_folder, section)
    assert found.exit_code == 0, found.output
    assert "0 of 3 correct" in found.stdout
    kept = result("rows-number")
    assert (kept["settings"]["prompt"], kept["settings"]["answer"]) == ("What is {ask}?", "sum")
    found = evaluate(tiny_folder, section, "--task", "exact", "--limit", "2", "--answer", "say")
    assert found.exit_code == 0, found.output
    assert (result("rows-exact")["n"], result("rows-exact")["settings"]["answer"]) == (2, "say")


def test_the_first_rows_of_a_share_are_of_that_share(tiny_folder: Path) -> None:
    section = {"data": {"source": "rows.jsonl", "only": 0.25}, "task": "exact"}
    asked = {}
    for limit in (None, 2):
        found = evaluate(tiny_folder, section | {"limit": limit}, "--restart", train={"source": "more.jsonl"})
        assert found.exit_code == 0, found.output
        lines = Path("run/evaluations/rows-exact/predictions.jsonl").read_text().splitlines()
        asked[limit] = [json.loads(line)["prompt"] for line in lines]
    assert (len(asked[None]), asked[2]) == (5, asked[None][:2])
    # held-out rows of data.eval are such a share too
    section = {"data": ["more.jsonl"]}
    found = evaluate(
        tiny_folder, section, "--task", "exact", "--limit", "2", "--restart", train="rows.jsonl", eval="25%"
    )
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"data": "sara_mat"}, "'sara_mat' is no data set that is scored"),
        (
            {"data": [{"source": "rows.jsonl", "limt": 3}]},
            "evaluation.data.0.limt: unknown setting; did you mean limit?",
        ),
        ({"data": ["rows.jsonl", "rows.jsonl"]}, "names rows.jsonl twice; its scores would be of different rows"),
        ({"data": "rows.jsonl", "task": "lm-evil:arc"}, "evaluation.task: there is no task 'lm-evil:arc'"),
        ({"data": "rows.jsonl", "task": "exakt"}, "evaluation.task: there is no task 'exakt'"),
        ({"data": 3}, "evaluation.data: expected a valid list; got 3"),
    ],
)
def test_what_a_section_cannot_say(evaluation: dict[str, Any], message: str, tiny_folder: Path) -> None:
    with pytest.raises(SvdtuneError) as refused:
        check_recipe(settings(tiny_folder, evaluation))
    assert message in str(refused.value)


def test_a_section_is_kept_as_it_was_given(tiny_folder: Path) -> None:
    recipe = check_recipe(settings(tiny_folder, {"data": ["sara_math", "rows.jsonl", {"source": "x/y", "limit": 2}]}))
    kept = read_yaml(dump_recipe(recipe), "kept")
    assert kept["evaluation"]["data"][0] == "sara_math"
    assert check_recipe(kept) == recipe


GRADER = """
def near(completion, reference):
    return abs(len(completion) - len(reference)) < 99

def broken(completion, reference):
    return 1 / 0

def undecided(completion, reference):
    return "perhaps"
"""


def test_a_function_of_ones_own_grades(tiny_folder: Path) -> None:
    Path("my_grading.py").write_text(GRADER)
    Path("my_slip.py").write_text("def f(:")
    found = evaluate(tiny_folder, {"data": "rows.jsonl", "task": "my_grading:near", "answer": "sum", "limit": 2})
    assert found.exit_code == 0, found.output
    assert "2 of 2 correct" in found.stdout
    for name, message in (
        ("broken", "the task my_grading:broken failed on the completion 'a': ZeroDivisionError: division by zero"),
        ("undecided", "the task my_grading:undecided says 'perhaps' of a completion; expected True where it is right"),
    ):
        with pytest.raises(SvdtuneError) as refused:
            get_task(f"my_grading:{name}").grade("a", "b")
        assert message in str(refused.value)
    for path, message in (
        ("my_grading:no", "the task: my_grading has no function 'no'"),
        ("no_such_module_here:f", "the task: 'no_such_module_here:f' cannot be imported: No module named"),
        ("my_slip:f", "the task: 'my_slip:f' cannot be imported: invalid syntax"),
    ):
        with pytest.raises(SvdtuneError) as refused:
            get_task(path)
        assert message in str(refused.value)


def test_a_grader_that_is_not_there_shows_before_training(tiny_folder: Path) -> None:
    section = {"data": "rows.jsonl", "task": "no_such_module_here:f"}
    with pytest.raises(SvdtuneError, match="the task: 'no_such_module_here:f' cannot be imported"):
        train(check_recipe(settings(tiny_folder, section)))


@pytest.mark.parametrize(
    ("train_on", "scored_on", "leaks"),
    [
        ({"source": "rows.jsonl"}, {"source": "rows.jsonl", "only": 0.25}, "5 of the 5 questions of rows.jsonl"),
        ({"source": "rows.jsonl"}, "more.jsonl", "20 of the 20 questions of more.jsonl"),
        ({"source": "rows.jsonl", "without": 0.25}, {"source": "rows.jsonl", "only": 0.25}, None),
    ],
)
def test_rows_that_are_scored_are_not_trained_on(
    train_on: Any, scored_on: Any, leaks: str | None, tiny_folder: Path
) -> None:
    recipe = check_recipe(settings(tiny_folder, {"data": scored_on}, train=train_on))
    if leaks is None:
        train(recipe)
        return
    with pytest.raises(SvdtuneError, match=leaks):
        train(recipe)


@pytest.mark.parametrize(
    ("sets", "apart"),
    [
        ([("a.jsonl", "number"), ("b.jsonl", "number")], None),
        ([("aqua", "letter"), ("svamp", "number")], None),  # as SARA's table averages them
        ([("a.jsonl", "number"), ("b.jsonl", "exact")], "graded differently, by exact, number"),
        ([("a.jsonl", "letter"), ("svamp", "number")], "graded differently, by letter, number"),
        ([("a.jsonl", "number"), ("a.jsonl", "exact")], "a.jsonl is scored more than once"),
        ([("svamp", "number"), ("svamp", "number")], "svamp is scored more than once"),
    ],
)
def test_what_has_a_common_average(sets: list[tuple[str, str]], apart: str | None) -> None:
    found = no_average(sets)
    assert found is None if apart is None else apart in str(found)


def test_a_report_averages_neither_graders_nor_parts_of_a_file(tiny_folder: Path) -> None:
    evaluate(tiny_folder, {"data": ["rows.jsonl", "more.jsonl"], "task": "number", "answer": "sum", "limit": 2})
    assert "average of sets (strict)" in read_facts("run")["scores"]
    assert json.loads(Path("run/evaluations/run-averages.json").read_text())["strict"]["n"] == 4
    evaluate(tiny_folder, {"data": "rows.jsonl"}, "--task", "exact", "--limit", "2")
    facts = read_facts("run")
    assert "average of sets (strict)" not in facts["scores"]
    assert any("rows.jsonl is scored more than once" in told for told in facts["missing"])


@pytest.mark.parametrize("name", ["", " "])
def test_a_data_set_without_a_name(name: str) -> None:
    with pytest.raises(
        SvdtuneError, match="the data's name is empty; name a file, a generator or a data set, or leave"
    ):
        sets_to_ask(None, name, None)
