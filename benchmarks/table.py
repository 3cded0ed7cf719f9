"""The Markdown table of a results file of `step.py` or `decode.py`, as docs/performance.md shows
it.

python benchmarks/table.py benchmarks/results/step-llama-7b-h100.jsonl
"""

import json
import sys
from pathlib import Path

HEAD = """| | step, ms (spread) | over the floor | tokens/s | memory over the floor, GiB | trained | loss (step) |
|---|---|---|---|---|---|---|"""


def row(line: dict) -> str:
    """One contender of `step.py`; its loss is that of the last step that was written down."""
    if "error" in line:
        return f"| {line['contender']} | {line['error']} | | | | | |"
    low, high = (1000 * seconds for seconds in line["spread"])
    memory = line.get("memory_over_floor_gib")
    return (
        f"| {line['contender']} | {1000 * line['seconds']:.1f} ({low:.1f}–{high:.1f}) | {line['over_floor']:.3f} "
        f"| {line['tokens_per_second']:,.0f} | {'–' if memory is None else f'{memory:+.2f}'} "
        f"| {line['trained']:,} | {line['losses'][-1]:.4f} ({len(line['losses'])}) |"
    )


def main() -> None:
    """Print one row a contender."""
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    if "ms_per_token" in lines[0]:
        print("| | ms a token | over the base |\n|---|---|---|")
        for line in lines:
            print(f"| {line['contender']} | {line['ms_per_token']:.1f} | {line['over_base']:.2f} |")
        return
    print(HEAD)
    for line in lines:
        print(row(line))


if __name__ == "__main__":
    main()
