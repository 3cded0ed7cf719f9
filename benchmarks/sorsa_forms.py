"""SORSA, Figure 4: three ways to compute y = x Wᵀ + W_p's part, against the width of the layer.

    cd benchmarks
    python sorsa_forms.py run > results/sorsa-forms-cpu.jsonl
    python sorsa_forms.py draw results/sorsa-forms-cpu.jsonl ../docs/sorsa-forms.svg
    python sorsa_forms.py run --device cuda --tokens 8192 > results/sorsa-forms-gpu.jsonl

`formed` forms W_p = U diag(s) Vᵀ first (10·T·m·n of the authors' code), `diagonal` multiplies by a
matrix diag(s), and `scaled` scales U by s (Eq. 15), as svdtune does. Forward and backward.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

WIDTHS, RANK, REPEATS = (256, 512, 1024, 2048, 4096), 128, 5


def forms(U: Tensor, s: Tensor, V: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """x [tokens, n] → x W_pᵀ for U [m, r], s [r], V [n, r]."""
    return {
        "formed": lambda x: x @ ((U @ torch.diag(s)) @ V.mT).mT,
        "diagonal": lambda x: ((x @ V) @ torch.diag(s)) @ U.mT,
        "scaled": lambda x: (x @ V) @ (U * s).mT,
    }


def seconds(form: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The fastest of a few forward and backward passes, after one that does not count."""
    found = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        form(x).sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def run(device: str, tokens: int) -> None:
    """Print one line for each width and form."""
    machine = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    for width in WIDTHS:
        torch.manual_seed(0)
        U, V = (torch.randn(width, RANK, device=device, requires_grad=True) for _ in range(2))
        s = torch.rand(RANK, device=device, requires_grad=True)
        x = torch.randn(tokens, width, device=device, requires_grad=True)
        for name, form in forms(U, s, V).items():
            taken = seconds(form, x)
            line = {"form": name, "width": width, "rank": RANK, "tokens": tokens, "milliseconds": round(taken * 1e3, 3)}
            print(json.dumps(line | {"machine": machine, "torch": torch.__version__}), flush=True)


def draw(results: Path, output: Path) -> None:
    """Draw a file of `run`: milliseconds against width."""
    from svdtune.reports.figures import draw as drawn
    from svdtune.reports.figures import save
    from svdtune.reports.numbers import Lines, Series

    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    series = [
        Series(
            name,
            [one["width"] for one in lines if one["form"] == name],
            [one["milliseconds"] for one in lines if one["form"] == name],
        )
        for name in dict.fromkeys(one["form"] for one in lines)
    ]
    title = f"Forms of SORSA's product (Figure 4), rank {RANK}, {lines[0]['tokens']:,} tokens, {lines[0]['machine']}"
    save(drawn(Lines("sorsa-forms", title, "width of the layer", "milliseconds", series, "xy")), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    running.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    running.add_argument(
        "--tokens", type=int, default=256, help="rows of x; a GPU waits for its launches below some thousands"
    )
    drawing = verbs.add_parser("draw")
    drawing.add_argument("results", type=Path)
    drawing.add_argument("output", type=Path)
    given = parser.parse_args()
    if given.verb == "run":
        run(given.device, given.tokens)
    else:
        draw(given.results, given.output)


if __name__ == "__main__":
    sys.exit(main())
