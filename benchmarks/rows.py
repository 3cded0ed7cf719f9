"""How long rows take from a file to tokens, the first time and the second: reading, the questions
that leaks are looked for among, and encoding.

    python benchmarks/rows.py                 # 100,000 rows of prompt and completion, and chats

Needs `pip install 'svdtune[train]'` and a tokenizer (`--tokenizer`, by default SmolLM2's). Worded
arithmetic, some 55 tokens a row, 125 as a chat of two turns of each, 245 as one of five. Each start
is a process of its own, with a cache that is empty before the first. Importing is not part of the
time: it does not depend on the rows. Prints one JSON line a format; "total" is by the clock, and
"processor" the seconds of all cores together, which other work on the machine changes less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHATS = {"chats of two turns": 2, "chats of five turns": 5}


def written(folder: Path, count: int) -> dict[str, Path]:
    """Files of `count` rows, by their format."""
    from svdtune.data import read_rows

    files: dict[str, list[Any]] = {"prompt and completion": [], **{name: [] for name in CHATS}}
    for row in read_rows("arithmetic", limit=count):
        asked, answer = row["question"], row["solution"]
        files["prompt and completion"].append({"prompt": asked, "completion": answer})
        for name, turns in CHATS.items():
            said = [("user", asked), ("assistant", answer)]
            said += [("user", "How many is that?"), ("assistant", answer)] * (turns - 1)
            files[name].append({"messages": [{"role": role, "content": text} for role, text in said]})
    paths = {}
    for name, rows in files.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def start(path: Path, tokenizer_name: str) -> dict[str, Any]:
    """Seconds of what a run does with its rows before its first step."""
    from rich.console import Console
    from transformers import AutoTokenizer

    from svdtune.training import check_recipe
    from svdtune.training.leaks import check_leaks
    from svdtune.training.task_rows import TaskRows

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    recipe = check_recipe(
        {
            "model": tokenizer_name,
            "method": {"name": "sorsa"},
            "data": {"train": str(path)},
            "training": {"learning_rate": 1e-4},
            "output": {"dir": "unused"},
        }
    )
    before = _processor_seconds()
    begun = time.perf_counter()
    source = TaskRows(recipe, recipe.data.train[0].plain)
    check_leaks(recipe, [source.questions], {}, Console(quiet=True))
    checked = time.perf_counter()
    rows = source.encode(tokenizer, Console(quiet=True))
    ended = time.perf_counter()
    processor = _processor_seconds() - before
    sizes = sum(len(row["input_ids"]) for row in rows[:1000]) / 1000
    return {
        "read_and_leaks": checked - begun,
        "encode": ended - checked,
        "total": ended - begun,
        "processor": processor,
        "tokens_a_row": sizes,
    }


def _processor_seconds() -> float:
    """Of this process, and of those that it started and that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    """Time two starts for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--format", help="One of the formats; all by default.")
    parser.add_argument("--tokenizer")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # one of the processes
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start, options.tokenizer)))
        return
    from svdtune.models.smollm2 import fetch_smollm2

    tokenizer = options.tokenizer or str(fetch_smollm2())
    with tempfile.TemporaryDirectory() as folder:
        for name, path in written(Path(folder), options.rows).items():
            if options.format not in (None, name):
                continue
            environment = {**os.environ, "SVDTUNE_CACHE": str(Path(folder, "cache"))}
            command = [sys.executable, __file__, "--tokenizer", tokenizer, "--start", str(path)]
            found = [
                json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(2)
            ]
            cores = len(os.sched_getaffinity(0))
            print(
                json.dumps(
                    {"format": name, "rows": options.rows, "cores": cores, "first": found[0], "second": found[1]}
                )
            )


if __name__ == "__main__":
    main()
