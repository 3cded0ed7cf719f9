"""`svdtune train` by several processes: the run of one process, whatever holds the parameters, and
what may go wrong."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import launching
import programs
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import new_process
from releases import TRANSFORMERS_4
from runs import log_of
from svdtune.errors import SvdtuneError
from svdtune.training import train
from svdtune.training.checkpoints import discard, fault, sealed_checkpoints
from svdtune.training.recipe import Recipe, check_recipe, dump_recipe

HERE = Path(__file__).parent
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def recipe(model: Path, output: Path, batch: int) -> Recipe:
    """Eight steps over 22 rows, four a step: the last step of an epoch has two."""
    return check_recipe(
        {
            "model": str(model),
            "method": {"name": "sorsa", "r": 4},
            "data": {
                "train": {"source": "arithmetic", "limit": 22},
                "eval": {"source": "arithmetic", "split": "test", "limit": 5},  # its last batches are filled up
                "prompt": "question",
                "completion": "solution",
                "max_length": 256,
            },
            "training": {
                "max_steps": 8,
                "batch_size": batch,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_steps": 3,
                "keep_checkpoints": 9,
            },
            "output": {"dir": str(output)},
        }
    )


def launch(
    run: Recipe, *words: str, program: Callable[[], None] = programs.svdtune, **environment: str
) -> launching.Done:
    """`svdtune train` of a recipe by two processes."""
    path = write(run)
    return launching.launch(2, program, ["train", str(path), *words], path.with_suffix(".logs"), **environment)


def write(run: Recipe) -> Path:
    """A recipe's file, beside its run's folder."""
    path = Path(f"{run.output.dir}.yaml")
    path.write_text(dump_recipe(run))
    return path


def check_same_run(folder: Path, expected: Path, atol: float = 1e-5) -> None:
    """Compare logs and adapters of two finished runs."""
    *lines, (got, line) = zip(log_of(folder), log_of(expected), strict=True)
    assert got["eval_loss"] == pytest.approx(line["eval_loss"], abs=atol)
    for got, line in lines:
        # Transformers 4 counts an epoch by the batches of a process, filled up or not.
        epoch = () if TRANSFORMERS_4 else ("epoch",)
        for key in ("step", *epoch, "loss", "grad_norm", "learning_rate"):
            assert got[key] == pytest.approx(line[key], abs=atol), key
        assert got["l_reg"] == pytest.approx(line["l_reg"], abs=10 * atol)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    others = load_file(expected / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=atol)


def back_to(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was when it had taken so many steps."""
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    for later, checkpoint in sealed_checkpoints(copy).items():
        if later > step:
            discard(checkpoint)
    (copy / "training.json").unlink()
    return copy


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(recipe(tiny_folder, folder, 4))
    return folder


def test_two_processes_make_the_run_of_one_and_one_goes_on_from_theirs(
    alone: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    done = launch(recipe(tiny_folder, tmp_path / "two", 2))
    assert not done.failed, done.stderr
    assert done.stdout.count("trained 8 steps") == 1
    assert len(re.findall("^data ", done.stderr, re.MULTILINE)) == 2  # what is trained on, and what is held out
    check_same_run(tmp_path / "two", alone)
    assert all(fault(checkpoint) is None for checkpoint in sealed_checkpoints(tmp_path / "two").values())
    resumed = back_to(tmp_path / "two", 3, tmp_path / "resumed")
    with pytest.raises(SvdtuneError, match="took 4 rows of data a step, and would take 2: "):
        train(recipe(tiny_folder, resumed, 2), resume=True)
    train(recipe(tiny_folder, resumed, 4), resume=True)
    check_same_run(resumed, alone)


@pytest.mark.slow
def test_torchrun_makes_the_run_of_one_process(alone: Path, tiny_folder: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = write(recipe(tiny_folder, tmp_path / "run", 2))
    subprocess.run([*torchrun, "-m", "svdtune", "train", str(path)], check=True)
    check_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_sharded_processes_go_on_from_one_and_leave_the_run_of_one(
    alone: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = back_to(alone, 3, tmp_path / "sharded")
    done = launch(recipe(tiny_folder, folder, 2), "--resume", program=programs.sharded_on_cpu, **FSDP2)
    assert not done.failed, done.stderr
    check_same_run(folder, alone)
    resumed = back_to(folder, 6, tmp_path / "resumed")
    train(recipe(tiny_folder, resumed, 4), resume=True)
    check_same_run(resumed, alone)
    merged = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run / "adapter").merge_and_unload()
        for run in (folder, alone)
    ]
    for one, other in zip(*(model.parameters() for model in merged), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_killed_process_ends_the_others_with_one_sentence_and_a_run_to_go_on_from(
    alone: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    done = launch(
        recipe(tiny_folder, tmp_path / "run", 2), program=programs.with_an_odd_process, ODD_PROCESS="SIGKILL 5"
    )
    assert done.failed
    assert done.stderr.count("svdtune: ") <= 1  # none, where the launcher's own signal came first
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert list(sealed_checkpoints(tmp_path / "run").values()) == [checkpoint]
    assert fault(checkpoint) is None
    train(recipe(tiny_folder, tmp_path / "run", 4), resume=True)
    check_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("when", ["start", pytest.param("end", marks=pytest.mark.slow)])
def test_what_the_main_process_cannot_write_ends_all_with_its_sentence(
    tiny_folder: Path, tmp_path: Path, when: str
) -> None:
    path = write(recipe(tiny_folder, tmp_path / "run", 2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = [
        new_process.start(programs.end_of_a_run_on_a_full_disk, path, when, RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in ("0", "1")
    ]
    first, second = (process.result() for process in started)
    assert re.fullmatch("process 0 of 2: cannot write .*: the disk is full; free or name another place .*", first)
    assert second == first


def test_all_processes_stop_after_the_same_step_when_one_is_told_to(tiny_folder: Path, tmp_path: Path) -> None:
    done = launch(
        recipe(tiny_folder, tmp_path / "run", 2), program=programs.with_an_odd_process, ODD_PROCESS="SIGTERM 4"
    )
    assert done.failed
    assert done.stderr.count("svdtune: stopped after step 6, with a checkpoint") == 1
    assert max(sealed_checkpoints(tmp_path / "run")) == 6


@pytest.mark.slow
def test_a_4_bit_model_is_sharded(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig.from_pretrained(tiny_folder, hidden_size=64, intermediate_size=128, head_dim=16)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "model")
    train(recipe(tmp_path / "model", tmp_path / "one", 4))
    done = launch(recipe(tmp_path / "model", tmp_path / "two", 2), program=programs.sharded_on_cpu, **FSDP2)
    assert not done.failed, done.stderr
    check_same_run(tmp_path / "two", tmp_path / "one", atol=1e-3)  # it computes in bf16


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_makes_the_run_of_one_process(alone: Path, tiny_folder: Path, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    settings = json.loads((HERE.parents[1] / "configs" / "accelerate" / f"zero{stage}.json").read_text())
    del settings["torch_autocast"]  # in fp32, for comparing
    if stage == 3:  # partition even the smallest
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(settings))
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        "ACCELERATE_CONFIG_DS_FIELDS": "",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3),  # partitioned as it is loaded
        "DS_ACCELERATOR": "cpu",
    }
    run = recipe(tiny_folder, tmp_path / "run", 2)
    done = launch(run, **environment)
    assert not done.failed, done.stderr
    check_same_run(tmp_path / "run", alone)
    resumed = back_to(tmp_path / "run", 3, tmp_path / "resumed")
    with pytest.raises(SvdtuneError, match="was written under DeepSpeed by 2 processes"):
        train(recipe(tiny_folder, resumed, 4), resume=True)
    done = launch(recipe(tiny_folder, resumed, 2), "--resume", **environment)
    assert not done.failed, done.stderr
    check_same_run(resumed, alone)
