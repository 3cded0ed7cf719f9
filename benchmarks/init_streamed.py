"""Start a SORSA adapter for a model that is never there: random weights are made one by one as they
are read.

    python benchmarks/init_streamed.py --shape llama-70b --layers 1  # a 70B model's layer
    python benchmarks/init_streamed.py --hidden 256 --layers 80  # narrow, but as deep
    python benchmarks/init_streamed.py --shape llama-70b --layers 1 --out init-streamed.jsonl

Prints one JSON line (Linux only): the bytes that the model would take, the most memory that the
process held (VmHWM) beside what `svdtune plan` states for initialisation, what it held before the
first weight, the adapter's bytes and the seconds.
"""

import argparse
import hashlib
import json
import os
import platform
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import svdtune
from svdtune.checkpoint import Checkpoint, open_shape
from svdtune.methods.start.disk import start
from svdtune.planning import initialisation_bytes, plan


def made_up(name: str, shape: tuple[int, int]) -> Tensor:
    """A weight [out, in] in bf16 whose values follow from its name: 256 singular values as 1/√i,
    above noise."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    left = torch.randn(shape[0], 256, generator=generator) * (0.1 / torch.arange(1, 257).sqrt())
    right = torch.randn(shape[1], 256, generator=generator).mul_(0.1)
    for row in range(0, shape[0], 1024):
        weight[row : row + 1024] += (left[row : row + 1024] @ right.mT).bfloat16()
    return weight


def checkpoint(arguments: argparse.Namespace) -> Checkpoint:
    """A model on the meta device with a reader for every weight that makes it up on the spot."""
    if arguments.hidden:
        config = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=7 * arguments.hidden // 2,
            num_attention_heads=arguments.hidden // 32,
            num_hidden_layers=arguments.layers,
            dtype="bfloat16",
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    else:
        model = open_shape(arguments.shape, layers=arguments.layers).model
    readers = {name: partial(made_up, name, tuple(p.shape)) for name, p in model.named_parameters() if p.ndim == 2}
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    return Checkpoint(arguments.shape or f"hidden {arguments.hidden}", model, readers, size)


def held(what: str) -> int:
    """Bytes of this process by the kernel's account: VmHWM is the most so far, VmRSS what it holds
    now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    """Plan, start the adapter, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="of svdtune.checkpoint.SHAPES")
    parser.add_argument("--hidden", type=int, help="instead: a narrow model of this H, I = 3.5 H")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if (arguments.shape is None) == (arguments.hidden is None):
        parser.error("give --shape or --hidden")
    torch.set_num_threads(arguments.threads)
    os.environ["SVDTUNE_CACHE"] = "off"
    # PEFT still reads the name that transformers renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    opened = checkpoint(arguments)
    config = svdtune.SorsaConfig(r=arguments.r, target_modules="all-linear", task_type="CAUSAL_LM")
    planned = plan(opened, config)
    before = held("VmRSS")
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        made = start(opened, config, Path(folder, "adapter"))
        seconds = time.perf_counter() - began
        size = Path(made.adapter, "adapter_model.safetensors").stat().st_size
    line = {
        "model": opened.name,
        "layers": arguments.layers,
        "weights": len(planned.sites),
        "r": arguments.r,
        "model_gib": opened.bytes / 2**30,
        "adapter_gib": size / 2**30,
        "before_gib": before / 2**30,
        "peak_gib": held("VmHWM") / 2**30,
        "stated_gib": initialisation_bytes(planned, opened.model) / 2**30,
        "seconds": seconds,
        "threads": arguments.threads,
        "processor": platform.machine(),
        "torch": torch.__version__,
    }
    line = json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()})
    print(line)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
