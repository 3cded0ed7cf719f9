"""Results of a made-up study, for the tests of tables, figures and pages."""

from typing import Any

import numpy as np

from svdtune.lab.study.results import Results, pack

SEEDS = (1, 2, 3)


def made_run(arm: str = "lora", seed: int = 1, rates: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    """A finished run whose items are right with the rates of its sets, by a generator of its arm
    and seed."""
    draw = np.random.default_rng([seed, *arm.encode()])
    scores = {}
    for name, rate in (rates if rates is not None else {"svamp": 0.4, "aqua": 0.2}).items():
        right = draw.random(120) < rate
        scores[name] = {
            "metric": "accuracy",
            "value": float(right.mean()),
            "n": 120,
            "correct": pack(right),
            "others": {},
        }
    run = {
        "key": f"{arm}{seed}",
        "arm": arm,
        "task": "math",
        "budget": 300_000,
        "phase": "final",
        "seed": seed,
        "learning_rate": 1e-3,
        "method": {"name": arm, "r": 8},
        "status": "finished",
        "error": None,
        "trained_parameters": 299_520,
        "total_parameters": 134_814_528,
        "steps": 100,
        "rows": 3260,
        "loss": 0.25 + seed / 100,
        "eval_loss": None,
        "train_seconds": 61.5,
        "curve": [[step, 2.0 / step + seed / 50] for step in (1, 10, 50, 100)],
        "scores": scores,
        "movement": None,
    }
    return run | changes


def broken(run: dict[str, Any], status: str, error: str | None) -> dict[str, Any]:
    """The run, failed or diverged."""
    return run | {"status": status, "error": error, "loss": None, "scores": {}, "curve": []}


def search(arm: str, losses: dict[float, float | None], **changes: Any) -> list[dict[str, Any]]:
    """Runs of a search; where the loss is None, the run diverged."""
    runs = [
        made_run(arm, 0, {}, phase="tune", learning_rate=rate, eval_loss=loss, **changes)
        for rate, loss in losses.items()
    ]
    return [
        run if run["eval_loss"] is not None else broken(run, "diverged", "the loss was not a number") for run in runs
    ]


def made_results(runs: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A study's results.json with these runs."""
    arms = {run["arm"]: {"method": {"name": "lora"}, "untrained": run["method"] is None} for run in runs}
    spec = {"tasks": {"math": "../recipes/math.yaml"}, "arms": arms, "seeds": list(SEEDS), "tune": {"share": 0.1}}
    machine = {"device": "NVIDIA H200", "torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"}
    head = {"title": "A study", "question": "Which is better?", "baseline": "lora", "spec": spec, "svdtune": "0.1.0"}
    return {**head, "command": "svdtune study studies/small/math.yaml", "machines": [machine], "runs": runs} | changes


def read(runs: list[dict[str, Any]], **changes: Any) -> Results:
    """The same, read."""
    return Results.model_validate(made_results(runs, **changes))


def whole_study() -> dict[str, Any]:
    """Two tasks, two budgets, and everything that can go wrong."""
    runs: list[dict[str, Any]] = [
        made_run("base", 1, method=None, budget=None, trained_parameters=0, learning_rate=None)
    ]
    for budget in (300_000, 2_400_000):
        size = {"budget": budget, "trained_parameters": budget - 480}
        for arm, rate in (("lora", 0.4), ("sara", 0.5), ("sorsa", 0.6)):
            runs += search(arm, {3e-4: 0.5, 1e-3: 0.4, 3e-3: None if arm == "sorsa" else 0.6}, **size)
            runs += [made_run(arm, seed, {"svamp": rate, "aqua": 0.2}, **size) for seed in SEEDS]
        runs += search("dora", {3e-4: 0.5, 1e-3: 0.4}, **size)
        runs += [broken(made_run("dora", seed, **size), "diverged", "the loss was not a number") for seed in (1, 2)]
        runs += [made_run("dora", 3, **size)]
        runs += search("pissa", {1e-3: None, 3e-3: None}, **size)
    runs += [made_run("full", seed, budget=None, trained_parameters=134_000_000) for seed in SEEDS[:2]]
    runs += [broken(made_run("full", 3, budget=None), "failed", "out of memory: | <b>")]
    for arm in ("lora", "sara"):
        bleu = {"metric": "BLEU", "n": 630, "correct": None, "others": {"NIST": 8.1}}
        runs += [
            made_run(arm, s, task="e2e", scores={"e2e": {**bleu, "value": 0.6 + s / (100 if arm == "lora" else 90)}})
            for s in SEEDS
        ]
    return made_results(runs)
