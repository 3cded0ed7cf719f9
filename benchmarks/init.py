"""The cost of starting an adapter: spectra, ranks and leading factors, beside torch's and PEFT's
own ways, in one run.

    python benchmarks/init.py --device cuda --out results.jsonl  # LLaMA-7B's shapes, whole models
    python benchmarks/init.py --device cpu --threads 2  # one 4096 × 4096 weight
    python benchmarks/init.py --device cpu --model path/to/SmolLM2-135M  # first and second start
    python benchmarks/init.py --n 512 --device cpu                           # anything, in seconds

Prints one JSON line a measurement. Synthetic weights have random singular vectors and one of two
spectra: "llama" has the ranks at 0.01, 0.09 and 0.5 that the papers imply for LLaMA-7B's q and v
(9, 107, 907 of 4096); "outlier" is a power law whose largest value is 60 times the 128th. `seconds`
is the median of `--repeat` runs after one that is not counted; `peak_gib` is the most that a call
held on the GPU beyond its inputs. Whole-model lines decompose every weight of the model, cycling
through a few distinct ones, with the cache off.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from svdtune.linalg import orthonormality_error, rank_at_threshold, safe_rank, settled_spectrum, spectrum, top_factors
from svdtune.spectra import factors, ranked_factors, ranks

THRESHOLDS = (0.01, 0.09, 0.5)


def spectrum_values(kind: str, n: int) -> Tensor:
    """Singular values [n], descending, float64."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    if kind == "llama":
        return torch.exp(-2.8 * (i / n) ** 0.8) + 0.8 * i**-0.5
    return 20 * i**-0.85 + 0.1 * torch.exp(-2 * i / n)


def synthetic(kind: str, out_features: int, in_features: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """(fp32 weight [out, in] on the device, its singular values)."""
    values = spectrum_values(kind, min(out_features, in_features))
    generator = torch.Generator(device).manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, device=device)).Q
        for size in (out_features, in_features)
    )
    return (U * values.to(device, torch.float32)) @ V.mT, values


class Bench:
    """Times calls and prints one JSON line each."""

    def __init__(self, device: str, repeat: int, out: Path | None) -> None:
        self.device, self.repeat, self.out = device, repeat, out
        name = torch.cuda.get_device_name() if device == "cuda" else _processor()
        self.machine = {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}

    def time(self, call: Callable[[], Any], repeat: int | None = None) -> tuple[Any, dict[str, float]]:
        """(the last result, seconds and peak memory)."""
        seconds, result, peak = [], None, 0.0
        repeat = self.repeat if repeat is None else repeat
        for attempt in range(repeat + (repeat > 1)):
            if self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            result = None
            start = time.perf_counter()
            result = call()
            if self.device == "cuda":
                torch.cuda.synchronize()
                peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            if attempt or repeat == 1:
                seconds.append(time.perf_counter() - start)
        return result, {"seconds": round(statistics.median(seconds), 5)} | (
            {"peak_gib": round(peak, 3)} if self.device == "cuda" else {}
        )

    def report(self, **facts: Any) -> None:
        """Print and append one line."""
        line = json.dumps(facts | self.machine, default=float)
        print(line, flush=True)
        if self.out:
            with self.out.open("a") as file:
                file.write(line + "\n")


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} cores)"
    return platform.processor() or platform.machine()


def bench_ranks(bench: Bench, kind: str, n: int, peers: bool) -> dict[str, float]:
    """Rank at each threshold of one n × n weight: safe_rank, the spectrum, svdvals and svd; seconds
    by method."""
    weight, _ = synthetic(kind, n, n, bench.device, seed=0)
    reference = torch.linalg.svdvals(weight.double())
    expected = {t: rank_at_threshold(reference, t) for t in THRESHOLDS}
    seconds = {}

    def report(method: str, measured: dict[str, float], **facts: Any) -> None:
        seconds[method] = measured["seconds"]
        bench.report(what="rank", spectrum=kind, shape=[n, n], method=method, **measured, **facts)

    for threshold in THRESHOLDS:
        k, measured = bench.time(lambda threshold=threshold: safe_rank(weight, threshold))
        report(f"safe_rank {threshold}", measured, k=k, k_float64=expected[threshold])
    found, measured = bench.time(lambda: spectrum(weight))
    error = float((found.values - reference.cpu()).abs().max() / reference[0])
    report("spectrum", measured, sigma_error=error, bound=found.error / found.total)
    if peers:
        for method, call in {
            "torch.linalg.svdvals": lambda: torch.linalg.svdvals(weight),
            "torch.linalg.svd": lambda: torch.linalg.svd(weight, full_matrices=False).S,
        }.items():
            values, measured = bench.time(call, repeat=1)
            ks = {str(t): rank_at_threshold(values.clamp_min(0), t) for t in THRESHOLDS}
            report(method, measured, k=ks, sigma_error=float((values - reference).abs().max() / reference[0]))
    return seconds


def bench_factors(
    bench: Bench, kind: str, out_features: int, in_features: int, r: int, peers: bool
) -> dict[str, float]:
    """The r leading triplets of one weight: top_factors, svd_lowrank, svd, and PEFT's two PiSSA
    starts; seconds by method."""
    weight, _ = synthetic(kind, out_features, in_features, bench.device, seed=1)
    gram = weight.double() @ weight.double().mT if out_features < in_features else weight.double().mT @ weight.double()
    reference = torch.linalg.eigvalsh(gram).flip(0)[:r].sqrt()
    best = float((reference**2).sum())
    seconds = {}

    def report(method: str, triplets: tuple[Tensor, Tensor, Tensor] | None, measured: dict[str, float]) -> None:
        seconds[method] = measured["seconds"]
        facts = {}
        if triplets is not None:
            U, s, Vh = triplets
            facts = {
                "sigma_error": float((s.double() / reference - 1).abs().max()),
                "captured": float(((U.mT @ weight).double() ** 2).sum()) / best,
                "orthonormality": max(float(orthonormality_error(M.double())) for M in (U, Vh.mT)),
            }
        bench.report(
            what="factors", spectrum=kind, shape=[out_features, in_features], r=r, method=method, **measured, **facts
        )

    report("top_factors", *bench.time(lambda: top_factors(weight, r)))
    if peers:
        (U, s, V), measured = bench.time(lambda: torch.svd_lowrank(weight, r, niter=16))
        report("torch.svd_lowrank(niter=16)", (U, s, V.mT), measured)
        (U, s, Vh), measured = bench.time(lambda: torch.linalg.svd(weight, full_matrices=False), repeat=1)
        report("torch.linalg.svd", (U[:, :r], s[:r], Vh[:r]), measured)
        for start in ("pissa_niter_16", "pissa"):
            _, measured = bench.time(
                lambda start=start: _pissa(weight, r, start), repeat=1 if start == "pissa" else None
            )
            report(f"PEFT {start}", None, measured)
    return seconds


def _pissa(weight: Tensor, r: int, start: str) -> None:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device))
    model[0].weight.data.copy_(weight)
    get_peft_model(model, LoraConfig(r=r, target_modules=["0"], init_lora_weights=start))


def bench_whole_model(bench: Bench, n: int, wide: int, layers: int, r: int, top: int) -> None:
    """SORSA, SARA and Mo-SARA on all the weights of a LLaMA-7B-like model, a few distinct ones in
    turn, without a cache."""
    square = [synthetic("llama", n, n, bench.device, seed)[0] for seed in range(4)]
    up = [synthetic("llama", wide, n, bench.device, seed)[0] for seed in range(2)]
    down = [weight.mT.contiguous() for weight in up]

    def cycle(pool: list[Tensor], count: int) -> Iterator[Tensor]:
        return (pool[i % len(pool)] for i in range(count))

    every = [*cycle(square, 4 * layers), *cycle(up, 2 * layers), *cycle(down, layers)]
    all_linear = {str(i): weight for i, weight in enumerate(every)}
    q_and_v = {str(i): weight for i, weight in enumerate(cycle(square, 2 * layers))}
    exact = [spectrum(weight) for weight in square]

    def drain(weights: dict[str, Tensor], rank: int) -> None:
        for _ in factors(weights, dict.fromkeys(weights, rank), progress=False):
            pass

    _, measured = bench.time(lambda: drain(all_linear, r), repeat=1)
    bench.report(what="model", method=f"SORSA r = {r}, {len(all_linear)} linears", **measured)
    copies = {id(weight): weight.cpu() for weight in (*square, *up, *down)}
    on_cpu = {name: copies[id(weight)] for name, weight in all_linear.items()}
    _, measured = bench.time(lambda: drain(on_cpu, r), repeat=1)
    bench.report(what="model", method=f"SORSA r = {r}, {len(all_linear)} linears, weights on the CPU", **measured)
    for threshold in THRESHOLDS[:2]:
        found, measured = bench.time(lambda t=threshold: ranks(q_and_v, t, progress=False), repeat=1)
        equal = all(k == rank_at_threshold(exact[i % 4], threshold) for i, k in enumerate(found.values()))
        bench.report(
            what="model", method=f"SARA k at {threshold}, {len(q_and_v)} weights", **measured, equal_float64=equal
        )
    _, measured = bench.time(lambda: drain(q_and_v, top), repeat=1)
    bench.report(what="model", method=f"Mo-SARA top {top}, {len(q_and_v)} weights", **measured)
    found, measured = bench.time(lambda: [len(f.s) for _, f in ranked_factors(q_and_v, 0.5, progress=False)], repeat=1)
    equal = all(k == rank_at_threshold(exact[i % 4], 0.5) for i, k in enumerate(found))
    method = f"Mo-SARA at 0.5, ranks and factors, {len(q_and_v)} weights"
    bench.report(what="model", method=method, **measured, equal_float64=equal)


def bench_real_model(bench: Bench, folder: Path) -> None:
    """Ranks of every linear of a real model against float64 SVDs, and the time of a first and a
    second start."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                if tensor.ndim == 2 and "embed" not in name and "lm_head" not in name:
                    weights[name] = tensor.to(bench.device)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SVDTUNE_CACHE"] = cache
        for start in ("first", "second"):
            _, measured = bench.time(lambda: ranks(weights, 0.01, progress=False), repeat=1)
            bench.report(what="start", model=folder.name, weights=len(weights), start=start, **measured)
        wrong = 0
        thresholds = (0.005, *(t / 100 for t in range(1, 96)))
        for weight in weights.values():
            reference = torch.linalg.svdvals(weight.double().cpu())
            known = spectrum(weight)
            for threshold in thresholds:
                known, k = settled_spectrum(weight, threshold, known)
                wrong += k != rank_at_threshold(reference, threshold)
        bench.report(
            what="ranks equal to float64 svdvals",
            model=folder.name,
            compared=len(weights) * len(thresholds),
            wrong=wrong,
        )
        os.environ["SVDTUNE_CACHE"] = "off"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--n", type=int, default=4096, help="size of the square weights")
    parser.add_argument("--r", type=int, default=128, help="rank of SORSA's factors")
    parser.add_argument("--top", type=int, default=None, help="rank of Mo-SARA's factors; n × 914 / 4096 unless given")
    parser.add_argument("--layers", type=int, default=32, help="layers of the whole model, on a GPU")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-peers", action="store_true", help="only svdtune's own routines")
    parser.add_argument("--whole-model", action="store_true", help="only the whole models, on a GPU")
    parser.add_argument("--model", type=Path, default=None, help="a folder with safetensors: measure it instead")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON lines here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    os.environ["SVDTUNE_CACHE"] = "off"
    bench = Bench(arguments.device, arguments.repeat, arguments.out)
    if arguments.model:
        bench_real_model(bench, arguments.model)
        return
    n, r, peers = arguments.n, arguments.r, not arguments.no_peers
    top = arguments.top or n * 914 // 4096
    wide = n * 43 // 16
    if arguments.device == "cuda":
        bench_whole_model(bench, n, wide, arguments.layers, r, top)
    if arguments.whole_model:
        return
    for kind in ("llama", "outlier"):
        bench_ranks(bench, kind, n, peers and kind == "llama")
        bench_factors(bench, kind, n, n, r, peers and kind == "llama")
        bench_factors(bench, kind, n, n, top, peers=False)
    if arguments.device == "cuda":
        bench_factors(bench, "llama", wide, n, r, peers)


if __name__ == "__main__":
    sys.exit(main())
