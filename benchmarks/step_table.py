"""The table of docs/performance.md: `step.py` for every shape, rank and scenario, each in a process
of its own.

    python benchmarks/step_table.py --out step-table.jsonl          # a GPU with 80 GB
    python benchmarks/step_table.py --shape llama-1b smollm2-135m   # a part of it
    python benchmarks/step_table.py --shape tiny --device cpu --steps 3 --warmup 1

Prints one Markdown table, its rows as they are measured. What it does not know it hands to
`step.py`. 4 bits need bitsandbytes; without it these rows are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from table import HEAD, row

PLAIN = ("floor", "sorsa-delta", "sara-all", "lora")
NF4 = ("floor", "lora", "floor-nf4", "lora-nf4", "sorsa-delta-nf4", "sara-all-nf4", "mosara-qv-5-heads-nf4")
SECONDS = 240  # that one process may take


class Part(NamedTuple):
    """What one process measures."""

    shape: str
    r: int
    scenario: str = "eager"
    contenders: tuple[str, ...] = PLAIN


PARTS = (
    Part("llama-7b", 128),
    Part("llama-3-8b", 16),
    Part("llama-3b", 64),
    Part("llama-1b", 64),
    Part("llama-1b", 16),
    Part("llama-1b", 64, "compiled"),
    Part("llama-1b", 64, "packed"),
    Part("smollm2-135m", 64),
    Part("smollm2-135m", 64, "compiled"),
    Part("llama-7b", 64, "eager", NF4),
    *(Part("tiny", 16, scenario) for scenario in ("eager", "compiled", "packed")),
    Part("tiny", 16, "eager", NF4),
)


def measure(part: Part, words: list[str], file: Path) -> list[dict]:
    """The lines of one part; what a process that ended early had printed, and why it ended."""
    asked = ["--shape", part.shape, "--r", str(part.r), "--scenario", part.scenario, "--contenders", *part.contenders]
    command = [sys.executable, str(Path(__file__).with_name("step.py")), *asked, *words, "--out", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
    except subprocess.TimeoutExpired:
        why = f"took more than {SECONDS} s"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return lines + ([{"contender": "the rest", "error": why}] if why else [])


def main() -> None:
    """Run the parts and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = dict.fromkeys(part.shape for part in PARTS)
    parser.add_argument("--shape", nargs="+", choices=shapes, default=[shape for shape in shapes if shape != "tiny"])
    parser.add_argument("--scenario", nargs="+", help="of step.py; default: all that the table has")
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    arguments, words = parser.parse_known_args()
    print(HEAD, flush=True)
    for part in PARTS:
        left_out = part.contenders == NF4 and not find_spec("bitsandbytes")
        if (
            left_out
            or part.shape not in arguments.shape
            or part.scenario not in (arguments.scenario or [part.scenario])
        ):
            continue
        with tempfile.TemporaryDirectory(prefix="step-table-") as folder:
            lines = measure(part, words, Path(folder) / "lines.jsonl")
        print(f"| **{part.shape}, r = {part.r}, {part.scenario}** | | | | | | |", flush=True)
        for line in lines:
            print(row(line), flush=True)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
