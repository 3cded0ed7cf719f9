"""`svdtune new`: rows of every format become a recipe that trains."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from svdtune.cli import app
from svdtune.training.recipe import load_recipe
from tiny import with_template

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
ASKED, SAID = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}
ROWS: dict[str, dict[str, Any]] = {
    "chats (messages)": {"messages": [ASKED, SAID]},
    "chats (ShareGPT": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "Alpaca": {"instruction": "Add.", "input": "2 2", "output": "4"},
    "prompts and completions": {"prompt": "2 + 2", "completion": "4"},
    "plain text": {"text": "four is two and two"},
    "preferences": {"prompt": "2 + 2", "chosen": "4", "rejected": "5"},
    "labelled": {"prompt": "2 + 2", "completion": "4", "label": True},
}


def new(*words: str) -> Result:
    return CliRunner().invoke(app, ["new", *words])


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("format", ROWS)
def test_every_format_is_told_and_its_recipe_trains(format: str, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [ROWS[format]] * 4 if format != "labelled" else [{**ROWS[format], "label": at % 2 == 0} for at in range(4)]
    model = str(tiny_folder)
    if format.startswith("chats"):
        model = str(with_template(tmp_path / "with-template", tiny_folder, TEMPLATE))
    found = new(model, write(tmp_path, rows), "--method", "lora")
    assert found.exit_code == 0, found.output
    assert f"format    {format}" in found.stdout
    assert "rows      4, " in found.stdout
    assert "▶" in found.stderr
    recipe = load_recipe("recipe.yaml")
    assert recipe.training.task == {"preferences": "dpo", "labelled": "kto"}.get(format, "sft")
    assert recipe.data.template == ("chat" if format.startswith("chats") else "plain")
    trained = CliRunner().invoke(app, ["train", "recipe.yaml", "--training.epochs", "1", "--method.r", "2"])
    assert trained.exit_code == 0, trained.output
    assert "trained 1 steps" in trained.stdout


@pytest.mark.parametrize(
    ("row", "task", "unread"),
    [
        ({"messages": [ASKED, SAID], "label": True}, "kto", ""),
        ({"conversations": [ASKED, SAID], "label": "false", "system": "Be brief."}, "kto", ""),
        ({"messages": [ASKED, SAID], "label": "greeting", "id": 3}, "sft", "id, label"),
        ({"instruction": "Add.", "output": "4", "system": "Be brief.", "history": [], "id": 3}, "sft", "id"),
        ({"prompt": "2 + 2", "chosen": "4", "rejected": "5", "system": "Be brief."}, "dpo", "system"),
        ({"prompt": "2 + 2", "chosen": [SAID], "rejected": [SAID], "system": "Be brief."}, "dpo", ""),
        ({"text": "abc"}, "sft", ""),
    ],
)
def test_what_rows_are_for_is_told_and_what_is_not_read(
    row: dict[str, Any], task: str, unread: str, tiny_folder: Path, tmp_path: Path
) -> None:
    model = with_template(tmp_path / "with-template", tiny_folder, TEMPLATE)
    found = new(str(model), write(tmp_path, [row] * 2), "--method", "lora")
    assert found.exit_code == 0, found.output
    assert load_recipe("recipe.yaml").training.task == task
    assert (f"unread    {unread} (columns that nothing is made of)" in found.stdout) == bool(unread)
    assert ("unread" in found.stdout) == bool(unread)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"prompt": "Two?", "conversations": [ASKED, SAID]},
        {"prompt": "2", "completion": "4"},
    ],
    ids=lambda row: "-".join(row),
)
def test_labels_that_kto_takes_judge_and_any_others_are_not_read(
    row: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    model = with_template(tmp_path / "with-template", tiny_folder, TEMPLATE)
    for label, task in ((1, "kto"), ("0", "kto"), ("True", "kto"), (3, "sft"), (0.73, "sft"), ("good", "sft")):
        found = new(str(model), write(tmp_path, [row | {"label": label}] * 2), "--method", "lora", "--overwrite")
        assert found.exit_code == 0, found.output
        assert (load_recipe("recipe.yaml").training.task, "labelled answers" in found.stdout) == (task, task == "kto")
        assert ("label (columns that nothing" in found.stdout or "label, prompt (" in found.stdout) == (task == "sft")


def test_empty_answers_are_counted_before_training_and_in_it(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path, [{"prompt": "2 + 2", "completion": said} for said in ("4", "", " ")])
    assert "rows      3, 20 tokens, the longest 7, 2 with an empty answer" in new(str(tiny_folder), data).stdout
    words = ["train", "recipe.yaml", "--method.r", "2", "--training.epochs", "1"]
    for _ in range(2):  # and where the rows come out of the cache
        trained = CliRunner().invoke(app, [*words, "--overwrite"])
        assert trained.exit_code == 0, trained.output
        assert "3 examples, 20 tokens, 2 with an empty answer" in trained.output


def test_columns_of_no_format_are_named_and_can_be_said(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path, [{"question": "2 + 2", "result": "4"}])
    found = new(str(tiny_folder), data)
    assert found.exit_code == 2
    assert "the columns 'question', 'result' are those of no format" in found.stderr
    assert "--prompt question --completion answer" in found.stderr
    found = new(str(tiny_folder), data, "--prompt", "Q: {question}", "--completion", "result", "--method", "sara")
    assert found.exit_code == 0, found.output
    assert "Q: 2 + 2" in found.stderr
    recipe = load_recipe("recipe.yaml")
    assert (recipe.data.prompt, recipe.data.completion, recipe.method.name) == ("Q: {question}", "result", "sara")


@pytest.mark.parametrize(
    ("longest", "length", "overlong"), [(20, 128, "error"), (200, 256, "error"), (700, 512, "drop")]
)
def test_the_length_holds_all_rows_or_what_the_context_does(
    longest: int, length: int, overlong: str, tiny_folder: Path, tmp_path: Path
) -> None:
    found = new(str(tiny_folder), write(tmp_path, [{"text": "a" * size} for size in (9, longest)]))
    assert found.exit_code == 0, found.output
    data = load_recipe("recipe.yaml").data
    assert (data.max_length, data.overlong) == (length, overlong)
    assert f"the longest {longest + 1:,}" in found.stdout
    assert ("1 at 128" in found.stdout) == (longest > 128)


@pytest.mark.parametrize(("rows", "batch", "accumulation"), [(3, 3, 1), (100, 8, 1), (1000, 8, 4)])
def test_steps_fit_the_number_of_rows(
    rows: int, batch: int, accumulation: int, tiny_folder: Path, tmp_path: Path
) -> None:
    assert new(str(tiny_folder), write(tmp_path, [{"text": "abc"}] * rows)).exit_code == 0
    training = load_recipe("recipe.yaml").training
    assert (training.batch_size, training.gradient_accumulation, training.epochs) == (batch, accumulation, 3)
    assert [source.only for source in load_recipe("recipe.yaml").data.eval.values()] == [0.05] * (rows >= 40)


def test_a_recipe_is_replaced_when_asked_to(tiny_folder: Path, tmp_path: Path) -> None:
    Path("recipe.yaml").write_text("mine")
    words = [str(tiny_folder), write(tmp_path, [{"text": "abc"}])]
    found = new(*words)
    assert found.exit_code == 2
    assert "recipe.yaml is there already; name another --output, or give --overwrite" in found.stderr
    assert Path("recipe.yaml").read_text() == "mine"
    assert new(*words, "--overwrite").exit_code == 0
    assert load_recipe("recipe.yaml").data.train[0].source == words[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "sorsaa"], "did you mean sorsa"),
        (["--task", "sftt"], "training.task"),
        (["--task", "dpo"], "chosen"),
        (["--output", "no/folder/recipe.yaml"], "no/folder"),
    ],
)
def test_what_cannot_be_is_one_message(words: list[str], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    found = new(str(tiny_folder), write(tmp_path, [{"text": "abc"}]), *words)
    assert found.exit_code == 2
    assert message in found.stderr
    assert not Path("recipe.yaml").exists()
