"""What many adapters on one SmolLM2-135M cost: memory, time to load, files, and a batch whose
samples have an adapter each against the same batch with one adapter.

    python benchmarks/many_adapters.py --kinds mosara --count 1000 --out many.jsonl  # svdtune[demo]
    python benchmarks/many_adapters.py --kinds lora --count 100 --out many.jsonl
    python benchmarks/many_adapters.py --count 1000 --device cuda

Each kind has a process of its own. Memory is what the adapters added to it: resident memory after
freed pages went back to the system, and on a GPU what PyTorch's allocator holds there. Mo-SARA's
adapters are compact files; they, SARA and SORSA are loaded by `svdtune.load_adapters`, PEFT's LoRA
by PEFT's `load_adapter`, whose time for one grows with those that are there. SARA, SORSA and LoRA
have r = 1 on Mo-SARA's layers, about as many trained numbers. Seconds are processor time where the
device is the CPU. The file of one adapter is written once and loaded under other names: what is in
it does not matter to any of these numbers.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from step import machine

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, load_adapters
from svdtune.models import SMOLLM2, load

CONFIGS = {
    "mosara": lambda: MoSaraConfig(threshold=0.5, num_heads=5, compact=True, task_type="CAUSAL_LM"),
    "sara": lambda: SaraConfig(r=1, task_type="CAUSAL_LM"),
    "sorsa": lambda: SorsaConfig(r=1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


def main() -> None:
    """Run every kind in a process of its own, or one of them in this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--count", type=int, default=1000, help="adapters")
    parser.add_argument("--batch", type=int, default=16, help="samples, each with an adapter of its own")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--repeats", type=int, default=5, help="of each step; the fastest counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(CONFIGS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    for kind in arguments.kinds:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        text = json.dumps(machine(arguments.device) | json.loads(done.stdout.splitlines()[-1]))
        print(text, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(text + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Load the adapters of one kind and run both batches."""
    torch.manual_seed(0)
    model = get_peft_model(load(SMOLLM2).model.to(arguments.device), CONFIGS[arguments.one]()).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.01 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
        names = [f"adapter{i}" for i in range(arguments.count)]
        before, begin = memory(arguments.device), now(arguments.device)
        if arguments.one != "lora":
            load_adapters(model, dict.fromkeys(names, folder))
            last = None
        else:
            for name in names:
                start = now(arguments.device)
                model.load_adapter(folder, name)
                last = now(arguments.device) - start
        seconds = now(arguments.device) - begin
        added = memory(arguments.device) - before
    tokens = torch.arange(arguments.batch * arguments.length, device=arguments.device).view(arguments.batch, -1)
    one = step(model, tokens, arguments)
    mixed = step(model, tokens, arguments, adapter_names=[names[i % len(names)] for i in range(len(tokens))])
    return {
        "kind": arguments.one,
        "count": arguments.count,
        "trained_numbers": numbers,
        "file_bytes": size,
        "memory_bytes": added,
        "load_seconds": round(seconds, 2),
        "last_load_seconds": None if last is None else round(last, 3),
        "batch": [arguments.batch, arguments.length],
        "step_one": round(one, 4),
        "step_mixed": round(mixed, 4),
    }


@torch.no_grad()
def step(model, tokens, arguments, **kwargs) -> float:
    """Seconds of a forward pass, the fastest of several."""
    found = []
    for _ in range(arguments.repeats):
        begin = now(arguments.device)
        model(input_ids=tokens, **kwargs)
        found.append(now(arguments.device) - begin)
    return min(found)


def now(device: str) -> float:
    """Processor time in seconds; on a GPU that of a clock, once all its work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str) -> int:
    """Bytes in use: resident memory, and what PyTorch's allocator holds on a GPU."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) * 1024
    return resident + (torch.cuda.memory_allocated() if device != "cpu" else 0)


if __name__ == "__main__":
    main()
