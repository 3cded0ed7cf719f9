"""The memory that `svdtune plan` takes, beside the model it plans: a checkpoint of random weights,
planned in a new process.

    python benchmarks/plan_memory.py  # LLaMA-7B's shapes, four of its layers, on disk 2.1 GB
    python benchmarks/plan_memory.py --layers 8 --out plan.jsonl

Prints one JSON line (Linux only): the size of the model and of its largest weight, the most memory
the process held, what it held before it read any weight (Python, torch and transformers imported),
and the seconds it took, without a cache and with one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

# VmHWM, not ru_maxrss: a child begins with the latter at what its parent held.
MEASURE = """
import sys
from pathlib import Path
from svdtune.cli import main

def most_held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("VmHWM"))

before = most_held()
try:
    sys.argv = ["svdtune", *sys.argv[1:]]
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(before, most_held(), file=sys.stderr)
"""


def checkpoint(folder: Path, layers: int) -> dict[str, int]:
    """Write a LLaMA-7B-like model of some layers, a shard each, bf16; the bytes of the whole and of
    the largest weight."""
    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
    index, sizes = {}, []
    for number, names in enumerate(shards.values()):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: torch.randn(shapes[name]).bfloat16() for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
        sizes += [2 * shapes[name].numel() for name in names]
    weights = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    return {"model_bytes": sum(sizes), "largest_weight_bytes": max(sizes)}


def main() -> None:
    """Write the checkpoint, plan it twice, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        facts = checkpoint(model, arguments.layers)
        environment = os.environ | {
            "SVDTUNE_CACHE": str(Path(folder, "cache")),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(arguments.threads),
        }
        command = [sys.executable, "-c", MEASURE, "plan", str(model), "--method", "sara", "--threshold", "0.01"]
        for start in ("first", "second"):
            began = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            before, peak = done.stderr.split()[-2:]
            facts[f"{start}_start_seconds"] = round(time.perf_counter() - began, 2)
            facts[f"{start}_start_peak_mib"] = int(peak) // 1024
        facts["imported_mib"] = int(before) // 1024
    facts["target_mib"] = (4 * facts["largest_weight_bytes"] + 2**30) // 2**20
    line = json.dumps({"layers": arguments.layers, "threads": arguments.threads, "torch": torch.__version__} | facts)
    print(line)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
