"""Sizes of saved adapters, whole and compact, what compact loading costs and gives back, and how
much memory a merge takes.

    python benchmarks/adapter_files.py sizes --out files.jsonl  # SmolLM2-135M: svdtune[demo]
    python benchmarks/adapter_files.py merge --out files.jsonl  # a random Llama, 1.1 GB

Each adapter is saved, then loaded in processes of their own: on one thread, as it was made, and on
two. `outputs` is the largest difference of the logits relative to the largest logit, 0 where they
agree bit for bit. The peak of a merge is that of its process, less what the imports take; it is
read from Linux's /proc.
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
from peft import PeftModel, get_peft_model
from step import machine
from transformers import LlamaConfig, LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.export import Source, merge
from svdtune.models import SMOLLM2, load

CONFIGS = {
    "sara threshold 0.01": lambda **kw: SaraConfig(threshold=0.01, **kw),
    "mosara threshold 0.5, 5 heads": lambda **kw: MoSaraConfig(threshold=0.5, num_heads=5, **kw),
    "sorsa r=16": lambda **kw: SorsaConfig(r=16, target_modules="all-linear", **kw),
    "sorsa r=64": lambda **kw: SorsaConfig(r=64, target_modules="all-linear", **kw),
}
TOKENS = torch.arange(100, 228).view(2, 64)


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["sizes", "merge", "load-one", "merge-one"])
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.part.endswith("-one"):
        print(json.dumps({"load-one": load_one, "merge-one": merge_one}[arguments.part](*arguments.paths)))
        return
    for line in {"sizes": sizes, "merge": merges}[arguments.part]():
        text = json.dumps(machine("cpu") | line)
        print(text, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(text + "\n")


def sizes():
    """Each adapter's bytes and seconds, whole and compact."""
    for name, config in CONFIGS.items():
        for compact in (False, True):
            with tempfile.TemporaryDirectory() as work:
                adapter = Path(work, "adapter")
                begin = time.perf_counter()
                model = get_peft_model(load(SMOLLM2).model, config(compact=compact, task_type="CAUSAL_LM")).eval()
                made = time.perf_counter() - begin
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter += 0.01 * parameter.abs().mean() * torch.randn_like(parameter)
                    torch.save(model(TOKENS).logits, Path(work, "logits.pt"))
                model.save_pretrained(adapter)
                del model
                threads = [own_process("load-one", adapter, Path(work, "logits.pt"), threads=n) for n in (1, 2)]
                yield {
                    "adapter": name,
                    "compact": compact,
                    "bytes": (adapter / "adapter_model.safetensors").stat().st_size,
                    "init_seconds": round(made, 2),
                    "load_seconds": round(threads[0]["seconds"], 2),
                    "outputs": threads[0]["outputs"],
                    "outputs_two_threads": threads[1]["outputs"],
                }


def load_one(adapter: Path, expected: Path) -> dict[str, float]:
    """Load an adapter and compare its logits with those of the process that saved it."""
    base = load(SMOLLM2).model
    begin = time.perf_counter()
    model = PeftModel.from_pretrained(base, adapter).eval()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        found, logits = model(TOKENS).logits, torch.load(expected)
    return {"seconds": seconds, "outputs": float((found - logits).abs().max() / logits.abs().max())}


def merges():
    """Peak memory of merging adapters of a model in two shards."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, vocab_size=32000
    )
    with tempfile.TemporaryDirectory() as work:
        model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(Path(work, "base"), max_shard_size="600MB")
        adapted = get_peft_model(model, SaraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapted.save_pretrained(Path(work, "adapter"))
        del model, adapted
        shards = [path.stat().st_size for path in Path(work, "base").glob("*.safetensors")]
        found = own_process("merge-one", Path(work, "base"), Path(work, "adapter"), threads=1)
        largest = config.vocab_size * config.hidden_size * 2
        yield {"checkpoint_bytes": sum(shards), "largest_shard": max(shards), "largest_weight": largest} | found


def merge_one(base: Path, adapter: Path) -> dict[str, float]:
    """Merge, and say how much memory that took beyond what was in use before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    begin = time.perf_counter()
    merge(Source(str(base), adapter), base.parent / "merged", check=False)
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 2), "peak_bytes": memory("VmHWM") - before, "imports_bytes": before}


def memory(field: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def own_process(part: str, *paths: Path, threads: int) -> dict[str, float]:
    """The result of a part in a process of its own."""
    command = [sys.executable, __file__, part, *map(str, paths)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
