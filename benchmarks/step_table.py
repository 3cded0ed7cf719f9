"""The table of docs/performance.md: `step.py` for every shape, rank and scenario, each in a process
of its own.

    python benchmarks/step_table.py --out step-table.jsonl          # a GPU with 80 GB
    python benchmarks/step_table.py --list                          # the names of its parts
    python benchmarks/step_table.py --rows llama-1b-64-graph nf4    # a part or several
    python benchmarks/step_table.py --rows tiny --device cpu --steps 3 --warmup 1

Prints one Markdown table, its rows as they are measured. What it does not know it hands to
`step.py`. A row that cannot be measured here says why.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from table import HEAD, row

PLAIN = ("floor", "sorsa-delta", "sara-all", "lora")
IN_4_BITS = ("floor", "lora", "sorsa-delta", "sara-all", "mosara-qv-5-heads")
SECONDS = 240  # that one process may take


class Part(NamedTuple):
    """What one process measures."""

    shape: str
    r: int
    scenario: str = "eager"
    bits: str | None = None

    @property
    def name(self) -> str:
        """What `--rows` calls it."""
        return f"{self.shape}-{self.r}-{self.bits or self.scenario}"

    @property
    def contenders(self) -> tuple[str, ...]:
        """What `step.py` compares in it; a base in 4 bits beside the whole one."""
        return PLAIN if self.bits is None else ("floor", "lora", *(f"{name}-{self.bits}" for name in IN_4_BITS))


PARTS = (
    Part("llama-7b", 128),
    Part("llama-3-8b", 16),
    Part("llama-3-8b", 16, "compiled"),
    Part("llama-3b", 64),
    Part("llama-1b", 64),
    Part("llama-1b", 16),
    Part("llama-1b", 64, "packed"),
    *(Part("llama-1b", 64, scenario) for scenario in ("compiled", "graph", "packed-graph")),
    *(Part("smollm2-135m", 64, scenario) for scenario in ("eager", "compiled", "graph")),
    *(Part("llama-7b", 64, bits=bits) for bits in ("nf4", "int4")),
    *(Part("tiny", 16, scenario) for scenario in ("eager", "compiled", "packed", "graph", "packed-graph")),
    *(Part("tiny", 16, bits=bits) for bits in ("nf4", "int4")),
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
    parser.add_argument(
        "--rows", nargs="+", help="names of parts, or words that their names have in them; default: all but tiny"
    )
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    arguments, words = parser.parse_known_args()
    shapes = {part.shape for part in PARTS}
    asked = arguments.rows or sorted(shapes if arguments.list else shapes - {"tiny"})
    if unknown := [word for word in asked if not any(word in part.name for part in PARTS)]:
        sys.exit(f"--rows: no part has {', '.join(unknown)} in its name; --list names them")
    names = {part.name for part in PARTS}
    parts = [part for part in PARTS if any(word in part.name for word in asked if word not in names - {part.name})]
    if arguments.list:
        print("\n".join(part.name for part in parts))
        return
    print(HEAD, flush=True)
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="step-table-") as folder:
            lines = measure(part, words, Path(folder) / "lines.jsonl")
        print(f"| **{part.name}** | | | | | | |", flush=True)
        for line in lines:
            print(row(line), flush=True)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
