"""What is written down of a run: one small JSON file, there once the run is done, and the study's
results made of them."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdtune._version import __version__
from svdtune.errors import SvdtuneError
from svdtune.evaluation import Evaluation
from svdtune.evaluation.predictions import PredictionStore
from svdtune.lab.study.grid import Job, file_name
from svdtune.lab.study.measurement import MEASURED
from svdtune.lab.study.results import RESULTS, pack, read_results
from svdtune.lab.study.spec import Study
from svdtune.system import read_objects, write_json
from svdtune.training.folder import LOG, SUMMARY
from svdtune.training.movement import DURING

_CURVE = 60  # points kept of a curve


NO_ROOM = 74  # the exit status of a run that a full disk ended, and which has no record


@dataclass(frozen=True)
class Place:
    """Where a run's files lie.

    Attributes:
        run: its folder.
        record: its record.
        log: what it printed.
        job: what it was to do.
        data: the start of the names of the files with held-out rows.
    """

    run: Path
    record: Path
    log: Path
    job: Path
    data: Path

    @classmethod
    def of(cls, job: Job, output: Path) -> "Place":
        """The places of a job's files below the output folder; held-out rows are shared by the jobs
        that hold out the same."""
        data = job.recipe["data"]
        parts = [[data.get(name) for name in ("train", "prompt", "completion")], job.heldout]
        held_out = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return cls(
            output / "runs" / job.name,
            output / "records" / f"{job.name}.json",
            output / "logs" / f"{job.name}.log",
            output / "jobs" / f"{job.name}.json",
            output / "data" / f"{file_name(job.task)}-{held_out}",
        )


def record_of(job: dict[str, Any], run: Path, scores: dict[str, Any], error: str | None = None) -> dict[str, Any]:
    """What a run came to: its scores by set, or the error that it failed with."""
    summary = json.loads((run / SUMMARY).read_text()) if (run / SUMMARY).is_file() else {}
    lines, measured = read_objects(run / LOG), read_objects(run / MEASURED)
    curve, norms = ([[line["step"], line[name]] for line in lines if name in line] for name in ("loss", "grad_norm"))
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    numbers = [loss for _, loss in curve] + held_out
    diverged = not all(math.isfinite(number) for number in numbers)
    status = "diverged" if diverged else "failed" if error else "finished"
    return {
        **{name: job[name] for name in ("key", "arm", "task", "budget", "phase", "seed", "learning_rate")},
        "method": {} if job["untrained"] else _short(job["recipe"]["method"]),
        "status": status,
        "error": error or ("the loss was not a number" if diverged else None),
        "trained_parameters": 0 if job["untrained"] else summary.get("trained_parameters"),
        "total_parameters": summary.get("total_parameters"),
        "steps": summary.get("steps"),
        "rows": summary.get("rows"),
        "loss": _finite(summary.get("loss")),
        "eval_loss": _finite(held_out[-1]) if held_out else None,
        "init_seconds": summary.get("init_seconds"),
        "train_seconds": _training_seconds(summary, measured),
        "saved_bytes": summary.get("saved_bytes"),
        "peak_bytes": measured[-1]["peak_bytes"] if measured else None,
        "curve": _thinned(curve),
        "grad_norms": _thinned(norms),
        "scores": scores,
        "movement": _movement(run),
        "measured": _measured(measured) if status == "finished" else None,
        "plans": job.get("plans", []),
        "machine": machine(),
    }


def scores_of(result: Evaluation) -> dict[str, Any]:
    """The score of a run on one set: strict accuracy where answers are right or wrong, else the
    task's first metric."""
    others = {name: metric.value for name, metric in result.metrics.items()}
    if result.strict is None and result.paper is None:
        first = next(iter(others))
        return {"metric": first, "value": others.pop(first), "n": result.n, "correct": None, "others": others}
    score, mode = (result.strict, "correct") if result.strict is not None else (result.paper, "paper_correct")
    assert score is not None
    if result.strict is not None and result.paper is not None:
        others["paper"] = result.paper.accuracy
    right = [bool(one[mode]) for one in read_objects(result.folder / PredictionStore.PREDICTIONS)]
    packed = pack(right) if len(right) == result.n else None
    others["unended"] = float(result.unended)
    return {"metric": "accuracy", "value": score.accuracy, "n": result.n, "correct": packed, "others": others}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record in one step: its presence says that the run is done."""
    write_json(path, record, "free some space; the same command goes on", indent=None)


def read_record(path: Path, key: str) -> dict[str, Any] | None:
    """The record of a run; None where there is none, or it is another run's or damaged, so that the
    run is made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def published(folder: Path) -> dict[str, dict[str, Any]]:
    """The records, by key, of the runs that did not fail in the `results.json` of the studies in a
    folder.

    Raises:
        SvdtuneError: there are none, or one of them cannot be read.
    """
    paths = sorted(folder.glob(f"*/{RESULTS}"))
    if not paths:
        raise SvdtuneError(f"{folder} has no published study: expected {RESULTS} in folders in it")
    found = {}
    for path in paths:
        read_results(path)
        results = json.loads(path.read_text(encoding="utf-8"))
        machines = results.get("machines") or [{}]
        for run in results["runs"]:
            if run["status"] != "failed":
                found[run["key"]] = run | {"machine": machines[run.get("machine", 0)]}
    return found


class KnownRuns:
    """The runs that were made before, whichever study made them.

    Args:
        output: the folder of runs and records.
        publications: a folder of published studies; None for none.
        retry: whether failed runs are to be made again.

    Raises:
        SvdtuneError: as `published`.
    """

    def __init__(self, output: Path, publications: Path | None = None, retry: bool = False) -> None:
        self.output, self.retry = output, retry
        self.published = {} if publications is None else published(publications)

    def find(self, job: Job) -> dict[str, Any] | None:
        """The record of a job, None where it is to be made. One that says that it failed counts
        where there is no other."""
        own = Place.of(job, self.output).record
        # Another study, or this one before an arm was renamed, may have made the run under another
        # name.
        paths = dict.fromkeys((own, *sorted(own.parent.glob(f"*-{job.key}.json"))))
        found = [record for path in paths if (record := read_record(path, job.key)) is not None]
        done = next((record for record in found if record["status"] != "failed"), None)
        failed = None if self.retry else next(iter(found), None)
        return done or self.published.get(job.key) or failed


def results_of(
    study: Study, models: dict[str, str], records: Iterable[dict[str, Any]], command: str, ranks: dict[str, Any]
) -> dict[str, Any]:
    """`results.json` of a study: its settings, by task the model and the ranks of its layers where
    arms train groups of them, the machines, and every run in the order of the study.

    Where there are several machines, a run's `machine` says which of them made it, counted from 0.
    """
    runs = [dict(record) for record in records]
    made_on = [run.pop("machine") for run in runs]
    machines = [one for at, one in enumerate(made_on) if one not in made_on[:at]]
    if len(machines) > 1:
        for run, one in zip(runs, made_on, strict=True):
            run["machine"] = machines.index(one)
    return {
        "title": study.title,
        "question": study.question,
        "baseline": study.baseline,
        "spec": study.model_dump(mode="json"),
        "models": models,
        **({"ranks": ranks} if ranks else {}),
        "svdtune": __version__,
        "command": command,
        "machines": machines,
        "runs": runs,
    }


def machine() -> dict[str, Any]:
    """The device and the versions that a number depends on."""
    import peft
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {"device": device, **versions}


def _training_seconds(summary: dict[str, Any], measured: list[dict[str, Any]]) -> float | None:
    """The time of the steps, without that of measuring; None of a resumed run, whose summary knows
    its last session alone."""
    seconds = None if measured and summary.get("resumed_from") else summary.get("train_seconds")
    return None if seconds is None else round(seconds - sum(line["seconds"] for line in measured), 3)


def _measured(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """By set and measure the means at every checkpoint, and at the last each item's value, in four
    digits."""
    if not lines:
        return None
    sets = {
        name: {
            measure: {
                "path": [_mean(line["sets"][name][measure]) for line in lines],
                "items": " ".join(f"{value:.4g}" for value in items),
            }
            for measure, items in measures.items()
        }
        for name, measures in lines[-1]["sets"].items()
    }
    left_out = {"left_out": found} if (found := lines[-1].get("left_out")) else {}
    return {"steps": [line["step"] for line in lines], "sets": sets, **left_out}


def _movement(run: Path) -> dict[str, Any] | None:
    """ΔΣ and ΔD, their means over the sampled layers, at the end and at every sample."""
    samples = read_objects(run / DURING)
    if not samples:
        return None
    means = [
        [sample["step"], *(_mean(layer[name] for layer in sample["layers"].values()) for name in _MOVED)]
        for sample in samples
    ]
    return {**dict(zip(_MOVED, means[-1][1:], strict=True)), "samples": means}


_MOVED = ("delta_sigma", "delta_d", "angle")


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(f"{sum(found) / len(found):.6g}")


def _thinned(curve: list[list[float]]) -> list[tuple[float, float | None]]:
    """At most `_CURVE` points, evenly spread, the first and the last among them; None where a value
    is not finite."""
    n = len(curve)
    kept = curve if n <= _CURVE else [curve[round(i * (n - 1) / (_CURVE - 1))] for i in range(_CURVE)]
    return [(step, _finite(value)) for step, value in kept]


def _short(method: dict[str, Any]) -> dict[str, Any]:
    """A method section without what has an entry for every layer: of a rank pattern the mean rank
    stays."""
    short = {name: value for name, value in method.items() if not name.endswith("_pattern")}
    if ranks := method.get("rank_pattern"):
        short["mean_rank"] = round(sum(ranks.values()) / len(ranks), 2)
    return short


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
