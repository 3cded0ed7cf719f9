"""`svdtune evaluate` on the papers' generation tasks, by other ways of decoding, through vLLM and
lm-eval."""

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.evaluation import Interval, Metric, TransformersEngine, sets
from svdtune.evaluation.generation import Completion
from svdtune.evaluation.tasks import HARNESSES
from svdtune.lab.sandbox import missing_protections
from svdtune.models import LoadedModel, load

PROBLEMS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def add{number}(x):\n",
        "entry_point": f"add{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == 1 + {number}\n",
    }
    for number in range(3)
]
PAIRS = [
    "name : Aromi | Type : pub||Aromi is a pub . ",
    "name : Aromi | Type : pub||There is a pub called Aromi . ",
    "name : Cotto | area : riverside||Cotto is by the river . ",
]


@pytest.fixture
def _sandbox() -> None:
    if lacking := "; ".join(missing_protections()):
        pytest.skip(f"this system has no whole sandbox: {lacking}")


def svdtune(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder with three problems and two meanings, and a place to work in."""
    for name in ("humaneval", "e2e"):
        (tmp_path / "data" / name).mkdir(parents=True)
    lines = "".join(json.dumps(problem) + "\n" for problem in PROBLEMS)
    (tmp_path / "data" / "humaneval" / "HumanEval.jsonl").write_text(lines)
    (tmp_path / "data" / "e2e" / "lora_test.txt").write_text("\n".join(PAIRS) + "\n")
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    """Have the model answer a prompt's text with a text."""

    def complete(self: TransformersEngine, prompts, max_new_tokens, decoding, seeds) -> list[Completion]:
        texts = [answer(self.tokenizer.decode(list(prompt))) for prompt in prompts]
        return [Completion(self.tokenizer.encode(text), True) for text in texts]

    monkeypatch.setattr(TransformersEngine, "complete", complete)


def result_of(folder: str) -> dict:
    return json.loads(Path("runs", "evaluations", folder, "result.json").read_text())


@pytest.mark.usefixtures("_sandbox")
def test_humaneval(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def solve(prompt: str) -> str:
        asked.append(prompt)
        return "```python\ndef add1(x):\n    return x + 1\n```" if "add1" in prompt else "    return x + 2\n"

    answers(monkeypatch, solve)
    result = svdtune(tiny_folder, "--task", "humaneval", "--max-new-tokens", "40", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert all(prompt.startswith("@@ Instruction\nHere is the given code") for prompt in asked)
    assert "accuracy (strict) 66.7%" in result.stdout
    assert "pass@1 0.6667" in result.stdout
    stored = result_of("tiny-humaneval-humaneval")
    assert stored["metrics"]["pass@1"]["value"] == pytest.approx(2 / 3)
    # Its way of joining prompt and block needs the prompt to end with a docstring.
    assert stored["metrics"]["pass@1 (paper)"]["value"] == pytest.approx(1 / 3)


@pytest.mark.usefixtures("_sandbox")
def test_pass_at_k(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(100))
    # Every second sample is right.
    answers(monkeypatch, lambda prompt: f"    return x + {prompt.split('def add')[1][0]} * {next(turns) % 2}\n")
    words = ("--task", "humaneval", "--samples", "2", "--temperature", "0.8", "--max-new-tokens", "40")
    result = svdtune(tiny_folder, *words, "--device", "cpu")
    assert result.exit_code == 0, result.output
    metrics = result_of("tiny-humaneval-humaneval")["metrics"]
    # add0 is right however often it is multiplied
    assert metrics["pass@1"]["value"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert metrics["pass@2"]["value"] == 1


def test_e2e(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []

    def metrics(outputs: list[str], references: list[list[str]]) -> dict[str, Metric]:
        scored.append((outputs, references))
        return {"BLEU": Metric(0.5, Interval(0.25, 0.75))}

    monkeypatch.setattr("svdtune.lab.tasks.e2e.require_java", lambda: None)
    monkeypatch.setattr("svdtune.lab.tasks.e2e.e2e_metrics", metrics)
    answers(
        monkeypatch, lambda prompt: " There is a pub called Aromi .\n\nMore ." if "Aromi" in prompt else " By a river ."
    )
    result = svdtune(tiny_folder, "--task", "e2e", "--device", "cpu")
    assert result.exit_code == 0, result.output
    stored = result_of("tiny-e2e-e2e")
    references = [["Aromi is a pub .", "There is a pub called Aromi ."], ["Cotto is by the river ."]]
    assert scored == [(["There is a pub called Aromi .", "By a river ."], references)]
    assert "BLEU 0.5000, 95 % interval 0.2500 to 0.7500" in result.stdout
    assert (stored["n"], stored["strict"], stored["settings"]["max_new_tokens"]) == (2, None, 64)
    line = json.loads(Path("runs/evaluations/tiny-e2e-e2e/predictions.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "name : Aromi | Type : pub<|end|>"
    assert line["reference"] == ["Aromi is a pub .", "There is a pub called Aromi ."]
    assert line["correct"] is None


def test_e2e_without_java_says_so_before_anything_is_generated(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise SvdtuneError("METEOR, ROUGE-L and CIDEr need Java")

    monkeypatch.setattr("svdtune.lab.tasks.e2e.require_java", missing)
    answers(monkeypatch, lambda prompt: pytest.fail("something was generated"))
    result = svdtune(tiny_folder, "--task", "e2e", "--device", "cpu")
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("svdtune: METEOR, ROUGE-L and CIDEr need Java")


def test_beams_and_their_settings_are_recorded(tiny_folder: Path) -> None:
    words = ("--data", "arithmetic", "--limit", "2", "--max-new-tokens", "3", "--device", "cpu")
    result = svdtune(tiny_folder, *words, "--beams", "2", "--length-penalty", "0.8", "--no-repeat-ngram-size", "4")
    assert result.exit_code == 0, result.output
    settings = result_of("tiny-arithmetic-number")["settings"]
    assert (settings["beams"], settings["length_penalty"], settings["no_repeat_ngram_size"]) == (2, 0.8, 4)
    assert svdtune(tiny_folder, *words, "--samples", "2").exit_code == 2


def test_vllm_is_another_engine(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    @contextmanager
    def open_vllm(source, dtype):
        opened.append((source.base, dtype))
        yield TransformersEngine(load(source.base))

    monkeypatch.setattr(sets, "open_vllm", open_vllm)
    words = ("--data", "arithmetic", "--limit", "2", "--max-new-tokens", "3", "--engine", "vllm")
    result = svdtune(tiny_folder, *words, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert opened == [(str(tiny_folder), "bfloat16")]
    assert "leave out --device" in svdtune(tiny_folder, *words, "--device", "cuda").stderr


def test_lm_eval_runs_its_own_tasks(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_harness(loaded: LoadedModel, tasks: list[str], output: Path, **options: object) -> str:
        asked.append((loaded.name, tasks, output, options))
        return "a table"

    monkeypatch.setattr(HARNESSES, "_things", {"lm-eval": run_harness})
    result = svdtune(tiny_folder, "--task", "lm-eval:arc_easy,piqa", "--limit", "3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    folder = Path("runs/evaluations/tiny-lm-eval-arc_easy-piqa")
    assert asked == [(str(tiny_folder), ["arc_easy", "piqa"], folder, {"batch_size": 16, "limit": 3})]
    assert result.stdout == f"a table\nall of it: {folder}/results.json\n"


def test_lm_eval_is_named_where_it_is_missing(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = svdtune(tiny_folder, "--task", "lm-eval:arc_easy", "--device", "cpu")
    assert result.exit_code == 2
    assert "pip install 'svdtune[lm-eval]'" in result.stderr
