"""`svdtune evaluate` on the papers' sets: groups, a recipe's evaluation section, both modes, and
averages."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner, Result

from svdtune.cli import app
from svdtune.evaluation import TransformersEngine
from svdtune.evaluation.generation import Completion
from svdtune.models import load
from svdtune.training.recipe import check_recipe, dump_recipe

FOLDERS = ("SVAMP", "AQuA", "AddSub", "MultiArith", "SingleEq", "gsm8k")


def svdtune(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--device", "cpu"])


def row(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "input": "", "output": f"The answer is {answer}.", "answer": answer}


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SARA's files with two held-out rows each; of AddSub's, one is trained on in other
    punctuation."""
    folder = tmp_path / "data" / "sara_math"
    folder.mkdir(parents=True)
    trained = [row("Trained on?", "1")]
    for name in FOLDERS:
        answers = ("A", "B") if name == "AQuA" else ("7", "34")
        held_out = [row(f"{name} {number}?", answer) for number, answer in enumerate(answers)]
        (folder / f"{name}_test.json").write_text(json.dumps([*trained, *held_out]))
    (folder / "math_data.json").write_text(json.dumps([*trained, row("addsub 1 ?", "34")]))
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of a model that always answers 7, and 3,4 to every second question."""
    prompts: list[str] = []

    def complete(self: TransformersEngine, batch, max_new_tokens, decoding, seeds) -> list[Completion]:
        texts = [self.tokenizer.decode(list(prompt)) for prompt in batch]
        prompts.extend(texts)
        answers = ["So it is 3,4" if " 1?" in text else "The answer is 7." for text in texts]
        return [Completion(self.tokenizer.encode(answer), True) for answer in answers]

    monkeypatch.setattr(TransformersEngine, "complete", complete)
    return prompts


def test_a_group_is_scored_set_by_set_and_averaged_in_both_modes(
    tiny_folder: Path, tmp_path: Path, asked: list[str]
) -> None:
    result = svdtune(tiny_folder, "--data", "sara_math", "--max-new-tokens", "20")
    assert result.exit_code == 0, result.output
    indent = " " * 16
    assert len(asked) == 12
    assert asked[0].startswith("Below is an instruction that describes a task. Write a response that appropriately")
    assert asked[0].endswith(f"### Instruction:\n{indent}SVAMP 0?\n\n{indent}### Response:\n{indent}")
    # The paper's code deletes commas, so that 3,4 is 34. No answer holds a letter from A to E, as
    # AQuA's should.
    assert "svamp\n  accuracy (strict) 50.0%" in result.stdout
    assert "accuracy (paper) 100.0%" in result.stdout
    assert "macro average (strict) 41.7%, 95 % interval" in result.stdout
    assert "micro average (paper) 83.3%" in result.stdout
    kept = json.loads((tmp_path / "runs/evaluations/sara_math-averages.json").read_text())
    assert list(kept["sets"]) == ["svamp", "aqua", "addsub", "multiarith", "singleeq", "gsm8k_sara"]
    assert (kept["strict"]["correct"], kept["paper"]["correct"], kept["strict"]["n"]) == (5, 10, 12)
    assert kept["sets"]["svamp"]["paper"]["accuracy"] == 1.0
    assert svdtune(tiny_folder, "--data", "sara_math", "--max-new-tokens", "20").exit_code == 0
    assert len(asked) == 12  # nothing is asked twice


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    """A run whose recipe says what it is scored on."""
    run = tmp_path / "run"
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(tiny_folder).model, config).save_pretrained(run / "adapter")
    settings = {
        "model": str(tiny_folder),
        "method": {"name": "lora", "r": 2},
        "data": {"train": "sara_math", "prompt": "instruction", "completion": "output", "template": "llm_adapters"},
        "training": {"learning_rate": 1e-3},
        "evaluation": {"data": ["svamp", "addsub"], "split": "unseen", "max_new_tokens": 9, "beams": 4},
        "output": {"dir": str(run)},
    }
    (run / "recipe.yaml").write_text(dump_recipe(check_recipe(settings)))
    (run / "training.json").write_text("{}")
    return run


def test_a_run_is_scored_as_its_recipe_says(run: Path, asked: list[str]) -> None:
    result = svdtune(run)
    assert result.exit_code == 0, result.output
    assert len(asked) == 3  # the question of AddSub that is trained on is left out
    # the paper tests with other white space
    assert "appropriately completes the request. \n\n" in asked[0]
    stored = json.loads((run / "evaluations" / "addsub-number" / "result.json").read_text())
    assert (stored["n"], stored["settings"]["max_new_tokens"], stored["settings"]["beams"]) == (1, 9, 4)
    assert (run / "evaluations" / "run-averages.json").is_file()


def test_the_command_line_goes_before_the_recipe(run: Path, asked: list[str], tmp_path: Path) -> None:
    words = ("--data", "addsub", "--split", "heldout", "--template", "Q: {prompt}", "--beams", "1", "--limit", "2")
    result = svdtune(run, *words, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert asked == ["Q: AddSub 0?", "Q: AddSub 1?"]
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (stored["n"], "beams" in stored["settings"]) == (2, False)


def test_a_missing_set_is_named_before_the_model_is_loaded(tiny_folder: Path) -> None:
    result = svdtune(tiny_folder, "--data", "commonsense")
    assert result.exit_code == 2
    assert "arc_challenge (test) is not in the data folder" in result.stderr
