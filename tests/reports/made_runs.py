"""Run folders with made-up numbers in every file, as large as asked for: training them would take
hours."""

import json
import math
import random
from pathlib import Path
from typing import Any

from svdtune.training.recipe import check_recipe, dump_recipe

KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def make_run(
    folder: Path, method: dict[str, Any], *, depth: int = 4, kinds: int = 7, samples: int = 5, seed: int = 0
) -> Path:
    """Write a run of `depth` layers with `kinds` modules each, sampled `samples` times."""
    draw = random.Random(seed)
    names = {f"model.layers.{i}.{kind}": shape for i in range(depth) for kind, shape in list(KINDS.items())[:kinds]}
    folder.mkdir(parents=True)
    settings = {"model": "base", "method": method, "data": {"train": "arithmetic"}, "training": {"learning_rate": 1e-3}}
    recipe = check_recipe({**settings, "output": {"dir": "runs/one"}})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    trained = draw.randrange(10**5, 10**7)
    summary = {"method": method["name"], "trained_parameters": trained, "total_parameters": 7 * 10**9}
    _write(folder / "training.json", {**summary, "loss": 0.4321, "steps": 1000, "train_seconds": 123.456})
    steps = range(10, 1001, 10)
    log = [{"step": s, "loss": 2 / math.log(s + 3), "grad_norm": draw.uniform(0.1, 2)} for s in steps]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    for task in ("gsm8k-gsm8k", "math-math"):
        _write(folder / "evaluations" / task / "result.json", _result(draw))
    _write(folder / "analysis" / "before.json", {"thresholds": [0.1, 0.5, 0.9], "layers": _each(names, _before, draw)})
    if method.get("num_heads", 1) > 1:
        _write(folder / "analysis" / "routing.json", _routing(names, method["num_heads"], draw))
        return folder
    _write(folder / "analysis" / "after.json", {"layers": _each(names, _after, draw)})
    during = [
        {"step": round(1000 * i / (samples - 1)), "seconds": 1.0, "layers": _each(names, _movement, draw)}
        for i in range(samples)
    ]
    (folder / "analysis" / "during.jsonl").write_text("".join(json.dumps(s) + "\n" for s in during), encoding="utf-8")
    return folder


def _each(names: dict[str, tuple[int, int]], make: Any, draw: random.Random) -> dict[str, Any]:
    return {name: make(shape, draw) for name, shape in names.items()}


def _result(draw: random.Random) -> dict[str, Any]:
    correct = draw.randrange(20, 180)
    score = {
        "correct": correct,
        "accuracy": correct / 200,
        "interval": {"low": correct / 200 - 0.06, "high": correct / 200 + 0.06},
    }
    return {"task": "x", "n": 200, "strict": score, "paper": score, "metrics": {}, "settings": {}}


def _before(shape: tuple[int, int], draw: random.Random) -> dict[str, Any]:
    values = [[i, round(30 / i**0.5 + draw.random(), 6)] for i in sorted({round(1.2**j) for j in range(45)})]
    ranks = sorted(draw.randrange(10, 3000) for _ in range(3))
    return {"out": shape[0], "in": shape[1], "rank": 8, "k": ranks, "sum": 4000.5, "values": values}


def _movement(shape: tuple[int, int], draw: random.Random) -> dict[str, Any]:
    numbers = {name: draw.random() for name in ("delta_sigma", "delta_d", "relative_change")}
    errors = {"U": draw.random(), "V": draw.random()}
    return {
        **numbers,
        "angle": 90 * draw.random(),
        "k": 64,
        "p": 12,
        "condition": 9 * draw.random(),
        "orthonormality": errors,
    }


def _after(shape: tuple[int, int], draw: random.Random) -> dict[str, Any]:
    values = sorted((draw.random() for _ in range(32)), reverse=True)
    shares = sorted(draw.random() for _ in range(7))
    return {
        "out": shape[0],
        "in": shape[1],
        **_movement(shape, draw),
        "delta": {"values": values, "sum": 2 * sum(values), "stable_rank": 3.5, "effective_rank": 20.25},
        "energy": {"count": [1, 2, 4, 8, 16, 32, 64], "left": shares, "right": shares},
    }


def _routing(names: dict[str, tuple[int, int]], heads: int, draw: random.Random) -> dict[str, Any]:
    def one(shape: tuple[int, int], draw: random.Random) -> dict[str, Any]:
        weights = [draw.random() for _ in range(heads)]
        gate = [weight / sum(weights) for weight in weights]
        return {"gate": gate, "entropy": 0.75, "dominant": gate.index(max(gate)), "share": 0.5}

    tasks = {task: {"items": 8, "tokens": 1234, "layers": _each(names, one, draw)} for task in ("gsm8k", "math")}
    return {"heads": heads, "tasks": tasks}


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
