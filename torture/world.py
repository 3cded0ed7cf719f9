"""A tiny model, a recipe for it, and svdtune in processes that can be killed without paying for the
start of Python."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svdtune.cli import main
from svdtune.training.recipe import check_recipe, dump_recipe

STEPS = 12


@dataclass(frozen=True)
class Done:
    """How a process ended: its exit code (negative: the signal), and what it printed."""

    code: int
    printed: str


def make_model(folder: Path) -> Path:
    """A random Llama of two layers, with a tokenizer of bytes."""
    torch.manual_seed(0)
    tokens = ["<|end|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(vocab_size=len(tokens), max_position_embeddings=512, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(
        folder
    )
    return folder


def write_recipe(path: Path, model: Path, run: Path) -> Path:
    """A recipe of a dozen steps with dropout and a checkpoint every second step."""
    settings = {
        "model": str(model),
        "method": {"name": "sorsa", "r": 4, "dropout": 0.1},
        "data": {
            "train": {"source": "arithmetic", "limit": 64},
            "prompt": "question",
            "completion": "solution",
            "answer": "answer",
            "max_length": 256,
        },
        "training": {
            "max_steps": STEPS,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "keep_checkpoints": 1,
        },
        "output": {"dir": str(run)},
    }
    path.write_text(dump_recipe(check_recipe(settings)))
    return path


def start(words: Sequence[str | Path], printed: Path) -> int:
    """Start `svdtune WORDS` in a copy of this process, which has imported everything; returns its
    process id."""

    def run() -> None:
        sys.argv = ["svdtune", *map(str, words)]
        main()

    return start_call(run, printed)


def start_call(run: Callable[[], object], printed: Path) -> int:
    """Start a function in a copy of this process; returns its process id."""
    sys.stdout.flush()
    # until the child is where a user could be, in `main`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = os.fork()
    if child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return child
    # In the child, from which nothing may return.
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def wait(child: int, printed: Path, seconds: float | None = None, stop: int = signal.SIGKILL) -> Done:
    """Wait for a process; after `seconds`, if given, send it the signal `stop`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if found:
            return Done(os.waitstatus_to_exitcode(status), printed.read_text(errors="replace"))
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, stop)
            deadline = None
        time.sleep(0.002)


def call(words: Sequence[str | Path], printed: Path) -> Done:
    """Run `svdtune WORDS` to its end."""
    return wait(start(words, printed), printed)


def log_of(run: Path) -> list[dict[str, Any]]:
    """A run's log without what differs from one time to the next."""
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def result_of(run: Path) -> tuple[list[dict[str, Any]], bytes]:
    """What must not depend on how often a run was stopped: its log and its adapter, to the bit."""
    return log_of(run), (run / "adapter" / "adapter_model.safetensors").read_bytes()


def is_one_sentence(done: Done) -> bool:
    """Whether a refusal is what a user can read: exit code 2, one line of svdtune's, no
    traceback."""
    lines = [line for line in done.printed.splitlines() if line.startswith("svdtune: ")]
    return done.code == 2 and len(lines) == 1 and "Traceback" not in done.printed


def is_interrupted(done: Done) -> bool:
    """Whether a process ended as one does after Ctrl-C."""
    # Typer's own word
    return done.code == 130 or (done.code == 1 and done.printed.strip().endswith("Aborted!"))
