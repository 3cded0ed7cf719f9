"""The order of a study's runs: the search, then seed after seed of every arm, the two best rates of
each, until the time is up."""

from collections import Counter
from dataclasses import asdict
from itertools import count
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.lab.study.grid import Job
from svdtune.lab.study.records import Place, record_of, write_record
from svdtune.lab.study.results import Results, read_results
from svdtune.lab.study.runner import How, _Runner, run_studies
from svdtune.lab.study.spec import load_study

QV = ["q_proj", "v_proj"]
ARMS = {name: {"method": {"name": name, "r": 2, "target_modules": QV}} for name in ("lora", "sara", "sorsa")}
LOSS = {1e-3: 3.0, 3e-3: 1.0, 1e-2: 2.0}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, str]]:
    """The runs in the order in which they are made, each with its device; nothing trains."""
    found: list[tuple[Job, str]] = []

    def make(self: _Runner, job: Job, device: str) -> dict[str, Any]:
        found.append((job, device))
        described = {**asdict(job), "key": job.key}
        record = record_of(described, Path("none"), {}) | {"eval_loss": LOSS[job.learning_rate], "scores": {}}
        write_record(Place.of(job, self.output).record, record)
        return record

    monkeypatch.setattr(_Runner, "_make_on", make)
    return found


def run(write_study, how: How, **settings: Any) -> Results:
    tune = {"learning_rates": list(LOSS), "finish": 2}
    file = write_study(**{"arms": ARMS, "tune": tune, "seeds": [5, 6, 7], "generate": False} | settings)
    (path,) = run_studies({"study": load_study(file)}, Path("out"), how)
    return read_results(path)


def test_the_two_best_rates_of_each_arm_make_every_seed_round_by_round(write_study, made) -> None:
    run(write_study, How())
    order = [(job.phase, job.seed) for job, _ in made]
    assert order == [("tune", 0)] * 9 + [("final", seed) for seed in (5, 6, 7) for _ in range(6)]
    for start in (9, 15, 21):
        one_round = {(job.arm, job.learning_rate) for job, _ in made[start : start + 6]}
        assert one_round == {(arm, rate) for arm in ARMS for rate in (3e-3, 1e-2)}, "a whole table"
    assert {job.heldout for job, _ in made} == {(0.1, 0)}, "all with the rows held out that chose the rates"


def test_nothing_is_searched_where_every_candidate_makes_every_seed(write_study, made) -> None:
    run(write_study, How(), tune={"learning_rates": list(LOSS), "finish": 3}, seeds=[5])
    assert {(job.phase, job.seed) for job, _ in made} == {("final", 5)}
    assert Counter((job.arm, job.learning_rate) for job, _ in made) == {(arm, r): 1 for arm in ARMS for r in LOSS}


def test_a_dry_run_counts_the_runs_that_are_made(write_study, made) -> None:
    tune = {"learning_rates": list(LOSS), "finish": 2}
    file = write_study(arms=ARMS, tune=tune, seeds=[5, 6, 7], generate=False)
    said = CliRunner().invoke(app, ["study", str(file), "--dry-run", "--output", "out"]).stdout
    run(write_study, How())
    assert f"  {len(made)} runs\n" in said


@pytest.mark.parametrize("minutes", [0, None])
def test_when_the_time_is_up_no_run_starts_and_the_results_are_written(write_study, made, minutes) -> None:
    results = run(write_study, How(minutes=minutes))
    assert len(made) == (0 if minutes == 0 else 27)
    assert results.not_run == (18 if minutes == 0 else 0)
    before = len(made)
    assert run(write_study, How()).not_run == 0, "the same command goes on"
    assert len(made) == (27 if minutes == 0 else before)


def test_every_gpu_has_as_many_runs_at_once(write_study, made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight runs of which none ends before all have started are two on each of four GPUs."""
    record, all_there, started = _Runner._make_on, Barrier(8), count()

    def make(self: _Runner, job: Job, device: str) -> dict[str, Any]:
        if next(started) < 8:
            all_there.wait(60)
        return record(self, job, device)

    monkeypatch.setattr(_Runner, "_make_on", make)
    run(write_study, How(processes=8, gpus=("0", "1", "2", "3")))
    assert Counter(device for _, device in made[:8]) == {"0": 2, "1": 2, "2": 2, "3": 2}
