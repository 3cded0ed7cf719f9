"""Make the runs of studies: several at a time, each in a process of its own, going on where an
earlier start stopped.

Everything a run leaves lies below the output folder, and its record is written last. Whatever ends
the runner, a second start finds the finished runs by their records, the unfinished ones by their
checkpoints, and makes no run twice, not even where two studies ask for the same one.
"""

import heapq
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdtune.checkpoint import open_checkpoint
from svdtune.data import read_rows
from svdtune.errors import SvdtuneError
from svdtune.lab.study.grid import Fits, Job, cells, model_of
from svdtune.lab.study.layers import ranks_by_layer
from svdtune.lab.study.progress import StudyProgress, take_up
from svdtune.lab.study.records import NO_ROOM, KnownRuns, Place, read_record, record_of, write_record
from svdtune.lab.study.results import RESULTS
from svdtune.lab.study.spec import Settings, Study
from svdtune.models.loader import locate
from svdtune.system import explain_write_errors, replace_text
from svdtune.training.lock import held
from svdtune.training.sections import TrainSource

Record = dict[str, Any]
FITS = "fits.json"
_GRACE = 60.0  # seconds for a checkpoint after Ctrl-C
_OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class How:
    """How runs are made.

    Attributes:
        processes: at a time.
        gpus: their devices, dealt out in turn; none for the CPU.
        eval_batch_size: completions generated together.
        retry: whether failed runs are made again.
        drop_weights: whether a run's adapter is deleted once it is scored.
        command: what the user called, for the results.
        minutes: after which no run is started any more; None for no limit.
        published: a folder of studies whose runs are not made again.
    """

    processes: int = 1
    gpus: tuple[str, ...] = ()
    eval_batch_size: int = 64
    retry: bool = False
    drop_weights: bool = False
    command: str = ""
    minutes: float | None = None
    published: Path | None = None


def run_studies(
    studies: dict[str, tuple[Study, dict[str, Settings]]],
    output: Path,
    how: How,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Make every run of the studies that has no record yet.

    Args:
        studies: by name, from `load_study`.
        output: the folder for everything; studies that share it share runs.
        how: see `How`.
        tell: called with a line about each run.

    Returns:
        The results files.

    Raises:
        SvdtuneError: a model or its training rows are not there, another runner works in the
            folder, a method cannot be fitted, nothing is published where `how` says so, or the disk
            is full.
        KeyboardInterrupt: on Ctrl-C, after the runs wrote their checkpoints; the same call goes on.
    """
    _check_sources([recipe for _, tasks in studies.values() for recipe in tasks.values()])
    with explain_write_errors(output, "the same command goes on"), held(output, "study"):
        known = KnownRuns(output, how.published, how.retry)
        making = planned(studies, output)
        for one in making:
            one.ranks = ranks_by_layer(one.study, studies[one.name][1])
        _Runner(making, known, output, how, tell).run()
    return [one.folder / RESULTS for one in making]


def planned(studies: dict[str, tuple[Study, dict[str, Settings]]], output: Path) -> list[StudyProgress]:
    """The studies with every cell's method fitted, and no record yet; the fits are kept in the
    output folder.

    Raises:
        SvdtuneError: a method cannot be fitted, a model's weights cannot be read, or the folder
            cannot be written.
    """
    fits = Fits(output / FITS)
    return [
        StudyProgress(
            name, study, cells(study, tasks, fits), {t: model_of(r).name for t, r in tasks.items()}, output / name
        )
        for name, (study, tasks) in studies.items()
    ]


def _check_sources(recipes: Sequence[Settings]) -> None:
    """Make sure that the tasks' models and training rows are there, which every run would find out
    for itself."""
    models = {(model.name, *model.origin.items()): model for model in map(model_of, recipes)}
    for model in models.values():
        open_checkpoint(locate(model.name), weights=False, **model.origin)
    listed = [given if isinstance(given, list) else [given] for given in (r["data"]["train"] for r in recipes)]
    plain = [TrainSource.model_validate(one).plain for given in listed for one in given]
    for source in {source.model_dump_json(): source for source in plain}.values():
        read_rows(**source.model_dump())


def start_worker(job: Path, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the process of one run. It ends when its standard input does, so that none outlives the
    runner.
    """
    command = [sys.executable, "-m", "svdtune.lab.study.worker", str(job)]
    with log.open("ab") as output:
        # In a session of its own: Ctrl-C is the runner's to hand on.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


class _Runner:
    """The queue of ready jobs and the processes that work on them.

    A run that finds too little memory beside others on its GPU is made again: at once, since its
    longest rows may just have met theirs, and the next time when it has the GPU to itself.
    """

    def __init__(
        self, studies: list[StudyProgress], known: KnownRuns, output: Path, how: How, tell: Callable[[str], None]
    ) -> None:
        self.studies, self.known, self.output, self.how, self.tell = studies, known, output, how, tell
        self.waiting: list[tuple[int, int, int, str]] = []  # (study, round, cell, key), the earliest first
        self.again: set[str] = set()  # runs that once found too little memory beside others
        self.crowded: list[str] = []  # runs that wait for a GPU of their own
        self.alone: set[str] = set()  # runs that have one, or had
        self.jobs: dict[str, Job] = {}
        self.records: dict[str, Record] = {}
        self.running: dict[Future[Record], str] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.free = [how.gpus[i % len(how.gpus)] if how.gpus else "" for i in range(how.processes)]
        self.shared = how.processes > max(1, len(how.gpus))
        self.signals = 0
        self.deadline = math.inf if how.minutes is None else time.monotonic() + 60 * how.minutes

    def run(self) -> None:
        """Until every cell is done."""
        with ThreadPoolExecutor(self.how.processes) as pool, self._signals_counted():
            try:
                self._refill()
                while (self.running or ((self.waiting or self.crowded) and not self._late())) and not self.signals:
                    for key, device in self._startable():
                        self.running[pool.submit(self._make, self.jobs[key], device)] = key
                    for done in wait(self.running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        self._finished(self.running.pop(done), done.result())
            finally:
                if self.running:
                    self.tell(f"stopping; runs that write a checkpoint first: {len(self.running)}")
                    self._stop()
        for one in self.studies:
            one.write(self.how.command)
        if self.signals:
            raise KeyboardInterrupt(f"stopped with {len(self.records)} runs done; the same command goes on")

    def _startable(self) -> Iterator[tuple[str, str]]:
        """The runs to start now, each with its device."""
        if self.alone.intersection(self.running.values()) or self._late():
            return
        while self.free and self.waiting:
            yield heapq.heappop(self.waiting)[-1], self.free.pop()
        if not self.running and not self.waiting:
            for device in set(self.free):
                if self.crowded:
                    key = self.crowded.pop(0)
                    self.alone.add(key)
                    self.free.remove(device)
                    yield key, device

    def _refill(self) -> None:
        """Queue what has become ready, and give every study the records that are there already."""
        for study, turn, cell, job in take_up(self.studies, self._known):
            if job.key not in self.jobs:
                self.jobs[job.key] = job
                heapq.heappush(self.waiting, (study, turn, cell, job.key))

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _known(self, job: Job) -> Record | None:
        if job.key not in self.records and job.key not in self.jobs:
            found = self.known.find(job)
            if found is not None:
                self.records[job.key] = found
                if found is self.known.published.get(job.key):
                    write_record(Place.of(job, self.output).record, found)
        return self.records.get(job.key)

    def _make(self, job: Job, device: str) -> Record:
        """Run one job to its end in a process of its own."""
        try:
            return self._make_on(job, device)
        finally:
            self.free.append(device)

    def _make_on(self, job: Job, device: str) -> Record:
        place = Place.of(job, self.output)
        described = {
            **asdict(job),
            "key": job.key,
            "name": job.name,
            "eval_batch_size": self.how.eval_batch_size,
            "drop_weights": self.how.drop_weights,
            "shared": self.shared,
            "plans": [one.study.plan for one in self.studies if one.study.plan],
            "place": {name: str(path) for name, path in asdict(place).items()},
        }
        for path in (place.job, place.log):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(place.job, json.dumps(described, indent=1))
        place.record.unlink(missing_ok=True)
        # Runs that take all cores each make all of them slower.
        threads = max(1, (os.cpu_count() or 1) // self.how.processes)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment |= {"CUDA_VISIBLE_DEVICES": device} if device else {}
        with start_worker(place.job, place.log, environment) as process:
            self.processes[job.key] = process
            if self.signals:
                process.kill()
            status = process.wait()
        del self.processes[job.key]
        record = read_record(place.record, job.key)
        if record is None and status == NO_ROOM:
            raise SvdtuneError(
                f"no room on a disk for the run {job.name}, below {place.run.parent} or elsewhere; see {place.log}. Free some "
                "space; the same command goes on"
            )
        if record is None and not self.signals:
            ended = f"signal {-status}" if status < 0 else f"status {status}"
            record = record_of(described, place.run, {}, f"its process ended with {ended}; see {place.log}")
            write_record(place.record, record)
        return record or {}

    def _finished(self, key: str, record: Record) -> None:
        if not record:
            return
        name = self.jobs[key].name
        if self.shared and key not in self.alone and record["status"] == "failed" and _OUT_OF_MEMORY in record["error"]:
            Place.of(self.jobs[key], self.output).record.unlink()
            if key in self.again:
                self.crowded.append(key)
                self.tell(f"later: {name} · out of memory beside others; it will have a GPU to itself")
            else:
                self.again.add(key)
                heapq.heappush(self.waiting, (-1, 0, 0, key))
                self.tell(f"later: {name} · out of memory beside others; it will be made again")
            return
        self.records[key] = record
        self._refill()
        for one in self.studies:
            if key in one.records:
                one.write(self.how.command)
        queued = len(self.waiting) + len(self.running) + len(self.crowded)
        self.tell(f"{len(self.records)} done, {queued} waiting · {name} · {outcome(record)}")

    def _stop(self) -> None:
        """End the processes: kindly, so that they write checkpoints; after a while, or at a second
        signal, not."""
        first, deadline = self.signals, time.monotonic() + _GRACE
        self.signals = max(1, first)  # nothing new starts
        for process in list(self.processes.values()):
            process.terminate()
        while self.processes and time.monotonic() < deadline and self.signals <= max(1, first):
            time.sleep(0.1)
        for process in list(self.processes.values()):
            process.kill()

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        """Ctrl-C, and SIGTERM, which schedulers send before they kill, are counted; the loop looks
        at the count."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def count(*_: Any) -> None:
            self.signals += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def outcome(record: Record) -> str:
    """A record in a few words."""
    if record["status"] != "finished":
        return f"{record['status']}: {record['error']}"
    values = [score["value"] for score in record["scores"].values()]
    score = f"score {sum(values) / len(values):.4f}, " if values else ""
    held_out = f"held-out loss {record['eval_loss']:.4f}, " if record["eval_loss"] is not None else ""
    return f"{score}{held_out}{record.get('seconds', 0):.0f} s"


def devices(per_gpu: int, gpus: int) -> tuple[int, tuple[str, ...]]:
    """(processes, their GPUs) for `per_gpu` processes on each of `gpus` GPUs; one process on the
    CPU where there is none."""
    visible: Sequence[str] = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    names = tuple(visible[:gpus]) if visible else tuple(map(str, range(gpus)))
    return (per_gpu * len(names), names) if names else (per_gpu, ())
