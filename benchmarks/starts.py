"""The start of stock LoRA on one decoder layer or several, PEFT's own beside svdtune's, in one run.

    python benchmarks/starts.py --shape tinyllama --threads 2 --out results.jsonl
    python benchmarks/starts.py --shape llama-7b --device cuda --repeat 3 --out results.jsonl
    python benchmarks/starts.py --shape llama-7b --device cuda --by svdtune --decoder-layers 32
    python benchmarks/starts.py --shape tiny                            # anything, in seconds

Prints one JSON line a start: `seconds` of `get_peft_model` on all linear layers of
`decoder_layers` layers (the median of `--repeat` runs), `layers` that the shape's model has,
`peak_gib` that it held beyond the model (on a CPU of resident memory), `cpu_seconds` of all
threads, which a busy machine leaves as they are with `--threads 1`, and against what is right

    sigma_error  the worst relative error of a singular value that A and B hold (PiSSA)
    difference   ‖c BA − c B₀A₀‖ / ‖c B₀A₀‖ from PEFT's own exact start, the worst layer's; for
                 MiCA of the projections B Bᵀ, for OSF of what it trains, U s Vᵀ

`disk` is `svdtune.starts.disk.start_lora` on the same layer saved in bf16, residual written. The
weights have LLaMA's spectrum (benchmarks/init.py) and random vectors.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from init import Bench, synthetic
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from svdtune import fast_starts
from svdtune.checkpoint import open_checkpoint
from svdtune.starts.disk import start_lora

# (hidden, intermediate, heads, key-value heads, layers)
SHAPES = {
    "tiny": (256, 704, 4, 2, 2),
    "tinyllama": (2048, 5632, 32, 4, 22),
    "llama-7b": (4096, 11008, 32, 32, 32),
    "llama-2-70b": (8192, 28672, 64, 8, 80),
}
WHO = ("PEFT", "svdtune", "disk")
STARTS = {
    "pissa": ("PEFT", "svdtune", "disk"),
    "pissa_niter_4": ("PEFT",),
    "pissa_niter_16": ("PEFT",),
    "olora": ("PEFT", "svdtune", "disk"),
    "mica": ("PEFT", "svdtune", "disk"),
    "osf": ("PEFT", "svdtune"),
}


def some_layers(shape: str, layers: int, device: str) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """A model of some decoder layers, and the singular values of its linear layers."""
    hidden, intermediate, heads, key_value_heads, _ = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=layers,
        vocab_size=128,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    values = {}
    for seed, (name, layer) in enumerate(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            layer.weight.data, values[name] = synthetic("llama", *layer.weight.shape, device, seed)
    return model, values


class ResidentPeak:
    """The most resident memory of this process beyond what it has on entering, in GiB; on Linux."""

    def __enter__(self) -> "ResidentPeak":
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.gib = _status("VmRSS"), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.gib = (_status("VmHWM") - self.before) / 2**20


def _status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def pairs(model: Any) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(layer, A, B, c) of an adapted model."""
    for name, layer in model.named_modules():
        if getattr(layer, "lora_A", None):
            A, B = (getattr(layer, f"lora_{part}")["default"].weight.detach().double() for part in "AB")
            yield name.removeprefix("base_model.model.model."), A, B, layer.scaling["default"]
        elif getattr(layer, "osf_svd_params", None):  # the triplets that OSF trains
            U, s, Vh = (layer.osf_svd_params["default"][f"{part}_low"].detach().double() for part in "USV")
            yield name.removeprefix("base_model.model.model."), Vh, U * s, 1.0


def sigma_error(model: Any, values: dict[str, Tensor]) -> float:
    """PiSSA's A and B hold √(σ/c) in the lengths of their rows and columns."""
    return max(
        float((c * A.norm(dim=1) * B.norm(dim=0) / values[name][: len(A)].to(A.device) - 1).abs().max())
        for name, A, B, c in pairs(model)
    )


def difference(model: Any, exact: Any) -> float:
    worst = 0.0
    for (_, A, B, _), (_, A0, B0, _) in zip(pairs(model), pairs(exact), strict=True):
        if not A0.any():
            A, A0 = B.mT, B0.mT
        # ‖BA − B₀A₀‖ from the small factors of [B, B₀] and [A; A₀]
        left, right = torch.linalg.qr(torch.cat([B, B0], 1)).R, torch.linalg.qr(torch.cat([A, -A0]).mT).R
        whole = torch.linalg.qr(B0).R @ torch.linalg.qr(A0.mT).R.mT
        worst = max(worst, float((left @ right.mT).norm() / whole.norm()))
    return worst


def measure(bench: Bench, given: argparse.Namespace) -> None:
    shape, r, layers = given.shape, given.r, given.decoder_layers
    model, values = some_layers(shape, layers, bench.device)
    with tempfile.TemporaryDirectory() as folder:
        if "disk" in given.by:
            copy.deepcopy(model).bfloat16().save_pretrained(Path(folder, "base"))
        for init in given.starts:
            exact = None
            for who in [who for who in STARTS[init] if who in given.by]:
                config: PeftConfig = LoraConfig(init_lora_weights=init, r=r, lora_alpha=r, target_modules="all-linear")
                if init == "osf":
                    config = OSFConfig(effective_rank=r, target_modules="all-linear")
                facts: dict[str, Any] = {"start": init, "by": who, "shape": shape, "r": r}
                facts |= {"decoder_layers": layers, "layers": SHAPES[shape][-1]}
                if who == "disk":
                    _, cost = timed(bench, partial(from_disk, Path(folder), config, bench.device))
                    bench.report(**facts, **cost)
                    continue
                block = fast_starts if who == "svdtune" else nullcontext
                made, cost = timed(bench, partial(started, model, config, block))
                exact = made if exact is None else exact
                if init.startswith("pissa"):
                    facts["sigma_error"] = sigma_error(made, values)
                if "PEFT" in given.by:
                    facts["difference"] = difference(made, exact) if made is not exact else 0.0
                bench.report(**facts, **cost)


def timed(bench: Bench, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of the last call, with seconds and the peak of memory, on a CPU of all calls."""
    if bench.device == "cuda":
        return bench.time(call)
    before = time.process_time()
    with ResidentPeak() as peak:
        made, cost = bench.time(call)
    calls = bench.repeat + (bench.repeat > 1)
    return made, cost | {
        "cpu_seconds": round((time.process_time() - before) / calls, 3),
        "peak_gib": round(peak.gib, 3),
    }


def started(model: nn.Module, config: PeftConfig, block: Callable[[], AbstractContextManager[Any]]) -> Any:
    with block():
        return get_peft_model(copy.deepcopy(model), copy.deepcopy(config))


def from_disk(folder: Path, config: LoraConfig, device: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        start_lora(open_checkpoint(folder / "base"), config, Path(output, "made"), device=device, progress=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--by", nargs="+", choices=WHO, default=WHO)
    parser.add_argument("--decoder-layers", type=int, default=1)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    measure(Bench(given.device, given.repeat, given.out), given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
