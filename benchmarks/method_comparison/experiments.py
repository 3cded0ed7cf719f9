"""Entries for PEFT's method comparison (MetaMathQA → GSM8K, Llama-3.2-3B), in the folders that its
run.py takes.

    python benchmarks/method_comparison/experiments.py

writes them anew into experiments/ beside this file.
"""

import json
import shutil
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent / "experiments"
MODEL = "llama-3.2-3B"
QV = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}
# The comparison's own decay, 0.1, would draw SORSA's factors away from orthonormal, and with them
# the weight's own leading components to 0.
UNDECAYED = {"weight_decay": 0.0}
# (method, name, settings of its configuration, settings of the optimizer). The rates are those of
# the papers on 7 billion parameters (docs/guide.md), and three times as much: the guide's own best,
# on 0.135 billion, are ten times as high, and the model of 3 billion lies between.
TABLE: list[tuple[str, str, dict[str, Any], dict[str, float]]] = [
    ("sara", "threshold0.01", {"threshold": 0.01} | QV, {"lr": 1e-3}),
    ("sara", "rank32", {"r": 32} | QV, {"lr": 1e-3}),
    ("sara", "rank32-lr3e-3", {"r": 32} | QV, {"lr": 3e-3}),
    ("sara", "rank32-zero_v", {"r": 32, "init": "zero_v"} | QV, {"lr": 1e-3}),
    ("sara", "rank64", {"r": 64} | QV, {"lr": 1e-3}),
    ("sara", "rank16-all-linear", {"r": 16} | ALL, {"lr": 1e-3}),
    ("mosara", "threshold0.5-5-heads", {"threshold": 0.5, "num_heads": 5} | QV, {"lr": 3e-2}),
    ("mosara", "threshold1.0-1-head", {"threshold": 1.0, "num_heads": 1} | QV, {"lr": 3e-2}),
    ("sorsa", "rank32", {"r": 32} | QV, {"lr": 3e-5}),
    ("sorsa", "rank32-lr1e-4", {"r": 32} | QV, {"lr": 1e-4}),
    ("sorsa", "rank32-middle-lr1e-4", {"r": 32, "components": "middle"} | QV, {"lr": 1e-4}),
    ("sorsa", "rank64", {"r": 64} | QV, {"lr": 3e-5}),
    ("sorsa", "rank16-all-linear", {"r": 16} | ALL, {"lr": 3e-5}),
    ("sorsa", "rank128-all-linear", {"r": 128} | ALL, {"lr": 3e-5}),
]


def write(folder: Path) -> None:
    """Write every experiment below a folder, whose own are replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    for method, name, settings, optimizer in TABLE:
        experiment = folder / method / f"{MODEL}-{name}"
        experiment.mkdir(parents=True)
        decay = UNDECAYED if method == "sorsa" else {"weight_decay": 0.1}
        files = {
            "adapter_config.json": {"peft_type": method.upper(), "task_type": None} | settings,
            "training_params.json": {"optimizer_kwargs": optimizer | decay},
        }
        for file, content in files.items():
            (experiment / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(EXPERIMENTS)
