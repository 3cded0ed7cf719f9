"""The Markdown table of a results file of `step.py` or `decode.py`, as docs/performance.md shows
it.

python benchmarks/table.py benchmarks/results/step-llama-7b-h200.jsonl
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print one row a contender."""
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    if "ms_per_token" in lines[0]:
        print("| | ms a token | over the base |\n|---|---|---|")
        for line in lines:
            print(f"| {line['contender']} | {line['ms_per_token']:.1f} | {line['over_base']:.2f} |")
        return
    print("| | step, ms (spread) | over the floor | tokens/s | memory over the floor, GiB | trained | loss, step 16 |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        if "error" in line:
            print(f"| {line['contender']} | {line['error']} | | | | | |")
            continue
        low, high = (1000 * seconds for seconds in line["spread"])
        memory = line.get("memory_over_floor_gib")
        print(
            f"| {line['contender']} | {1000 * line['seconds']:.1f} ({low:.1f}–{high:.1f}) | {line['over_floor']:.3f} "
            f"| {line['tokens_per_second']:,.0f} | {'–' if memory is None else f'{memory:+.2f}'} "
            f"| {line['trained']:,} | {line['losses'][15]:.4f} |"
        )


if __name__ == "__main__":
    main()
