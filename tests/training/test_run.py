"""A run, end to end on a tiny model: what it writes, how it goes on, and what it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from runs import go, log_of, timeless
from svdtune.data import Collator, encode_all, read_rows, to_examples
from svdtune.errors import SvdtuneError
from svdtune.models import load
from svdtune.training import Interrupted, check_recipe
from svdtune.training import run as run_module
from svdtune.training.arguments import OPTIMIZERS_OF_TORCH
from svdtune.training.callbacks import StopOnInterrupt
from svdtune.training.folder import read_run
from svdtune.training.row_attention import NAME


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_folder)},
        "method": {"name": "sorsa", "r": 4, "dropout": 0.1},
        "data": {
            "train": {"source": "arithmetic", "limit": 24},
            "prompt": "question",
            "completion": "solution",
            "max_length": 256,
        },
        "training": {
            "max_steps": 8,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-3,
            "warmup": 2,
            "logging_steps": 1,
            "save_steps": 3,
            "keep_checkpoints": 4,
        },
        "output": {"dir": str(tmp_path / "run")},
    }


@pytest.mark.parametrize("method", ["sara", "mosara", "sorsa", "lora"])
@pytest.mark.family(2)
def test_a_run_writes_what_it_should(recipe: dict[str, Any], method: str) -> None:
    recipe["method"] = {"name": method, "r": 4, "target_modules": ["q_proj", "v_proj"]}
    folder, shown = go(recipe)
    log = log_of(folder)
    assert [line["step"] for line in log] == list(range(1, 9))
    assert set(log[0]) - {"l_reg"} == {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert all(("l_reg" in line) == (method == "sorsa") for line in log)
    assert read_run(folder) == check_recipe(recipe)
    summary = json.loads((folder / "training.json").read_text())
    assert summary["adapted_modules"] == 4
    assert summary["steps"] == 8
    assert summary["saved_bytes"] > 0
    card = (folder / "adapter" / "README.md").read_text()
    assert f"| data | `arithmetic`, {summary['rows']} rows |" in card.replace(", split train", "")
    assert "adapted   4 modules: self_attn.q_proj ×2, self_attn.v_proj ×2" in shown
    assert f"trained   {summary['trained_parameters']:,} of {summary['total_parameters']:,} parameters" in shown
    assert "▶ #### " in shown
    assert "<|end|>" in shown


@pytest.mark.parametrize(("method", "rate"), [("sara", 1e-2), ("mosara", 1e-1), ("sorsa", 1e-2), ("lora", 1e-2)])
@pytest.mark.family(1)
def test_the_saved_adapter_has_learnt(recipe: dict[str, Any], method: str, rate: float) -> None:
    recipe["method"] = {"name": method, "r": 8, "target_modules": "all-linear"}
    recipe["training"]["learning_rate"] = rate
    folder, _ = go(recipe)
    loaded = load(recipe["model"]["name"])
    rows, _ = encode_all(to_examples(read_rows("arithmetic", limit=24), "question", "solution"), loaded.tokenizer, 256)
    batch = Collator(loaded.tokenizer.pad_token_id)(rows)
    with torch.no_grad():
        before = loaded.model(**batch).loss
        after = PeftModel.from_pretrained(loaded.model, folder / "adapter")(**batch).loss
    assert after < before - 0.05


@pytest.mark.parametrize("method", ["sara", "mosara", "sorsa", "lora"])
@pytest.mark.family(2)
def test_resume_continues_to_the_same_losses(
    recipe: dict[str, Any], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["method"] = {"name": method, "r": 4, "target_modules": ["q_proj", "v_proj"]}
    recipe["method"] |= {"lora_dropout": 0.1} if method == "lora" else {"dropout": 0.1}
    whole, _ = go(recipe)
    recipe["output"]["dir"] = str(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtStep5)
        with pytest.raises(Interrupted, match=r"stopped after step 5, with a checkpoint"):
            go(recipe)
    stopped = tmp_path / "stopped"
    assert len(log_of(stopped)) == 5
    assert not (stopped / "adapter").exists()
    # as if steps after the checkpoint had been logged
    with (stopped / "train_log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.0}\n{"step": 7, "lo')
    go(recipe, resume=True)
    assert timeless(log_of(stopped)) == timeless(log_of(whole))
    one, other = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (whole, stopped))
    assert one == other


class StopAtStep5(StopOnInterrupt):
    """Ctrl-C during the fifth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self._on_signal()
        super().on_step_end(args, state, control, **kwargs)


def test_a_finished_run_is_neither_resumed_nor_overwritten_unasked(recipe: dict[str, Any]) -> None:
    recipe["training"] |= {"max_steps": 1, "save_steps": None}
    folder, _ = go(recipe)
    written = (folder / "training.json").read_bytes()
    with pytest.raises(SvdtuneError, match="holds a finished run: give --overwrite to delete it"):
        go(recipe)
    with pytest.raises(SvdtuneError, match="is finished; there is nothing to resume"):
        go(recipe, resume=True)
    with pytest.raises(SvdtuneError, match="give one of them"):
        go(recipe, resume=True, overwrite=True)
    assert (folder / "training.json").read_bytes() == written
    (folder / "mine.txt").write_text("kept")
    recipe["training"]["max_steps"] = 2
    go(recipe, overwrite=True)
    assert len(log_of(folder)) == 2
    assert (folder / "mine.txt").read_text() == "kept"


def test_an_unfinished_run_resumes_only_with_its_own_recipe(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtStep5)
        with pytest.raises(Interrupted):
            go(recipe)
    with pytest.raises(SvdtuneError, match="an unfinished run: give --resume to continue it, --overwrite"):
        go(recipe)
    recipe["training"] |= {"learning_rate": 2e-3, "logging_steps": 2}
    with pytest.raises(SvdtuneError, match=r"\(training.learning_rate was 0.001, is 0.002\); resume with the same"):
        go(recipe, resume=True)


def test_nothing_to_resume(recipe: dict[str, Any]) -> None:
    with pytest.raises(SvdtuneError, match="there is no checkpoint in"):
        go(recipe, resume=True)


def test_a_folder_that_is_not_a_run_is_left_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(SvdtuneError, match="is not empty and not a run of svdtune"):
        go(recipe, overwrite=True)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("data", "max_length", 20, r"arithmetic row 1: the prompt is \d+ tokens long, and max_length is 20"),
        ("data", "max_length", 4096, "data.max_length is 4096, and the context of .* is 512 tokens"),
        ("data", "prompt", "questoin", "arithmetic row 1 has no field 'questoin': .* did you mean 'question'"),
        ("data", "template", "chat", "chat template"),
        ("training", "precision", "fp16", "fp16 needs a CUDA device"),
        ("training", "optimizer", "sgdd", "the training section cannot be used here: .*sgdd"),
        ("training", "report_to", ["nowhere"], r"training.report_to: nowhere not installed here"),
        ("method", "target_modules", ["qproj"], "no module is named 'qproj'"),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(
    recipe: dict[str, Any], section: str, name: str, value: Any, message: str
) -> None:
    recipe[section][name] = value
    with pytest.raises(SvdtuneError, match=message):
        go(recipe)
    assert not Path(recipe["output"]["dir"]).exists()


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_an_optimizer_without_its_package_is_refused_before_rows_are_read(
    recipe: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*_: Any) -> Any:
        raise SvdtuneError("rows are read")

    monkeypatch.setattr("svdtune.training.preparation.TrainRows", rows)
    recipe["training"]["optimizer"] = name
    needs_none = name in OPTIMIZERS_OF_TORCH
    refused = rf"training\.optimizer: {name} cannot be used here: .*(torch|nstall).*; adamw_torch, "
    with pytest.raises(SvdtuneError, match="rows are read" if needs_none else refused):
        go(recipe)


def test_disagreeing_end_tokens_stop_training(recipe: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load(tiny_folder)
    loaded.model.generation_config.eos_token_id = 7
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    recipe["model"]["name"] = str(tmp_path / "model")
    with pytest.raises(SvdtuneError, match="the end tokens disagree"):
        go(recipe)
    recipe["model"]["end_token"] = "<|end|>"
    recipe["training"]["max_steps"] = 1
    go(recipe)


def test_full_fine_tuning_writes_a_model(recipe: dict[str, Any]) -> None:
    recipe["method"] = {"name": "full"}
    recipe["training"]["max_steps"] = 1
    folder, shown = go(recipe)
    assert "the whole model is trained" in shown
    assert load(folder / "model").model.config.use_cache


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"group_by_length": True}])
def test_other_ways_to_train(recipe: dict[str, Any], change: dict[str, Any]) -> None:
    recipe["training"] |= {"max_steps": 2, **change}
    before = os.environ.get("ACCELERATE_MIXED_PRECISION")
    log = log_of(go(recipe)[0])
    assert len(log) == 2
    # by which Transformers 4 would have the next run of this process compute in the same precision
    assert os.environ.get("ACCELERATE_MIXED_PRECISION") == before


def test_gradient_checkpointing_does_not_change_the_losses(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["method"]["dropout"] = 0.0
    plain = log_of(go(recipe)[0])
    recipe["output"]["dir"] = str(tmp_path / "checkpointing")
    recipe["training"]["gradient_checkpointing"] = True
    saved = log_of(go(recipe)[0])
    assert [line["loss"] for line in saved] == pytest.approx([line["loss"] for line in plain], rel=1e-5)


@pytest.mark.slow
def test_compiling_does_not_change_the_losses(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["method"]["dropout"] = 0.0
    recipe["training"]["max_steps"] = 50
    plain = log_of(go(recipe)[0])
    recipe["output"]["dir"] = str(tmp_path / "compiled")
    recipe["training"]["compile"] = True
    compiled = log_of(go(recipe)[0])
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-4)


def test_held_out_loss_is_logged(recipe: dict[str, Any]) -> None:
    recipe["data"]["eval"] = {"source": "arithmetic", "split": "test", "limit": 4}
    recipe["training"] |= {"max_steps": 4, "eval_steps": 2}
    lines = [line for line in log_of(go(recipe)[0]) if "eval_loss" in line]
    assert [line["step"] for line in lines][:2] == [2, 4]


@pytest.mark.parametrize("settings", [{}, {"padding_free": False}, {"packing": True}, {"label_smoothing": 0.1}])
def test_the_held_out_loss_is_the_same_in_any_batches(
    recipe: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The mean over all labels; it was the mean of the batches' means, so that a few long rows in a
    batch of their own counted as much as many short ones."""
    rows = [{"prompt": "Say it.", "completion": "ab" * length} for length in (1, 2, 40, 1, 3)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows)))
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(json.dumps(row | {"prompt": f"Say {at}."}) for at, row in enumerate(rows)))
    recipe["data"] = {"train": str(train), "eval": str(held_out), "max_length": 128}
    recipe["training"] |= {"max_steps": 1, "learning_rate": 1e-12, **settings}
    losses = []
    for batch_size in (1, 2, 5):
        recipe["training"]["batch_size"] = batch_size
        losses += [line["eval_loss"] for line in log_of(go(recipe, overwrite=True)[0]) if "eval_loss" in line]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_all_turns_of_a_chat_are_trained_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    asked, said = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
    row = json.dumps({"messages": [asked, said, asked, {"role": "assistant", "content": "more"}]})
    (tmp_path / "chats.jsonl").write_text(f"{row}\n{row}\n")
    recipe["data"] = {"train": str(tmp_path / "chats.jsonl"), "max_length": 256}
    recipe["model"]["chat_template"] = str(tmp_path / "chat.jinja")
    recipe["training"]["max_steps"] = 1
    _, shown = go(recipe)
    assert [line.split("▶ ")[1] for line in shown.splitlines() if "▶ " in line] == ["say<|end|>", "more<|end|>"]
    recipe["model"]["chat_template"] = str(tmp_path / "none.jinja")
    with pytest.raises(SvdtuneError, match=r"model\.chat_template: cannot read .*none\.jinja.* expected a Jinja file"):
        go(recipe, overwrite=True)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("how", [{"packing": True}, {"padding_free": True}, {"padding_free": False}])
@pytest.mark.family(2)
def test_rows_side_by_side_train_as_rows_apart(
    recipe: dict[str, Any], tmp_path: Path, how: dict[str, bool], by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all rows in one step the losses are those of padded rows, however they lie and are
    attended to."""
    monkeypatch.setattr("svdtune.training.collators.kernel_fits", lambda *_: by_rows)
    losses = []
    for number, training in enumerate(({"padding_free": False}, how)):
        recipe["data"]["train"]["limit"] = 6
        recipe["training"] |= {"max_steps": 2, "batch_size": 6, "packing": False, "padding_free": None, **training}
        recipe["output"]["dir"] = str(tmp_path / str(number))
        losses.append([line["loss"] for line in log_of(go(recipe)[0]) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_model_is_saved_without_the_attention_that_trained_it(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdtune.training.collators.kernel_fits", lambda *_: True)
    recipe["method"] = {"name": "full"}
    recipe["training"]["max_steps"] = 1
    assert NAME not in (go(recipe)[0] / "model" / "config.json").read_text()


def test_rows_are_not_laid_side_by_side_where_the_model_would_mix_them(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdtune.training.collators.keeps_rows_apart", lambda *_, **__: False)
    monkeypatch.setattr("svdtune.training.collators.padding_share", lambda *_: 0.3)
    recipe["training"]["max_steps"] = 1
    assert "30% of its work is padding; training.group_by_length: true makes it less" in go(recipe)[1]
    for name in ("packing", "padding_free"):
        recipe["training"] |= {"packing": False, "padding_free": None, name: True}
        with pytest.raises(SvdtuneError, match=f"training.{name}: true needs rows that cannot see each other"):
            go(recipe, overwrite=True)


@pytest.mark.parametrize("final_loss", [True, False])
def test_the_held_out_loss_at_the_end_can_be_left_out(recipe: dict[str, Any], final_loss: bool) -> None:
    recipe["data"]["eval"] = {"source": "arithmetic", "split": "test", "limit": 4}
    recipe["training"]["max_steps"] = 2
    lines = [line for line in log_of(go(recipe, final_loss=final_loss)[0]) if "eval_loss" in line]
    assert len(lines) == final_loss


def test_the_penalty_is_logged_to_every_tracker(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*run_default_callbacks(), Tracker])
    recipe["training"]["max_steps"] = 2
    go(recipe)
    assert all("l_reg" in logs and "tokens_per_second" in logs for logs in seen if "loss" in logs)
    assert sum("loss" in logs for logs in seen) == 2


def run_default_callbacks() -> list[type[TrainerCallback]]:
    from transformers.trainer import DEFAULT_CALLBACKS

    return DEFAULT_CALLBACKS
