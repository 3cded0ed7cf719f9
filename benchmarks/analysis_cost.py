"""What analysis costs: samples while SmolLM2-135M trains, `svdtune analyze` afterwards, and the
page of a model of 32 layers.

    python benchmarks/analysis_cost.py run --out analysis.jsonl  # svdtune[demo]; some minutes
    python benchmarks/analysis_cost.py page --out analysis.jsonl

`run` trains 19 steps with 20 samples of all q and v projections, with SORSA and fully. `page` makes
up every file of one run (224 layers, 20 samples): size of the page, and seconds to read the files
and write it.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step import machine

from svdtune.analysis import after, before, open_run, read_facts
from svdtune.reports import gather, render
from svdtune.system import read_objects
from svdtune.training import check_recipe, train
from svdtune.training.movement import DURING

TARGETS = ["q_proj", "v_proj"]
METHODS = {"sorsa": {"name": "sorsa", "r": 16, "target_modules": TARGETS}, "full": {"name": "full"}}


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "page"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, given.out.open("a", encoding="utf-8") as out:
        for line in (of_runs if given.part == "run" else of_page)(Path(folder)):
            print(line)
            out.write(json.dumps({**line, **machine("cpu")}) + "\n")


def of_runs(folder: Path) -> list[dict[str, Any]]:
    """Seconds of 20 samples, and of `svdtune analyze` without loading the model."""
    lines = []
    for name, method in METHODS.items():
        settings = {
            "model": "smollm2-135m",
            "method": method,
            "data": {"train": {"source": "arithmetic", "limit": 19}, "prompt": "question", "completion": "solution"},
            "training": {"max_steps": 19, "batch_size": 1, "learning_rate": 1e-4, "save_steps": None},
            "analysis": {"samples": 20, "modules": TARGETS, "max_share": None},
            "output": {"dir": str(folder / name)},
        }
        run = train(check_recipe(settings)).folder
        samples = read_objects(run / DURING)
        opened = open_run(run, TARGETS)
        began = time.perf_counter()
        before(opened)
        after(opened)
        lines.append(
            {
                "part": "run",
                "method": name,
                "layers": len(opened.layers),
                "samples": len(samples),
                "sampling_seconds": round(sum(sample["seconds"] for sample in samples), 1),
                "analyze_seconds": round(time.perf_counter() - began, 1),
            }
        )
    return lines


def of_page(folder: Path) -> list[dict[str, Any]]:
    """Bytes of a page and seconds to make it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "reports"))
    from made_runs import make_run

    run = make_run(folder / "run", {"name": "sorsa", "r": 128}, depth=32, samples=20)
    began = time.perf_counter()
    page = render(gather([read_facts(run)]))
    seconds = round(time.perf_counter() - began, 2)
    return [{"part": "page", "layers": 224, "samples": 20, "bytes": len(page.encode()), "seconds": seconds}]


if __name__ == "__main__":
    main()
