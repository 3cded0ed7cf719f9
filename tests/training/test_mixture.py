"""Several training sources with weights: what a pass shows, the same on resume, each cached."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_training_tasks import rows_of, write
from transformers import PreTrainedTokenizerFast

from runs import go, log_of, timeless
from svdtune.data.preferences import token_counts
from svdtune.errors import SvdtuneError
from svdtune.training import check_recipe
from svdtune.training.recipe import dump_recipe
from svdtune.training.run import Interrupted
from svdtune.training.task_rows import TrainRows, places
from svdtune.training.yaml_files import read_yaml

TEXTS = {"a": [{"text": "a" * size} for size in range(1, 9)], "b": [{"text": "b" * size} for size in range(11, 17)]}


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    a, b = (write(tmp_path / f"{name}.jsonl", rows) for name, rows in TEXTS.items())
    return {
        "model": {"name": str(tiny_folder)},
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": [{"source": a, "weight": 2}, {"source": b, "weight": 0.5}], "max_length": 64},
        "training": {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1},
        "output": {"dir": str(tmp_path / "run")},
    }


@pytest.mark.parametrize(
    ("count", "weight", "shown"),
    [
        (4, 1, {1: 4}),
        (4, 2, {2: 4}),
        (4, 0.5, {1: 2}),
        (4, 1.5, {1: 2, 2: 2}),
        (4, 0.01, {1: 1}),
        (3, 3.34, {3: 2, 4: 1}),
    ],
)
def test_a_weight_is_how_often_a_pass_shows_a_row(count: int, weight: float, shown: dict[int, int]) -> None:
    found = places(count, weight, 0)
    assert Counter(Counter(found).values()) == shown
    assert found == places(count, weight, 0)


def test_another_seed_draws_other_rows() -> None:
    assert places(100, 0.5, 0) != places(100, 0.5, 1)


def test_a_run_shows_every_source_as_often_as_its_weight_says(
    recipe: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, shown = go(recipe)
    assert "8 examples" in shown
    assert "6 examples" in shown
    assert "mixture   16 of " in shown
    assert "(weight 2), 3 of " in shown
    summary = json.loads((folder / "training.json").read_text())
    assert summary["rows"] == 19
    assert "weight 0.5" in (folder / "adapter" / "README.md").read_text()
    rows = TrainRows(check_recipe(recipe)).encode(tiny_tokenizer, _silent())
    lengths = Counter(token_counts(rows))
    assert {size: lengths[size + 1] for size in range(1, 9)} == dict.fromkeys(range(1, 9), 2)
    assert sum(lengths[size + 1] for size in range(11, 17)) == 3


def test_a_second_run_reads_no_file_and_a_changed_one_is_read_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    go(recipe)
    recipe["data"]["train"][1]["weight"] = 1
    write(tmp_path / "a.jsonl", TEXTS["a"][:3])
    _, shown = go(recipe, overwrite=True)
    cached = {
        line.split(":")[0].rpartition("/")[2]: "(cached)" in line for line in shown.splitlines() if "data " in line
    }
    assert cached == {"a.jsonl": False, "b.jsonl": True}


def test_a_resumed_run_has_the_same_losses(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from svdtune.training import run as run_module
    from svdtune.training.callbacks import StopOnInterrupt

    whole, _ = go(recipe)
    losses = timeless(log_of(whole))

    class StopAtTwo(StopOnInterrupt):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            self.stopped = state.global_step == 2
            return super().on_step_end(args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtTwo)
        with pytest.raises(Interrupted):
            go(recipe, overwrite=True)
    folder, _ = go(recipe, resume=True)
    assert timeless(log_of(folder)) == losses


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_other_tasks_mix_too(recipe: dict[str, Any], tmp_path: Path, task: str) -> None:
    rows = rows_of(task)
    train = [write(tmp_path / f"{name}.jsonl", rows) for name in ("one", "two")]
    recipe["data"]["train"] = train
    recipe["training"] |= {"task": task, "max_steps": 1}
    folder, _ = go(recipe)
    assert json.loads((folder / "training.json").read_text())["rows"] == 2 * len(rows)


def test_a_share_of_each_source_is_held_out(recipe: dict[str, Any]) -> None:
    recipe["data"] |= {"eval": "25%"}
    data = check_recipe(recipe).data
    assert [source.without for source in data.train] == [0.25, 0.25]
    assert {name: source.only for name, source in data.eval.items()} == {"1-a_jsonl": 0.25, "2-b_jsonl": 0.25}
    recipe["training"] |= {"eval_steps": 2}
    _, shown = go(recipe)
    assert "mixture   12 of " in shown


@pytest.mark.parametrize(
    "train", ["a.jsonl", {"source": "a.jsonl", "weight": 2}, ["a.jsonl", {"source": "b.jsonl", "weight": 0.25}]]
)
def test_sources_are_kept_as_they_were_given(recipe: dict[str, Any], train: Any) -> None:
    recipe["data"]["train"] = train
    checked = check_recipe(recipe)
    assert check_recipe(read_yaml(dump_recipe(checked), "kept")) == checked
    kept = read_yaml(dump_recipe(checked), "kept")["data"]["train"]
    assert isinstance(kept, dict) == isinstance(train, str)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data.train: is empty; expected one entry or more"),
        ([{"source": "a.jsonl", "wieght": 2}], "data.train.0.wieght: unknown setting; did you mean weight?"),
        ([{"source": "a.jsonl", "weight": 0}], "data.train.0.weight: expected greater than 0; got 0"),
        (3, "data.train: expected a valid list; got 3"),
    ],
)
def test_what_cannot_be_mixed(recipe: dict[str, Any], train: Any, message: str) -> None:
    recipe["data"]["train"] = train
    with pytest.raises(SvdtuneError) as refused:
        check_recipe(recipe)
    assert message in str(refused.value)


def test_what_any_source_asks_is_not_scored(recipe: dict[str, Any], tmp_path: Path) -> None:
    asked = [{"prompt": f"{n} + {n}", "completion": str(2 * n)} for n in range(4)]
    recipe["data"]["train"] = [write(tmp_path / "other.jsonl", [{"prompt": "x?", "completion": "y"}])]
    recipe["data"]["train"].append(write(tmp_path / "asked.jsonl", asked))
    recipe["data"]["eval"] = write(tmp_path / "held-out.jsonl", asked[:2])
    with pytest.raises(
        SvdtuneError, match=r"2 of the 2 questions of .*held-out.jsonl are also in .*other.jsonl and .*asked"
    ):
        go(recipe)


def _silent() -> Any:
    from rich.console import Console

    return Console(quiet=True)
