"""The best of a run by what is held out: named sets, early stopping, the best checkpoint; and
rates, schedules and noise. SORSA's regularizer takes part in all of it, and a resumed run is the
same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from test_run import StopAtStep5
from transformers import AutoModelForCausalLM, TrainerState

from runs import go, log_of, timeless
from svdtune.errors import SvdtuneError
from svdtune.evaluation.questions import held_out
from svdtune.training import Interrupted, check_recipe
from svdtune.training import run as run_module
from svdtune.training.callbacks import without_progress
from svdtune.training.checkpoints import checkpoint_folder, sealed_checkpoints
from svdtune.training.recipe import dump_recipe, load_recipe

ROWS = [{"prompt": f"Add {i} to 1. ", "completion": str(i + 1)} for i in range(40)]

WORST = {"trl": {"greater_is_better": True}}  # of a loss that falls, an early one is the "best"


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_folder)},
        "method": {"name": "sorsa", "r": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": write(tmp_path / "train.jsonl", ROWS[:24]),
            "eval": {
                "near": write(tmp_path / "near.jsonl", ROWS[24:32]),
                "far": write(tmp_path / "far.jsonl", ROWS[32:]),
            },
            "max_length": 64,
        },
        "training": {
            "max_steps": 8,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_steps": 1,
            "save_steps": 1,
            "keep_checkpoints": 2,
        },
        "output": {"dir": str(tmp_path / "run")},
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def resumed(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """The same run, stopped in its fifth step and gone on with."""
    recipe = {**recipe, "output": {"dir": str(tmp_path / "stopped")}}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtStep5)
        with pytest.raises(Interrupted):
            go(recipe)
    return go(recipe, resume=True)


def lacks_a_package(*_: Any) -> None:
    raise ImportError("You need to install it")


def check_regularized(folder: Path) -> None:
    """L_reg was taken at every step, and what was trained stayed orthonormal."""
    assert all("l_reg" in line for line in log_of(folder) if "loss" in line)
    factors = [x for name, x in weights_of(folder / "adapter").items() if name.endswith((".sorsa_U", ".sorsa_V"))]
    assert factors
    assert all(float((factor.mT @ factor - torch.eye(4)).norm()) < 0.1 for factor in factors)


def test_sets_by_name_are_read_checked_and_written_back(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder, shown = go(recipe)
    evaluated = [line for line in log_of(folder) if "eval_near_loss" in line]
    assert [line["step"] for line in evaluated] == [*range(1, 9), 8]
    assert sum("eval_far_loss" in line for line in log_of(folder)) == 9
    assert shown.count("8 examples") == 2
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(check_recipe(recipe)))
    assert load_recipe(path) == check_recipe(recipe)
    with pytest.raises(SvdtuneError, match=r"data\.eval has several sets, near, far: name one's source with --data"):
        held_out(check_recipe(recipe), None, None, None, None)
    for written in ("x.jsonl", {"source": "x.jsonl"}, None):
        recipe["data"]["eval"] = written
        recipe["training"]["eval_steps"] = None
        path.write_text(dump_recipe(check_recipe(recipe)))
        assert load_recipe(path) == check_recipe(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__eval": {"a b": "x.jsonl"}}, r"data\.eval: expected names of letters, digits.*got 'a b'"),
        (
            {"data__eval": {"a": {"source": "x", "splt": "y"}}},
            r"data\.eval\.a\.splt: unknown setting; did you mean split",
        ),
        ({"data__eval": {"source": "x", "splt": "y"}}, r"data\.eval\.splt: unknown setting; did you mean split"),
        ({"training__load_best_model_at_end": True}, "metric_for_best_model: is required.*near_loss or far_loss"),
        ({"training__load_best_model_at_end": True, "training__save_steps": 2}, "needs training.save_steps to be"),
        (
            {"training__early_stopping_patience": 1, "training__eval_steps": None},
            "needs training.eval_steps, how often",
        ),
        ({"training__metric_for_best_model": "loss"}, "is for early_stopping_patience, load_best_model_at_end or the"),
        ({"training__schedule": "reduce_lr_on_plateau"}, "metric_for_best_model: is required.*near_loss or far_loss"),
        (
            {"training__schedule": "reduce_lr_on_plateau", "training__eval_steps": None},
            "training.schedule: needs training.eval_steps",
        ),
        (
            {"training__schedule": "reduce_lr_on_plateau", "training__warmup": 1},
            "training.warmup: is for other schedules: reduce_lr_on_plateau does not warm up",
        ),
        ({"training__schedule": "cosin"}, "training.schedule: expected one of linear, cosine, .*got 'cosin'"),
        ({"training__learning_rate_ratios": {"sorsa_s": 0.0}}, "learning_rate_ratios: expected numbers above 0"),
        ({"training__trl": {"load_best_model_at_end": True}}, "is what training.load_best_model_at_end of the recipe"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    for path, value in changes.items():
        section, _, name = path.partition("__")
        recipe[section][name] = value
    with pytest.raises(SvdtuneError, match=message):
        check_recipe(recipe)


def test_what_only_the_run_can_tell_is_refused(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["training"]["schedule"] = "warmup_stable_decay"
    with pytest.raises(SvdtuneError, match=r"schedule: warmup_stable_decay cannot be made: .*lr_scheduler_kwargs: \{"):
        go(recipe)
    recipe["training"] |= {"schedule": "reduce_lr_on_plateau", "metric_for_best_model": "bleu"}
    with pytest.raises(SvdtuneError, match=r"is bleu, .*it measures eval_near_loss, eval_far_loss"):
        go(recipe, overwrite=True)
    recipe["training"] |= {"schedule": "cosine", "metric_for_best_model": None}
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lacks_a_package)
        with pytest.raises(
            SvdtuneError, match=r"training\.optimizer: adamw_torch cannot be used here: You need to install"
        ):
            go(recipe, overwrite=True)
    recipe["training"]["learning_rate_ratios"] = {"lora_B": 16.0}
    with pytest.raises(SvdtuneError, match=r"no parameter that is trained has the part 'lora_B'.*sorsa_U, sorsa_V"):
        go(recipe, overwrite=True)
    recipe["training"] |= {"learning_rate_ratios": {}, "load_best_model_at_end": True, "metric_for_best_model": "bleu"}
    with pytest.raises(
        SvdtuneError, match=r"metric_for_best_model is bleu, .*it measures eval_near_loss, eval_far_loss"
    ):
        go(recipe, overwrite=True)


@pytest.mark.parametrize("better", [False, True], ids=["small", "large"])
def test_a_schedule_of_evaluations_goes_by_the_metric_that_is_named(recipe: dict[str, Any], better: bool) -> None:
    """The loss falls, so the rate does only where a large one counts as better."""
    recipe["training"] |= {"schedule": "reduce_lr_on_plateau", "metric_for_best_model": "near_loss"}
    recipe["training"]["trl"] = {"lr_scheduler_kwargs": {"patience": 0, "threshold": 0.0}, "greater_is_better": better}
    rates = [line["learning_rate"] for line in log_of(go(recipe)[0]) if "loss" in line]
    assert (rates[-1] < rates[0]) == better


@pytest.mark.parametrize("method", ["sorsa", "sara", "mosara", "lora"])
@pytest.mark.family(1)
def test_the_best_checkpoint_is_the_result(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    recipe["method"] = {"name": method, "r": 4, "target_modules": ["q_proj", "v_proj"]}
    recipe["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "far_loss"}
    recipe["training"] |= WORST | {"learning_rate": 1e-2}
    folder, shown = go(recipe)
    losses = [line["eval_far_loss"] for line in log_of(folder) if "eval_far_loss" in line]
    best = max(range(8), key=losses.__getitem__) + 1
    assert best < 7, "the last one is the best: the test shows nothing"
    assert f"best      checkpoint-{best}, with far_loss {losses[best - 1]:.4f}" in shown
    assert losses[-1] == pytest.approx(losses[best - 1])  # taken at the end, of what is saved
    assert set(sealed_checkpoints(folder)) == {best, 7, 8}
    kept, result = weights_of(checkpoint_folder(folder, best)), weights_of(folder / "adapter")
    assert kept.keys() == result.keys()
    assert all(torch.equal(kept[name], result[name]) for name in kept)
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["name"])
    PeftModel.from_pretrained(model, folder / "adapter")
    again, _ = resumed(recipe, tmp_path, monkeypatch)
    assert timeless(log_of(again)) == timeless(log_of(folder))
    assert all(torch.equal(x, result[name]) for name, x in weights_of(again / "adapter").items())


def test_a_best_checkpoint_that_was_altered_is_not_loaded(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "far_loss"}
    monkeypatch.setattr("svdtune.training.trainer.fault", lambda path: "its adapter_model.safetensors was altered")
    with pytest.raises(
        SvdtuneError, match=r"the best checkpoint, cannot be loaded: its adapter_model\.safetensors was"
    ):
        go(recipe)


@pytest.mark.slow
def test_a_run_stops_where_it_does_not_get_better_and_so_does_a_resumed_one(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["training"] |= {"max_steps": 30, "early_stopping_patience": 6, "metric_for_best_model": "near_loss"}
    recipe["training"] |= WORST | {"learning_rate": 1e-2}
    folder, shown = go(recipe)
    summary = json.loads((folder / "training.json").read_text())
    losses = [line["eval_near_loss"] for line in log_of(folder) if "eval_near_loss" in line][: summary["steps"]]
    assert 5 < summary["steps"] < 30
    assert f"stopped   after step {summary['steps']}: 6 evaluations without a better one" in shown
    assert max(range(len(losses)), key=losses.__getitem__) == len(losses) - 7
    again, _ = resumed(recipe, tmp_path, monkeypatch)
    assert timeless(log_of(again)) == timeless(log_of(folder))
    # killed after the checkpoint of its last step, it takes no other
    (again / "training.json").unlink()
    go({**recipe, "output": {"dir": str(again)}}, resume=True)
    assert json.loads((again / "training.json").read_text())["steps"] == summary["steps"]


def test_evaluations_since_the_best() -> None:
    state = TrainerState(log_history=[{"x": value} for value in (3.0, 1.0, float("nan"), 2.0)] + [{"loss": 0.0}])
    assert without_progress(state, "x", greater_is_better=False) == 2
    assert without_progress(state, "x", greater_is_better=True) == 3
    assert without_progress(state, "y", greater_is_better=True) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"trl": {"neftune_noise_alpha": 5.0}},
        {"learning_rate_ratios": {"sorsa_s": 16.0, "sorsa_V": 0.5}},
        {"optimizer": "adafactor", "schedule": "cosine_with_restarts"},
        {"optimizer": "sgd", "schedule": "polynomial"},
        {"optimizer": "rmsprop", "schedule": "inverse_sqrt"},
        {"optimizer": "adagrad", "schedule": "constant_with_warmup"},
        {
            "optimizer": "adamw_torch_fused",
            "schedule": "cosine_with_min_lr",
            "trl": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
        },
        {"schedule": "warmup_stable_decay", "trl": {"lr_scheduler_kwargs": {"num_decay_steps": 3}}},
    ],
    ids=lambda changes: "-".join(map(str, next(iter(changes.items())))),
)
@pytest.mark.family(1)
def test_what_else_a_trainer_can_do_regularizes_and_resumes(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    usual, _ = go(recipe)
    recipe["training"] |= {"warmup": 1, **changes}
    recipe["output"]["dir"] = str(tmp_path / "changed")
    folder, _ = go(recipe)
    check_regularized(folder)
    assert timeless(log_of(folder)) != timeless(log_of(usual))
    again, _ = resumed(recipe, tmp_path, monkeypatch)
    assert timeless(log_of(again)) == timeless(log_of(folder))
    one, other = weights_of(folder / "adapter"), weights_of(again / "adapter")
    assert all(torch.equal(one[name], other[name]) for name in one)
