"""TRL's trainers in a script of the user's own, with a configuration of ours as `peft_config` or a
model that has an adapter."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SorsaRegularizer, SvdtuneWarning
from svdtune.linalg.orthonormal import orthonormality_error
from svdtune.methods.layers.base import SvdLayer

trl = pytest.importorskip("trl")

CONFIGS: dict[str, Any] = {
    "sorsa": (SorsaConfig, {"r": 4}),
    "sara": (SaraConfig, {"r": 3}),
    "sara-zero_v": (SaraConfig, {"r": 3, "init": "zero_v"}),
    "mosara": (MoSaraConfig, {"r": 5, "num_heads": 2}),
}
TRAINERS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO"}
REFERRED = ("dpo", "kto", "grpo")
ROUNDED = "rounded to a lower dtype after it was put on"
AWAY = "training begins away from the reference"


def config_of(name: str, task: str = "sft", **settings: Any):
    cls, own = CONFIGS[name]
    kind = "SEQ_CLS" if task == "reward" else "CAUSAL_LM"
    return cls(**own | settings, target_modules=["q_proj", "v_proj"], task_type=kind)


def rows_of(task: str) -> Dataset:
    prompts = [f"Add {i} and {i + 1}.\n" for i in range(8)]
    answers = {"chosen": "1", "rejected": "0 or so"}
    if task == "sft":
        return Dataset.from_list([{"prompt": p, "completion": f"{2 * i + 1}"} for i, p in enumerate(prompts)])
    if task == "kto":
        return Dataset.from_list([{"prompt": p, "completion": "1", "label": i % 2 == 0} for i, p in enumerate(prompts)])
    if task == "grpo":
        return Dataset.from_list([{"prompt": p} for p in prompts])
    return Dataset.from_list([{"prompt": p, **answers} for p in prompts])


def base_of(folder: Path, task: str = "sft"):
    cls = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    kwargs = {"num_labels": 1} if task == "reward" else {}
    torch.manual_seed(0)  # the head of a reward model
    return cls.from_pretrained(folder, dtype=torch.float32, **kwargs)


def trainer_of(task: str, model: Any, folder: Path, tmp_path: Path, config: Any = None, steps: int = 1, **more: Any):
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    if task == "grpo":
        settings |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        more["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    arguments = getattr(trl, f"{TRAINERS[task]}Config")(**settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = getattr(trl, f"{TRAINERS[task]}Trainer")
    return trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(task),
        processing_class=tokenizer,
        peft_config=config,
        **more,
    )


def on_quantized(task: str, model: Any, *args: Any, **kwargs: Any):
    """The trainer, made while the base calls itself quantized, which is when TRL asks."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.is_loaded_in_4bit = True
    trainer = trainer_of(task, model, *args, **kwargs)
    del base.is_loaded_in_4bit
    return trainer


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor.clone()
        for name, layer in model.named_modules()
        if isinstance(layer, SvdLayer)
        for part, tensor in layer.adapter_tensors("default").items()
    }


@pytest.mark.parametrize("given", ["config", "model"])
@pytest.mark.parametrize("name", ["sorsa", "sara", "mosara"])
@pytest.mark.parametrize("task", TRAINERS)
def test_what_trl_rounds_comes_back(task, name, given, tiny_folder, tmp_path):
    base, config = base_of(tiny_folder, task), config_of(name, task)
    adapted = get_peft_model(base, config) if given == "model" else base
    expected = factors(adapted)
    with pytest.warns(SvdtuneWarning, match=ROUNDED):
        trainer = on_quantized(task, adapted, tiny_folder, tmp_path, None if given == "model" else config)
    found = factors(trainer.model.train())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert not any(tensor.any() and torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.values())
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")
@pytest.mark.parametrize("name", ["sorsa", "sara"])
@pytest.mark.slow
def test_two_hundred_steps_on_a_quantized_base_are_those_on_another(name, tiny_folder, tmp_path):
    runs = []
    for make in (trainer_of, on_quantized):
        torch.manual_seed(1)
        callbacks = [SorsaRegularizer()] if name == "sorsa" else []
        trainer = make(
            "sft", base_of(tiny_folder), tiny_folder, tmp_path, config_of(name), steps=200, callbacks=callbacks
        )
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        runs.append((losses, factors(trainer.model)))
    (losses, tensors), (other_losses, others) = runs
    assert len(losses) == 200
    assert losses[-1] < losses[0]
    assert other_losses == losses
    assert all(torch.equal(others[key], tensor) for key, tensor in tensors.items())
    if name == "sorsa":
        errors = [float(orthonormality_error(t)) for key, t in others.items() if key.endswith(("sorsa_U", "sorsa_V"))]
        assert max(errors) < 1e-2


def test_what_a_user_casts_stays_cast(tiny_folder, tmp_path):
    model = get_peft_model(base_of(tiny_folder), config_of("sorsa")).to(torch.bfloat16)
    model.train()
    assert {tensor.dtype for tensor in factors(model).values()} == {torch.bfloat16}
    half = base_of(tiny_folder).to(torch.bfloat16)
    model = get_peft_model(half, config_of("sorsa"), autocast_adapter_dtype=False).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_what_is_trained_is_never_set_back(tiny_folder):
    """Neither by a later rounding, nor before it: the values are those of now."""
    model = get_peft_model(base_of(tiny_folder), config_of("sorsa"))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.01
    now = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(SvdtuneWarning, match=ROUNDED):
        model.train()
    assert all(torch.equal(p, value) for p, value in zip(trained, now, strict=True))


def test_it_comes_back_before_processes_share_it(tiny_folder):
    """DistributedDataParallel sorts parameters by their dtypes when it is made."""
    model = get_peft_model(base_of(tiny_folder), config_of("sorsa"))
    before = factors(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.warns(SvdtuneWarning, match=ROUNDED):
            model = torch.nn.parallel.DistributedDataParallel(model)
        model(input_ids=torch.arange(12)[None]).logits.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(tensor, before[key]) for key, tensor in factors(model.module).items())


@pytest.mark.parametrize("name", ["sorsa", "sara-zero_v", "mosara"])
@pytest.mark.parametrize("task", REFERRED)
@pytest.mark.family(3)
def test_training_begins_at_its_reference(task, name, tiny_folder, tmp_path):
    callbacks = [SorsaRegularizer()] if name == "sorsa" else []
    trainer = trainer_of(task, base_of(tiny_folder), tiny_folder, tmp_path, config_of(name, task), callbacks=callbacks)
    trainer.train()
    first = trainer.state.log_history[0]
    if task == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["rewards/margins" if task == "dpo" else "kl"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(
        base_of(tiny_folder)(input_ids=torch.arange(12)[None]).logits,
        trainer.model.eval().unload()(input_ids=torch.arange(12)[None]).logits,
    )


@pytest.mark.parametrize("task", REFERRED)
def test_saras_start_away_from_the_reference_is_told(task, tiny_folder, tmp_path):
    trainer = trainer_of(task, base_of(tiny_folder), tiny_folder, tmp_path, config_of("sara", task))
    with pytest.warns(SvdtuneWarning, match=AWAY) as caught:
        trainer.train()
    assert len([one for one in caught if AWAY in str(one.message)]) == 1


@pytest.mark.parametrize("name", ["sorsa", "sara", "mosara"])
def test_the_reference_of_a_trained_adapter_is_that_adapter(name, tiny_folder, tmp_path):
    """TRL puts a second adapter on and copies the first one tensor by tensor."""
    first = get_peft_model(base_of(tiny_folder), config_of(name))
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    first.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_of(tiny_folder), tmp_path / "adapter", is_trainable=True)
    callbacks = [SorsaRegularizer()] if name == "sorsa" else []
    for model in (first, loaded):
        before = factors(model)
        trainer = trainer_of("dpo", model, tiny_folder, tmp_path, steps=2, callbacks=callbacks)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
        for key, layer in model.named_modules():
            if isinstance(layer, SvdLayer):
                reference = layer.adapter_tensors("ref")
                assert all(torch.equal(tensor, before[f"{key}.{part}"]) for part, tensor in reference.items())
        assert not all(torch.equal(tensor, before[key]) for key, tensor in factors(model).items())
