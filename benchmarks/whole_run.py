"""A whole run: `svdtune train` beside TRL's SFTTrainer with PEFT's LoRA, on the same rows, model
and card.

    python benchmarks/whole_run.py --out whole-run.jsonl  # every contender, 1B shapes
    python benchmarks/whole_run.py --shape llama-8b --r 16 --only svdtune-sorsa trl-lora-wrapped
    python benchmarks/whole_run.py --shape tiny --steps 12 --device cpu  # shows that it runs

Needs `pip install 'svdtune[train]'`, a tokenizer (`--tokenizer`, by default SmolLM2's) and rows
(`--rows`, JSONL with prompt and completion; by default SARA's math rows in $SVDTUNE_DATA, else
arithmetic). Random weights. Each contender has a process of its own and takes `--rows-a-step` rows
a step, or, where TRL packs, sequences of as many tokens. One JSON line each: real tokens a second
(padding does not count; the median over spans of five steps after the tenth), peak memory of the
steps (allocated, which leaves out what a CUDA graph keeps to itself, and reserved), seconds to the
first step. "wrapped" lets tokens see other rows and cuts rows apart; it is
TRL's fastest packing, and no exact one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEY_VALUE_HEADS = {"tiny": 2, "llama-1b": 4, "llama-8b": 8}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH = 512
EVERY, WARM = 5, 10  # steps from one log to the next, and steps that are not counted
# What TRL is given beyond the common arguments.
PACKED = {"packing": True}
WRAPPED = {"packing": True, "packing_strategy": "wrapped"}
LIGER, COMPILED = {"use_liger_kernel": True}, {"torch_compile": True}
TRL: dict[str, dict[str, Any]] = {
    "trl-lora-padded": {},
    "trl-lora-packed": PACKED,
    "trl-lora-packed-liger": PACKED | LIGER,
    "trl-lora-wrapped": WRAPPED,
    "trl-lora-wrapped-compiled": WRAPPED | COMPILED,
    "trl-lora-wrapped-liger": WRAPPED | LIGER,
    "trl-lora-wrapped-liger-compiled": WRAPPED | LIGER | COMPILED,
    "unsloth-lora-packed": PACKED,
    "unsloth-lora-wrapped": WRAPPED,
    "trl-sorsa-wrapped": WRAPPED,
    "trl-sorsa-wrapped-liger": WRAPPED | LIGER,
    "trl-sorsa-wrapped-liger-compiled": WRAPPED | LIGER | COMPILED,
}
# What a recipe says beyond the common settings.
SVDTUNE: dict[str, dict[str, Any]] = {
    "svdtune-sorsa": {},
    "svdtune-sara": {},
    "svdtune-lora": {},
    "svdtune-sorsa-packed": {"packing": True},
    "svdtune-sara-packed": {"packing": True},
    "svdtune-lora-packed": {"packing": True},
    "svdtune-sorsa-packed-compiled": {"packing": True, "compile": True},
    "svdtune-sara-packed-compiled": {"packing": True, "compile": True},
    "svdtune-lora-packed-compiled": {"packing": True, "compile": True},
    "svdtune-sorsa-packed-graph": {"packing": True, "compile": "graph"},
    "svdtune-sara-packed-graph": {"packing": True, "compile": "graph"},
    "svdtune-sorsa-packed-plain": {"packing": True, "liger": False},
    "svdtune-sorsa-padded": {"padding_free": False, "liger": False},
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--shape", choices=SHAPES, default="llama-1b")
    words.add_argument("--r", type=int, default=64)
    words.add_argument("--steps", type=int, default=40)
    words.add_argument("--rows-a-step", type=int, default=64)
    words.add_argument("--only", nargs="*", choices=[*SVDTUNE, *TRL])
    words.add_argument("--rows", type=Path)
    words.add_argument("--tokenizer", default="smollm2-135m")
    words.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    words.add_argument("--out", type=Path)
    words.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = words.parse_args()
    if arguments.one:
        name, folder = arguments.one
        run = run_svdtune if name in SVDTUNE else run_trl
        print("RESULT " + json.dumps(run(name, Path(folder), arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="whole-run-") as folder:
        prepare(Path(folder), arguments)
        for name in arguments.only or [*SVDTUNE, *TRL]:
            line = json.dumps(measure(name, folder, arguments))
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(line + "\n")


def measure(name: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender in a process of its own; what fails says why."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SVDTUNE_CACHE": "off"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    settings = {"name": name, "shape": arguments.shape, "r": arguments.r, "rows_a_step": arguments.rows_a_step}
    result = json.loads(found[-1].removeprefix("RESULT ")) if found else {"error": (done.stderr or done.stdout)[-1500:]}
    return {**settings, **result}


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """The model with random weights, its tokenizer, and the rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from svdtune.models.loader import locate

    here = Path(arguments.tokenizer).is_dir()  # a tokenizer's files are enough
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer if here else locate(arguments.tokenizer))
    config = LlamaConfig(
        **SHAPES[arguments.shape],
        num_key_value_heads=KEY_VALUE_HEADS[arguments.shape],
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for row in read(arguments.rows):
            file.write(json.dumps(row) + "\n")


def read(path: Path | None) -> list[dict[str, str]]:
    """Rows of prompt and completion."""
    from svdtune.data import read_rows

    if path is not None:
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in read_rows(path)]
    ours = Path(os.environ.get("SVDTUNE_DATA", "data"), "sara_math", "math_data.json")
    if ours.is_file():
        rows = json.loads(ours.read_text())
        return [{"prompt": row["instruction"] + "\n", "completion": row["output"]} for row in rows]
    return [{"prompt": row["question"], "completion": row["solution"]} for row in read_rows("arithmetic", limit=3000)]


def run_svdtune(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console

    from svdtune.training import check_recipe, train

    method = name.split("-")[1]
    alpha = {"lora_alpha": arguments.r} if method == "lora" else {}
    size = arguments.rows_a_step
    settings = {
        "model": {"name": str(folder / "model"), "dtype": "bfloat16"},
        "method": {"name": method, "r": arguments.r, "target_modules": LINEAR, **alpha},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH, "overlong": "drop"},
        "training": {
            "max_steps": arguments.steps,
            "batch_size": max(1, size // 4) if SVDTUNE[name].get("packing") else size,
            "learning_rate": 1e-4,
            "precision": "bf16",
            "logging_steps": EVERY,
            "save_steps": None,
            **SVDTUNE[name],
        },
        "output": {"dir": str(folder / name)},
    }
    clock = make_clock(lambda logs: logs.get("tokens_per_second") if "loss" in logs else None)
    started = time.monotonic()
    train(check_recipe(settings), console=Console(quiet=True), overwrite=True, callbacks=[clock])
    return result(clock, started)


def run_trl(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    if by_unsloth := name.startswith("unsloth"):
        import unsloth  # noqa: F401 - patches what is imported after it
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    import svdtune

    started = time.monotonic()
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    extra = TRL[name]
    size = arguments.rows_a_step
    # packed sequences of about as many tokens: the rows have some 100 each
    if extra.get("packing"):
        size = max(1, size // 4)
    if extra.get("packing_strategy") == "wrapped":
        rows = rows.map(lambda row: {"text": row["prompt"] + row["completion"]}).remove_columns(
            ["prompt", "completion"]
        )
    cuda = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=str(folder / name),
        max_steps=arguments.steps,
        per_device_train_batch_size=size,
        learning_rate=1e-4,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        logging_steps=EVERY,
        save_strategy="no",
        report_to="none",
        max_length=LENGTH,
        **extra,
    )

    class Counting(SFTTrainer):
        tokens: Any = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.tokens = self.tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *more)

    if "sorsa" in name:
        config: Any = svdtune.SorsaConfig(r=arguments.r, target_modules=LINEAR)
        callbacks: list[Any] = [svdtune.SorsaRegularizer()]
    else:
        config = LoraConfig(r=arguments.r, lora_alpha=arguments.r, target_modules=LINEAR, task_type="CAUSAL_LM")
        callbacks = []
    last = [time.monotonic(), 0]

    def speed(logs: dict[str, Any]) -> float | None:
        if "loss" not in logs:
            return None
        now, tokens = time.monotonic(), int(trainer.tokens)
        found = (tokens - last[1]) / (now - last[0])
        last[:] = now, tokens
        return found

    clock = make_clock(speed)
    if by_unsloth:
        model, config = unsloths_lora(folder / "model", arguments.r), None
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    trainer = Counting(
        model=model,
        args=args,
        train_dataset=rows,
        peft_config=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock, *callbacks],
    )
    trainer.train()
    return result(clock, started)


def unsloths_lora(folder: Path, rank: int) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=False, use_gradient_checkpointing=False
    )
    return FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=rank, target_modules=LINEAR, use_gradient_checkpointing=False
    )


def make_clock(speed: Callable[[dict[str, Any]], float | None]) -> Any:
    """A callback that notes when the first step ended, and the speed at each log, for which the
    loss is fetched and so the device is done.

    Args:
        speed: real tokens a second since the last log, from what is logged.
    """
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.first: float | None = None
            self.speeds: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.first is None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()  # of the steps, not of the start
                self.first = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            found = speed(logs)
            if found is not None and state.global_step > WARM:
                self.speeds.append(found)

    return Clock()


def result(clock: Any, started: float) -> dict[str, Any]:
    """The line of a contender."""
    import torch

    found: dict[str, Any] = {
        "tokens_per_second": round(statistics.median(clock.speeds)),
        "spread": [round(min(clock.speeds)), round(max(clock.speeds))],
        "seconds_to_first_step": round(clock.first - started, 2),
    }
    if torch.cuda.is_available():
        found |= {
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),  # with what CUDA graphs keep
            "device": torch.cuda.get_device_name(),
        }
    return found


if __name__ == "__main__":
    main()
