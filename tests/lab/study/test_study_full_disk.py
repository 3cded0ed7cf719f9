"""A full disk ends a study, and no run counts as failed for it; the process of a run ends clean."""

import errno
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from svdtune.errors import SvdtuneError
from svdtune.lab.study import runner, worker
from svdtune.lab.study.grid import cells
from svdtune.lab.study.records import NO_ROOM, Place
from svdtune.lab.study.results import Run, read_results
from svdtune.lab.study.runner import How, run_studies
from svdtune.lab.study.spec import load_study
from svdtune.system import check_free, explain_write_errors


def run(file: Path) -> list[Run]:
    (path,) = run_studies({"study": load_study(file)}, Path("out"), How())
    return read_results(path).runs


def test_a_run_that_finds_no_room_has_no_record(write_study, monkeypatch) -> None:
    (cell,) = cells(*load_study(write_study()))
    (job,) = cell.finals([1e-3], [1])
    place = Place.of(job, Path("out"))
    described = {**asdict(job), "key": job.key, "name": job.name, "shared": False, "drop_weights": False}
    file = Path("job.json")
    file.write_text(json.dumps({**described, "place": {name: str(path) for name, path in asdict(place).items()}}))

    def full(*_) -> None:
        with explain_write_errors(place.run):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(worker, "_train", full)
    monkeypatch.setattr(worker, "_end_with_runner", lambda: None)
    assert worker.main(file) == NO_ROOM
    assert not place.record.exists()


def test_a_full_disk_is_behind_what_is_said_of_it(tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError) as refused:
        check_free(tmp_path / "run", 10**18, "its result")
    assert worker.lacks_room(refused.value)
    for error, full in (
        (OSError(errno.ENOSPC, "no"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:603]"), True),
        (OSError(errno.EACCES, "no"), False),
    ):
        with pytest.raises(SvdtuneError) as said, explain_write_errors(tmp_path):
            raise error
        assert worker.lacks_room(said.value) == full
    assert not worker.lacks_room(SvdtuneError("something else"))


def test_a_full_disk_ends_the_study_and_the_same_call_goes_on(write_study, monkeypatch) -> None:
    study = write_study(seeds=[1, 2])
    with monkeypatch.context() as patched:
        patched.setattr(runner, "start_worker", lambda *_: subprocess.Popen([sys.executable, "-c", f"exit({NO_ROOM})"]))
        with pytest.raises(
            SvdtuneError,
            match=r"no room on a disk for the run .*; see .* the same command",
        ):
            run(study)
    assert not list(Path("out/records").glob("*"))
    assert [found.status for found in run(study)] == ["finished"] * 2


@pytest.mark.slow
@pytest.mark.real_workers
def test_the_process_of_a_run_ends_without_a_crash(write_study) -> None:
    """It still waits for the runner's end then, in a thread."""
    (found,) = run(write_study())
    assert found.status == "finished"
    (log,) = Path("out/logs").iterdir()
    assert "Fatal Python error" not in log.read_text()
