"""`svdtune evaluate` from the command line: scores, defaults of a run, and one clear message for
what is wrong."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner, Result

from svdtune.cli import app
from svdtune.evaluation import TransformersEngine
from svdtune.models import load
from svdtune.training.recipe import check_recipe, dump_recipe


def svdtune(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--device", "cpu"])


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    """A run folder as training leaves it, with a LoRA adapter and two held-out rows of its own."""
    run = tmp_path / "run"
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(tiny_folder).model, config).save_pretrained(run / "adapter")
    rows = [{"ask": "1+1", "say": "2"}, {"ask": "2+2", "say": "4"}]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(tiny_folder),
        "method": {"name": "lora", "r": 2},
        "data": {
            "train": "arithmetic",
            "eval": str(tmp_path / "held-out.jsonl"),
            "prompt": "ask",
            "completion": "say",
            "template": "Q: {prompt} A:",
        },
        "training": {"learning_rate": 1e-3},
        "output": {"dir": str(run)},
    }
    (run / "recipe.yaml").write_text(dump_recipe(check_recipe(settings)))
    (run / "training.json").write_text("{}")
    return run


def test_a_run_is_asked_its_own_held_out_rows_in_its_own_form(run: Path) -> None:
    result = svdtune(run, "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "accuracy (strict) 0.0%, 95 % interval 0.0% to 65.8%; 0 of 2 correct" in result.stdout
    folder = run / "evaluations" / "held-out-number"
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["Q: 1+1 A:", "Q: 2+2 A:"]
    assert [line["reference"] for line in lines] == ["2", "4"]
    assert json.loads((folder / "result.json").read_text())["settings"]["model"] == str(run)
    assert "| held-out-number | 2 | accuracy (strict) |" in (run / "adapter" / "README.md").read_text()


def test_a_plain_model_and_an_adapter_on_it(
    tiny_folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--data", "arithmetic", "--limit", "3", "--max-new-tokens", "2")
    result = svdtune(tiny_folder, *words)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "runs/evaluations/tiny-arithmetic-number/result.json").read_text())
    assert stored["n"] == 3
    assert stored["settings"]["data"]["split"] == "test"
    assert stored["settings"]["template"] == "plain"
    # The same folder with an adapter on the model: other weights, so nothing may be reused.
    result = svdtune(tiny_folder, "--adapter", run / "adapter", *words)
    assert result.exit_code == 2
    assert "other settings" in result.stderr
    assert svdtune(tiny_folder, "--adapter", run / "adapter", *words, "--restart").exit_code == 0


def test_ctrl_c_says_how_to_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersEngine, "complete", stop)
    result = svdtune(run, "--max-new-tokens", "3")
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "maths"], "there is no task 'maths'; choose one of: number, "),
        (["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--answer", "tell"], "has no field 'tell'"),
        (["--max-new-tokens", "511"], "do not fit in the model's 512 positions"),
        (["--adapter", "nowhere"], "is not an adapter folder"),
        (["--output", __file__], "is a file"),
        (["--data", " "], "the value of --data is empty; give one, or leave it"),
        (["--seed", str(2**33)], "expected one from 0 to 4294967295"),
        (["--temperature", "nan"], "temperature is 'nan'; expected a number as recipes have it"),
        (["--top-p", ".nan"], "--top-p is nan; expected a finite number"),
        (["--beams", "2", "--length-penalty", "1e999"], "--length-penalty is inf; expected a finite number"),
    ],
)
def test_bad_inputs_get_one_message(run: Path, words: list[str], message: str) -> None:
    result = svdtune(run, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_model_needs_data(tiny_folder: Path) -> None:
    result = svdtune(tiny_folder)
    assert result.exit_code == 2
    assert "with --data" in result.stderr


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = svdtune(folder, "--data", "arithmetic")
        assert result.exit_code == 2
        assert str(folder) in result.stderr
