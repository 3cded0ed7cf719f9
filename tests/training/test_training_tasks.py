"""Tasks besides SFT, end to end on a tiny model: what they learn from, show, refuse and write."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from runs import go, log_of, timeless
from svdtune.analysis import analyze
from svdtune.errors import SvdtuneError
from svdtune.export.merge_checkpoint import merge
from svdtune.export.source import find_source, open_source
from svdtune.methods.sorsa.regularizer import add_regularizer_gradients
from svdtune.training import Interrupted, check_recipe, tasks
from svdtune.training import run as run_module
from svdtune.training.arguments import _decided, training_arguments
from svdtune.training.callbacks import StopOnInterrupt
from svdtune.training.method import build_config
from svdtune.training.task_rows import moved_at_start
from svdtune.training.trl_settings import DECIDED
from tiny import save_tiny_llama

TASKS = ["dpo", "kto", "reward"]
METHODS = ["sorsa", "sara", "mosara"]


def rows_of(task: str, count: int = 12) -> list[dict[str, Any]]:
    prompts = [f"Add {i} and {i + 1}.\n" for i in range(count)]
    if task == "kto":
        answers = [(str(2 * i + 1), True) if i % 3 else ("no idea", False) for i in range(count)]
        return [{"prompt": p, "completion": a, "label": good} for p, (a, good) in zip(prompts, answers, strict=True)]
    return [{"prompt": p, "chosen": f"{2 * i + 1}", "rejected": f"{i} or so"} for i, p in enumerate(prompts)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Of DPO; `of` makes it another task's."""
    return {
        "model": {"name": str(tiny_folder)},
        "method": {"name": "sorsa", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": write(tmp_path / "dpo.jsonl", rows_of("dpo")), "max_length": 64},
        "training": {
            "task": "dpo",
            "max_steps": 4,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": None,
        },
        "output": {"dir": str(tmp_path / "run")},
    }


def of(recipe: dict[str, Any], task: str, tmp_path: Path) -> dict[str, Any]:
    recipe["training"]["task"] = task
    recipe["data"]["train"] = write(tmp_path / f"{task}.jsonl", rows_of(task))
    return recipe


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.family(3)
def test_every_task_trains_every_method(recipe: dict[str, Any], tmp_path: Path, task: str, method: str) -> None:
    of(recipe, task, tmp_path)["method"]["name"] = method
    recipe["data"]["eval"] = write(tmp_path / "held_out.jsonl", [row | {"prompt": "?"} for row in rows_of(task, 4)])
    folder, _ = go(recipe)
    log = log_of(folder)
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(("l_reg" in line) == (method == "sorsa") for line in steps)
    assert "eval_loss" in log[-1]
    assert json.loads((folder / "training.json").read_text())["adapted_modules"] == 4
    assert not (folder / "README.md").exists()
    cls: Any = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    base = cls.from_pretrained(recipe["model"]["name"], **({"num_labels": 1} if task == "reward" else {}))
    ids = torch.arange(2, 12)[None]
    base.config.pad_token_id = 1
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, folder / "adapter")(input_ids=ids).logits
    assert not torch.allclose(before, after)


def test_the_reference_is_the_base(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step of SORSA, which starts at the base, no reward and the loss of log 2; and
    what is taken for the reference later is what the base alone says."""
    trainers: list[Any] = []
    make = tasks.make_trainer

    def keep(*args: Any, **kwargs: Any) -> Any:
        trainers.append(make(*args, **kwargs))
        return trainers[0]

    monkeypatch.setattr(tasks, "make_trainer", keep)
    folder, _ = go(recipe)
    first = log_of(folder)[0]
    assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    [trainer] = trainers
    assert list(trainer.model.peft_config) == ["default"]
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    base = AutoModelForCausalLM.from_pretrained(recipe["model"]["name"])
    with torch.no_grad():
        logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    taken = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (taken * batch["completion_mask"][:, 1:]).sum(1)
    torch.testing.assert_close(torch.cat([chosen, rejected]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_full_training_is_compared_with_a_copy(recipe: dict[str, Any], tmp_path: Path, task: str) -> None:
    of(recipe, task, tmp_path)["method"] = {"name": "full"}
    log = log_of(go(recipe)[0])
    assert log[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["rewards/chosen"] != pytest.approx(0, abs=1e-3)


class StopAtStep3(StopOnInterrupt):
    """Ctrl-C during the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self._on_signal()
        super().on_step_end(args, state, control, **kwargs)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.family(1)
def test_resume_goes_on_to_the_same_bits(
    recipe: dict[str, Any], tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of(recipe, task, tmp_path)["method"]["dropout"] = 0.1
    recipe["training"] |= {"max_steps": 5, "trl": {"disable_dropout": False}}
    whole, _ = go(recipe)
    recipe["output"]["dir"] = str(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtStep3)
        with pytest.raises(Interrupted, match="stopped after step 3"):
            go(recipe)
    stopped, _ = go(recipe, resume=True)
    assert timeless(log_of(stopped)) == timeless(log_of(whole))
    one, other = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (whole, stopped))
    assert one == other


@pytest.mark.parametrize("task", TASKS)
def test_the_regularizer_is_added_once_an_optimizer_step(recipe: dict[str, Any], tmp_path: Path, task: str) -> None:
    """One step of plain gradient descent: the factors move by the rate times the task's gradients,
    which a run without the penalty gives, and γ/η times those of the penalty."""
    of(recipe, task, tmp_path)
    recipe["training"] |= {"max_steps": 1, "optimizer": "sgd", "max_grad_norm": 0, "schedule": "constant"}
    moved = {}
    for gamma in (0.0, 0.5):
        recipe["method"] |= {"gamma": gamma}
        recipe["output"]["dir"] = f"{recipe['output']['dir']}-{gamma}"
        folder, _ = go(recipe)
        moved[gamma] = load_file(folder / "adapter" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(recipe["model"]["name"])
    options = {key: value for key, value in recipe["method"].items() if key != "name"}
    start = get_peft_model(base, build_config("sorsa", options))
    rate = recipe["training"]["learning_rate"]
    add_regularizer_gradients(start, rate)
    gradients = {name.replace(".default", ""): p.grad for name, p in start.named_parameters() if p.grad is not None}
    assert len(gradients) == 8
    for name, gradient in gradients.items():
        torch.testing.assert_close(moved[0.5][name], moved[0.0][name] - rate * gradient, rtol=0, atol=2e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) * rate > 1e-5


def test_the_head_of_a_reward_model_is_trained_and_saved(recipe: dict[str, Any], tmp_path: Path) -> None:
    of(recipe, "reward", tmp_path)["training"]["max_steps"] = 8
    folder, _ = go(recipe)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    [head] = [tensor for name, tensor in saved.items() if name.endswith("score.weight")]
    assert head.shape == (1, 32)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert log_of(folder)[-1]["accuracy"] > 0.9
    again = recipe | {"output": {"dir": str(tmp_path / "again")}}
    other = load_file(go(again)[0] / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], other[name]) for name in saved)  # the head's start is the recipe's seed


def test_a_reward_model_is_analyzed_and_asked_for_no_text(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = go(of(recipe, "reward", tmp_path))
    assert analyze(folder).after is not None
    assert "| task | reward |" in (folder / "adapter" / "README.md").read_text()
    source = find_source(folder)
    for ask in (lambda: open_source(source), lambda: merge(source, tmp_path / "merged")):
        with pytest.raises(SvdtuneError, match="is a reward model: it gives a number for a text and writes none"):
            ask()


@pytest.mark.parametrize("task", ["sft", *TASKS])
def test_factors_keep_their_dtype_on_a_quantized_base(
    recipe: dict[str, Any], tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL rounds what is trained on a base that calls itself quantized."""
    make = tasks.make_trainer
    rounded = []

    def quantized(*args: Any, model: Any, **kwargs: Any) -> Any:
        base = model.get_base_model()
        base.is_loaded_in_4bit = True
        trainer = make(*args, model=model, **kwargs)
        del base.is_loaded_in_4bit
        rounded.append({p.dtype for p in model.parameters() if p.requires_grad})
        return trainer

    monkeypatch.setattr(tasks, "make_trainer", quantized)
    if task == "sft":
        recipe["data"] |= {"completion": "chosen"}
        recipe["training"]["task"] = "sft"
    else:
        of(recipe, task, tmp_path)
    recipe["training"]["max_steps"] = 1
    folder, _ = go(recipe)
    assert rounded == [{torch.float32}]
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    factors = [tensor for name, tensor in saved.items() if "sorsa_" in name]
    assert factors
    assert all(tensor.dtype == torch.float32 for tensor in factors)
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in factors)


def test_kto_pairs_each_prompt_with_the_answer_before_it() -> None:
    rows = [{"prompt_ids": [at], "completion_ids": [10 + at] * at, "label": at % 2 == 0} for at in (1, 2, 3)]
    batch = tasks.LabelCollator(pad_token_id=0)(rows)
    assert batch["KL_input_ids"].tolist() == [[1, 13, 13, 13], [2, 11, 0, 0], [3, 12, 12, 0]]
    assert batch["label"].tolist() == [False, True, False]
    assert "KL_input_ids" not in tasks.LabelCollator(pad_token_id=0, mismatched=False)(rows)
    assert "KL_completion_ids" not in rows[0]


def test_the_preview_shows_the_prompt_and_both_answers(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"]["max_steps"] = 1
    shown = go(recipe)[1]
    assert "12 pairs" in shown
    assert "▶ chosen, ✗ rejected" in shown
    assert "        · Add 0 and 1.\n" in shown
    assert "        ▶ 1<|end|>\n        ✗ 0 or so<|end|>\n" in shown
    shown = go(of(recipe, "kto", tmp_path) | {"output": {"dir": str(tmp_path / "kto")}})[1]
    assert "12 labelled answers" in shown
    assert "decoded; label: false)" in shown
    assert "        ✗ no idea<|end|>\n" in shown


def test_who_starts_away_from_the_reference_is_told(recipe: dict[str, Any]) -> None:
    recipe["method"] |= {"name": "sara"}
    assert 'init="zero_v"' in str(moved_at_start(check_recipe(recipe)))
    recipe["training"]["max_steps"] = 1
    assert "reference SARA changes the model at step 0" in go(recipe)[1]
    recipe["method"]["init"] = "zero_v"
    assert moved_at_start(check_recipe(recipe)) is None


@pytest.mark.parametrize(
    ("section", "setting", "value", "message"),
    [
        ("data", "loss_on", "all", r"data.loss_on: is for training.task: sft; dpo has it as 'response'"),
        ("training", "padding_free", True, r"training.padding_free: is for training.task: sft"),
        ("training", "packing", True, r"training.packing: is for training.task: sft"),
        ("training", "group_by_length", True, r"training.group_by_length: is for training.task: sft"),
        ("training", "label_smoothing", 0.1, r"training.label_smoothing: is for training.task: sft"),
        ("data", "completion", "answer", r"dpo reads the columns chosen and rejected"),
        ("training", "trl", {"bta": 0.1}, r"training.trl.bta: unknown setting; did you mean beta\?"),
        ("training", "trl", {"beta": "high"}, r"training.trl.beta: expected a valid number; got 'high'"),
        ("training", "trl", {"seed": 1}, r"training.trl.seed: is what training.seed of the recipe decides"),
        ("training", "trl", {"sync_ref_model": True}, r"sync_ref_model: is not the recipe's to change"),
        ("training", "trl", {"save_only_model": True}, r"save_only_model: is not the recipe's to change"),
        ("training", "trl", {"ignore_data_skip": True}, r"ignore_data_skip: is not the recipe's to change"),
        ("training", "trl", {"push_to_hub": True}, r"push_to_hub: is not the recipe's to change"),
        ("training", "task", "dop", r"training.task: expected 'sft', 'dpo'"),
    ],
)
def test_what_a_task_has_no_use_for_is_refused(
    recipe: dict[str, Any], section: str, setting: str, value: Any, message: str
) -> None:
    recipe[section][setting] = value
    with pytest.raises(SvdtuneError, match=message):
        check_recipe(recipe)


def test_a_batch_of_one_is_refused_for_kto(recipe: dict[str, Any], tmp_path: Path) -> None:
    of(recipe, "kto", tmp_path)["training"]["batch_size"] = 1
    with pytest.raises(SvdtuneError, match="kto compares each answer with another of its batch"):
        check_recipe(recipe)


@pytest.mark.parametrize("task", ["sft", *TASKS])
def test_every_argument_the_recipe_decides_is_refused_in_trl(recipe: dict[str, Any], tmp_path: Path, task: str) -> None:
    recipe["training"]["task"] = task
    checked = check_recipe(recipe)
    assert set(_decided(checked, 10)) <= set(DECIDED)
    if task == "reward":
        recipe["training"]["trl"] = {"liger_kernel_config": {"rope": False, "fused_linear_cross_entropy": True}}
        found = training_arguments(check_recipe(recipe), 10).liger_kernel_config
        assert found == {"rope": False, "fused_linear_cross_entropy": False}
    if task == "dpo":
        recipe["training"]["trl"] = {"beta": 0.3, "loss_type": ["ipo"]}
        args: Any = training_arguments(check_recipe(recipe), 10)
        assert (args.beta, args.loss_type) == (0.3, ["ipo"])


def test_trl_that_is_not_there_is_named(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    recipe["training"]["trl"] = {"beta": 0.3}
    with pytest.raises(SvdtuneError, match=r"training.trl: training needs TRL: pip install 'svdtune\[train\]'"):
        check_recipe(recipe)


def test_what_trl_refuses_is_said(recipe: dict[str, Any]) -> None:
    recipe["training"]["trl"] = {"loss_type": ["exo_pair"]}
    with pytest.raises(SvdtuneError, match=r"TRL's trainer for training.task: dpo refuses the run: Label smoothing"):
        go(recipe)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accelerator_config": {"foo": 1}}, "cannot be used here: .* unexpected keyword argument 'foo'"),
        ({"log_level": "loud"}, "cannot be used here: there is no 'loud'"),
    ],
)
def test_what_its_configuration_refuses_is_said(recipe: dict[str, Any], given: dict[str, Any], message: str) -> None:
    recipe["training"]["trl"] = given
    with pytest.raises(SvdtuneError, match=message):
        training_arguments(check_recipe(recipe), 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"f_divergence_type": "x"},
            "the trainer ended with: Unknown .* x; look at what the recipe gives it in training.trl: f_divergence_type",
        ),
        ({"dataloader_persistent_workers": True}, "ended with: persistent_workers option needs"),
        ({"loss_type": []}, "ended with: 'float' object has no attribute"),
        ({"parallelism_config": {}}, "ended with: .*in training.trl: parallelism_config"),
    ],
)
def test_what_the_trainer_ends_with_is_said(recipe: dict[str, Any], given: dict[str, Any], message: str) -> None:
    recipe["training"]["trl"] = given
    with pytest.raises(SvdtuneError, match=message):
        go(recipe)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha: expected 0 or more; got -1"),
        (
            {"neftune_noise_alpha": 5},
            "is for sft and reward: dpo compares with the base, which would get the noise too",
        ),
        ({"neftune_noise_alpha": float("nan")}, "neftune_noise_alpha: expected a finite number; got nan"),
        ({"beta": -0.1}, r"beta: expected 0 or more; got -0\.1"),
        ({"bf16_full_eval": True}, r"bf16_full_eval: is what training\.precision of the recipe decides"),
    ],
)
def test_values_that_nobody_else_looks_at_are_refused(
    recipe: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    """Noise without a range was a traceback in the first step; with a beta below 0 the rejected
    answer became likelier; evaluating in 16 bits rounded what was saved after it."""
    recipe["training"]["trl"] = given
    with pytest.raises(SvdtuneError, match=message):
        check_recipe(recipe)


def test_what_packing_decides_is_refused_in_trl(recipe: dict[str, Any]) -> None:
    recipe["training"] |= {"task": "sft", "trl": {"packing_strategy": "wrapped"}}
    with pytest.raises(SvdtuneError, match=r"packing_strategy: is what training\.packing of the recipe decides"):
        check_recipe(recipe)


def test_leaks_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    for task in TASKS:
        of(recipe, task, tmp_path)["data"]["eval"] = write(tmp_path / "held_out.jsonl", rows_of(task, 2))
        with pytest.raises(SvdtuneError, match=r"2 of the 2 questions of .* which would be trained on"):
            go(recipe)


def test_end_tokens_that_disagree_are_refused(
    recipe: dict[str, Any], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe["model"]["name"] = str(save_tiny_llama(tmp_path / "other", tiny_tokenizer, eos_token_id=5))
    for task in TASKS:
        with pytest.raises(SvdtuneError, match="the end tokens disagree"):
            go(of(recipe, task, tmp_path))
