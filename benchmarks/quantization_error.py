"""How much less nf4 rounds a model whose principal part was taken out first (SORSA's split, as
QPiSSA), weight by weight.

    python benchmarks/quantization_error.py --model MODEL --rank 12 48 128 --out results.jsonl

For every matrix of the model's linear layers, with Q bitsandbytes' nf4 in blocks of 64 (dequantized
again) and P₀ V₀ᵀ the r leading singular triplets kept in fp32:

    plain  = ‖W − Q(W)‖        split = ‖W − (Q(W − P₀ V₀ᵀ) + P₀ V₀ᵀ)‖

`reduction` is 1 − Σ split / Σ plain over the matrices, in the nuclear norm (as the QPiSSA paper has
it) and the Frobenius norm. `bits` is what a weight takes on average, 4.5 for nf4 with fp32 block
scales and 32 bits for each entry of P₀ and V₀: the price. Prints one JSON line a rank, with the
least and the most of the layers.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from svdtune.linalg import top_factors

BLOCK = 64


def nf4(weight: Tensor) -> Tensor:
    """A weight quantized to nf4 and dequantized."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(codes, state)


def matrices(model: Path, least: int) -> list[tuple[str, Tensor]]:
    """The fp32 matrices of a model's folder that a linear layer may have: no embeddings, no side
    below `least`."""
    found = []
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith("weight") and "embed" not in name and "lm_head" not in name:
                    weight = file.get_tensor(name)
                    if weight.dim() == 2 and min(weight.shape) >= least:
                        found.append((name, weight.float()))
    return found


def norms(error: Tensor) -> tuple[float, float]:
    """(nuclear, Frobenius)."""
    return float(torch.linalg.matrix_norm(error, "nuc")), float(error.norm())


def measure(weights: list[tuple[str, Tensor]], rank: int) -> dict:
    """Sums over the weights, and the range over them."""
    plain, split = torch.zeros(2), torch.zeros(2)
    reductions, bits, entries = [], 0.0, 0
    for _, weight in weights:
        U, s, Vh = top_factors(weight, rank)
        principal = (U * s) @ Vh
        before = torch.tensor(norms(weight - nf4(weight)))
        after = torch.tensor(norms(weight - (nf4(weight - principal) + principal)))
        plain += before
        split += after
        reductions.append(float(1 - after[0] / before[0]))
        bits += weight.numel() * (4 + 32 / BLOCK) + 32 * rank * sum(weight.shape)
        entries += weight.numel()
    nuclear, frobenius = (1 - split / plain).tolist()
    return {
        "rank": rank,
        "weights": len(weights),
        "reduction_nuclear": round(nuclear, 4),
        "reduction_frobenius": round(frobenius, 4),
        "reduction_nuclear_of_weights": [round(min(reductions), 4), round(max(reductions), 4)],
        "bits": round(bits / entries, 2),
    }


def processor() -> str:
    """The processor's name where the system tells it; the numbers do not depend on it."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with safetensors files, not quantized")
    parser.add_argument("--rank", type=int, nargs="+", default=[12, 48, 128])
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    arguments = parser.parse_args()
    weights = matrices(arguments.model.expanduser(), max(arguments.rank))
    if not weights:
        parser.error(f"{arguments.model} holds no matrix with both sides of at least {max(arguments.rank)}")
    for rank in arguments.rank:
        line = {
            "model": arguments.model.name,
            "block": BLOCK,
            "torch": torch.__version__,
            "machine": processor(),
        }
        text = json.dumps(line | measure(weights, rank))
        print(text, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
