"""The runner: every run once, whatever interrupts it, and a table of results that hides nothing."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from made_results import made_results, made_run
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.evaluation import Evaluation
from svdtune.evaluation.interval import wilson_interval
from svdtune.evaluation.predictions import Prediction, PredictionStore
from svdtune.evaluation.scores import Score
from svdtune.lab.study import worker
from svdtune.lab.study.grid import Job, cells
from svdtune.lab.study.records import KnownRuns, Place, read_record, record_of, scores_of, write_record
from svdtune.lab.study.results import pack, read_results
from svdtune.lab.study.runner import How, _Runner, run_studies
from svdtune.lab.study.spec import load_study

QV = ["q_proj", "v_proj"]


def run(*files: Path, how: How | None = None) -> list[dict]:
    """The runs of one or more studies."""
    results = run_studies({file.stem: load_study(file) for file in files}, Path("out"), how or How())
    for path in results:
        read_results(path)  # what the page is made of is what was written
    return [found for path in results for found in json.loads(path.read_text())["runs"]]


def test_a_study_searches_then_runs_every_seed_and_scores_it(write_study) -> None:
    arms = {
        "lora": {"method": {"name": "lora", "target_modules": QV}},
        "sara": {"method": {"name": "sara", "target_modules": QV, "layers_to_transform": [0, 1]}},
        "base": {"untrained": True},
    }
    tune = {"learning_rates": [1e-3, 1e-2], "share": 0.25, "extend": 1}
    study = write_study(arms=arms, budgets=[600], tune=tune, seeds=[1, 2], baseline="lora")
    runs = run(study)
    finals = [found for found in runs if found["phase"] == "final"]
    assert [(found["arm"], found["seed"]) for found in finals] == [
        *(("lora", seed) for seed in (1, 2)),
        *(("sara", seed) for seed in (1, 2)),
        ("base", 1),
    ]
    for found in runs:
        assert found["status"] == "finished", found["error"]
        if found["phase"] == "final":
            assert set(found["scores"]) == {"svamp", "addsub"}
            assert found["scores"]["svamp"]["n"] == 3
            assert found["eval_loss"] is None
        else:
            assert found["eval_loss"] > 0
            assert found["scores"] == {}
            assert found["rows"] == 30
    for arm in ("lora", "sara"):
        searched = {f["learning_rate"]: f["eval_loss"] for f in runs if f["phase"] == "tune" and f["arm"] == arm}
        assert len(searched) == 3, "the best of two is at an edge, so there is a third"
        chosen = {found["learning_rate"] for found in finals if found["arm"] == arm}
        assert chosen == {min(searched, key=searched.get)}
        assert {found["trained_parameters"] <= 600 for found in finals if found["arm"] == arm} == {True}
    assert (finals[0]["loss"], finals[0]["curve"]) != (finals[1]["loss"], finals[1]["curve"])
    assert len(read_results(Path("out/study/results.json")).ranks["math"].k) == 2
    for found in finals:
        assert [step for step, norm in found["grad_norms"] if norm > 0] == [step for step, _ in found["curve"]]


def test_nothing_is_run_twice_not_even_for_another_study(write_study) -> None:
    first, second = write_study("first"), write_study("second", title="The same under another name")
    told: list[str] = []
    studies = {file.stem: load_study(file) for file in (first, second)}
    run_studies(studies, Path("out"), How(), told.append)
    assert len(told) == 1
    before = {path: path.stat().st_mtime_ns for path in Path("out/records").iterdir()}
    run_studies(studies, Path("out"), How(), told.append)
    assert len(told) == 1
    assert {path: path.stat().st_mtime_ns for path in Path("out/records").iterdir()} == before
    results = [json.loads(Path("out", name, "results.json").read_text()) for name in ("first", "second")]
    assert results[0]["runs"] == results[1]["runs"]


def test_a_run_that_was_made_under_another_name_is_not_made_again(write_study) -> None:
    method = {"method": {"name": "lora", "r": 2, "target_modules": QV}}
    run(write_study("first", arms={"lora": method}))
    before = [path.name for path in Path("out/records").iterdir()]
    (found,) = run(write_study("second", arms={"LoRA, renamed": method}))
    assert found["arm"] == "LoRA, renamed"
    assert [path.name for path in Path("out/records").iterdir()] == before


@pytest.mark.slow
def test_a_run_that_two_arms_share_is_made_once_and_stands_for_both(write_study) -> None:
    method = {"method": {"name": "lora", "r": 2, "target_modules": QV}}
    runs = run(write_study(arms={"one": method, "two": method}, tune={"learning_rates": [1e-3, 1e-2]}))
    assert [(found["arm"], found["phase"]) for found in runs] == [
        (arm, phase) for arm in ("one", "two") for phase in ("tune", "tune", "final")
    ]
    assert len(list(Path("out/records").iterdir())) == 3


def test_a_run_that_failed_in_scoring_keeps_the_weights_it_is_scored_with_later(write_study, monkeypatch) -> None:
    (cell,) = cells(*load_study(write_study()))
    (job,) = cell.finals([1e-3], [1])
    place = Place.of(job, Path("out"))
    described = {
        **asdict(job),
        "key": job.key,
        "name": job.name,
        "eval_batch_size": 4,
        "drop_weights": True,
        "shared": True,
    }

    def too_large(*_) -> None:
        raise SvdtuneError("out of memory with 4 completions at once")

    with monkeypatch.context() as patched:
        patched.setattr(worker, "_score", too_large)
        worker._run(described, place)
    assert read_record(place.record, job.key)["status"] == "failed"
    worker._run(described, place)
    assert read_record(place.record, job.key)["status"] == "finished"
    assert not (place.run / "adapter").exists()


def test_a_run_whose_record_and_weights_are_gone_is_trained_again(write_study) -> None:
    study = write_study()
    run(study, how=How(drop_weights=True))
    (record,) = Path("out/records").iterdir()
    record.write_text('{"key": "cut o')
    (found,) = run(study, how=How(drop_weights=True))
    assert found["status"] == "finished", found["error"]


@pytest.mark.slow
def test_failed_and_diverged_runs_are_in_the_results_and_are_retried_on_request(write_study) -> None:
    arms = {
        "too long": {
            "method": {"name": "lora", "r": 2, "target_modules": QV},
            "settings": {"data": {"max_length": 8, "overlong": "drop"}},
        },
        "too fast": {
            "method": {"name": "lora", "r": 2, "lora_alpha": 10**38, "target_modules": QV},
            "settings": {"training": {"learning_rate": 1e6, "schedule": "constant", "max_grad_norm": 0.0}},
        },
    }
    failed, diverged = run(write_study(arms=arms))
    assert failed["status"] == "failed"
    assert "max_length" in failed["error"]
    assert failed["scores"] == {}
    assert diverged["status"] == "diverged"
    records = sorted(Path("out/records").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    stamps = {path.name: path.stat().st_mtime_ns for path in records}
    run(Path("study.yaml"), how=How(retry=True))
    again = {path.name for path in Path("out/records").iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
    assert len(again) == 1
    assert "too_long" in again.pop()


def test_an_arm_that_no_learning_rate_suits_has_failed_final_runs(write_study) -> None:
    short = {"data": {"max_length": 8, "overlong": "drop"}}
    arms = {
        "lora": {"method": {"name": "lora", "r": 2}, "settings": short},
        "as lora": {"method": {"name": "lora", "r": 1}, "tuned_as": "lora"},
    }
    runs = run(write_study(arms=arms, tune={"learning_rates": [1e-3, 1e-2]}, seeds=[1]))
    assert [(found["phase"], found["status"]) for found in runs] == [("tune", "failed")] * 2 + [("final", "failed")] * 2
    assert runs[-1]["error"].startswith(
        "no learning rate of 0.001, 0.01 came to a loss; the last one: no example is left"
    )
    dry = ["study", "study.yaml", "--dry-run", "--output", "out"]
    said = CliRunner().invoke(app, dry).stdout
    assert "2 + 1 runs, 2 failed (--retry makes them again)\n" in said
    assert "0 + 1 runs\n  4 runs, 2 failed" in said  # final runs that nobody tried
    assert "failed" not in CliRunner().invoke(app, [*dry, "--retry"]).stdout


@pytest.mark.real_workers
def test_a_killed_process_is_a_failed_run_and_says_where_its_log_is(write_study, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path("broken").absolute()))
    Path("broken").mkdir()
    Path("broken/sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (found,) = run(write_study())
    assert found["status"] == "failed"
    assert found["error"].startswith("its process ended with signal 9; see out/logs/math-lora")


def test_a_run_without_memory_beside_others_is_made_again_and_then_gets_a_gpu_to_itself(
    write_study, monkeypatch
) -> None:
    arms = {"lora": {"method": {"name": "lora"}, "grid": {"method.r": [1, 2, 3]}}}
    together = threading.Barrier(3)

    def make(self: _Runner, job: Job, device: str) -> dict:
        described = {**asdict(job), "key": job.key}
        crowded = job.key not in self.alone
        if crowded:
            together.wait()
        else:
            assert len(self.running) == 1
        error = "out of memory on the GPU (9 GiB in use at most)" if crowded or job.recipe["method"]["r"] == 3 else None
        place = Place.of(job, self.output)
        write_record(place.record, record_of(described, place.run, {}, error))
        return read_record(place.record, job.key)

    monkeypatch.setattr(_Runner, "_make_on", make)
    told: list[str] = []
    study = load_study(write_study(arms=arms))
    run_studies({"study": study}, Path("out"), How(processes=3, gpus=("0",)), told.append)
    runs = json.loads(Path("out/study/results.json").read_text())["runs"]
    assert [found["status"] for found in runs] == ["finished", "finished", "failed"]
    later = [line.rpartition("; ")[2] for line in told if line.startswith("later: math-lora")]
    assert later == ["it will be made again"] * 3 + ["it will have a GPU to itself"] * 3


def test_a_folder_that_cannot_be_written_stops_the_study_in_a_sentence(write_study) -> None:
    study = write_study()
    Path("out").mkdir()
    Path("out/records").write_text("in the way")
    with pytest.raises(SvdtuneError, match="cannot write out: a part of that path is a file; the same command"):
        run(study)
    Path("out/records").unlink()
    (found,) = run(study)
    assert found["status"] == "finished"


def test_a_model_or_data_that_is_not_there_is_said_once_before_any_run(write_study) -> None:
    with pytest.raises(SvdtuneError, match="there is no model at nowhere/to/be/found: expected a Transformers folder"):
        run(write_study(settings={"model": "nowhere/to/be/found"}))
    Path("data/sara_math/math_data.json").rename("gone.json")
    study = write_study()
    with pytest.raises(SvdtuneError, match=r"sara_math \(train\) is not in the data folder"):
        run(study)
    assert not Path("out/jobs").exists()


def test_one_runner_a_folder(write_study) -> None:
    import fcntl

    study = write_study()
    Path("out").mkdir()
    with Path("out/.svdtune.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SvdtuneError, match=r"out is in use by another process\. Wait until that has ended"):
            run(study)


def test_an_arm_may_take_anothers_learning_rate_and_ranks_by_layer(write_study) -> None:
    arms = {
        "sorsa": {"method": {"name": "sorsa", "target_modules": QV}},
        "random": {"method": {"name": "sorsa", "target_modules": QV}, "ranks": "random", "tuned_as": "sorsa"},
    }
    tune = {"learning_rates": [1e-4, 1e-2]}
    study, tasks = load_study(write_study(arms=arms, budgets=[900], tune=tune, seeds=[1, 2]))
    sorsa, drawn = cells(study, tasks)
    assert (sorsa.searched, drawn.searched, drawn.like) == (True, False, sorsa)
    patterns = [tuple(job.recipe["method"]["rank_pattern"].values()) for job in drawn.finals([1e-2], [1, 2, 3, 4, 5])]
    assert len(set(patterns)) > 1, "the ranks are dealt out anew with each seed"
    assert len({tuple(sorted(pattern)) for pattern in patterns}) == 1


def start(study: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "from svdtune.cli import main; main()", "study", str(study), "--output", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_runner_goes_on_and_ends_as_one_that_was_not(write_study, number: int) -> None:
    arms = {"lora": {"method": {"name": "lora", "target_modules": QV, "r": 1}}}
    study = write_study(arms=arms, tune={"learning_rates": [1e-3, 1e-2]}, seeds=[1, 2])
    whole = run(study)
    Path("out").rename("whole")
    known = 0
    for _ in range(40):
        process = start(study)
        records = Path("out/records")
        while process.poll() is None and (len(list(records.glob("*.json"))) if records.is_dir() else 0) <= known:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(number)
        process.communicate()
        before = known
        known = len(list(records.glob("*.json")))
        stamps = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
        if process.returncode == 0:
            break
        assert known > before
    assert process.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in records.glob("*.json")} == stamps
    found = json.loads(Path("out/study/results.json").read_text())["runs"]
    timing = {"train_seconds", "init_seconds", "seconds"}
    strip = lambda runs: [{key: value for key, value in one.items() if key not in timing} for one in runs]  # noqa: E731
    assert strip(found) == strip(whole)


def test_the_verb_describes_and_refuses(write_study) -> None:
    result = CliRunner().invoke(app, ["study", str(write_study()), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "math · lora: name lora, r 2" in result.stdout
    assert "1 runs" in result.stdout
    bad = write_study(arms={"lora": {"metod": {}}}, baseline="dora")
    result = CliRunner().invoke(app, ["study", str(bad)])
    assert result.exit_code == 2
    assert "arms.lora.metod: unknown setting; did you mean method?" in result.stderr


def test_records_of_other_runs_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert read_record(path, "abc") is None
    path.write_text('{"key": "abc", "status"')
    assert read_record(path, "abc") is None
    path.write_text('{"key": "other", "status": "finished"}')
    assert read_record(path, "abc") is None
    path.write_text('{"key": "abc", "status": "finished"}')
    assert read_record(path, "abc") == {"key": "abc", "status": "finished"}


def test_a_failed_run_counts_only_where_no_other_record_says_more(write_study) -> None:
    (cell,) = cells(*load_study(write_study()))
    (job,) = cell.finals([1e-3], [1])
    own = Place.of(job, Path("out")).record
    record = {"key": job.key, "status": "failed"}
    write_record(own, record)
    assert KnownRuns(Path("out")).find(job) == record
    assert KnownRuns(Path("out"), retry=True).find(job) is None
    other = own.with_name(f"other-{job.key}.json")
    write_record(other, record | {"status": "finished"})
    for retry in (False, True):
        assert KnownRuns(Path("out"), retry=retry).find(job)["status"] == "finished"
    other.unlink()
    results = Path("docs/study/results.json")
    results.parent.mkdir(parents=True)
    run = made_run(seed=1, key=job.key)
    results.write_text(json.dumps(made_results([run])))
    assert KnownRuns(Path("out"), Path("docs")).find(job)["status"] == "finished"


@pytest.mark.slow
def test_published_runs_are_taken_over_and_failed_ones_are_made(write_study) -> None:
    study = write_study(tune={"learning_rates": [1e-3, 1e-2]})
    before = run(study)
    results = Path("docs/study/results.json")
    results.parent.mkdir(parents=True)
    described = json.loads(Path("out/study/results.json").read_text())
    described["machines"][0]["device"] = "another machine"
    described["runs"][0] |= {"status": "failed", "error": "its process ended with signal 9"}
    results.write_text(json.dumps(described))
    shutil.rmtree("out")
    dry = ["study", str(study), "--dry-run", "--published", "docs", "--output", "out"]
    assert "2 + 1 runs, 1 done\n  3 runs, 1 done\n" in CliRunner().invoke(app, dry).stdout
    told: list[str] = []
    run_studies({"study": load_study(study)}, Path("out"), How(published=Path("docs")), told.append)
    assert len(told) == 1
    assert "2 + 1 runs, 3 done\n  3 runs, 3 done\n" in CliRunner().invoke(app, dry).stdout
    again = json.loads(Path("out/study/results.json").read_text())
    assert [one["device"] for one in again["machines"]][1] == "another machine"
    assert [found.pop("machine") for found in again["runs"]] == [0, 1, 1]
    assert [found["key"] for found in again["runs"]] == [found["key"] for found in before]
    assert again["runs"][1:] == before[1:]
    with pytest.raises(SvdtuneError, match=r"out/runs has no published study: expected results\.json in folders in it"):
        run_studies({"study": load_study(study)}, Path("elsewhere"), How(published=Path("out/runs")))


def test_right_answers_are_counted_whatever_separates_their_lines(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path, {})
    for index, right in enumerate([True, False]):
        store.append([Prediction(index, "", "", "a\u2028b\x85c", "", None, right, None, None, 1, True)])
    score = Score(1, 0.5, wilson_interval(1, 2))
    scores = scores_of(Evaluation("number", 2, score, None, {}, 0, 0.0, {}, tmp_path))
    assert scores["correct"] == pack([True, False])
