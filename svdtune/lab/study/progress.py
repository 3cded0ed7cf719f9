"""A study in the making: what each cell waits for, given the records there are, and the results as
far as they go."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svdtune.lab.study.grid import Cell, Job
from svdtune.lab.study.records import record_of, results_of
from svdtune.lab.study.results import RESULTS
from svdtune.lab.study.spec import Study
from svdtune.system import write_json

Record = dict[str, Any]


@dataclass
class StudyProgress:
    """One study, and the records there are of its runs.

    Attributes:
        name, study: which.
        cells: its cells.
        models: by task, the model.
        folder: where its results go.
        records: by key, the runs that are done.
        ranks: from `svdtune.lab.study.layers.ranks_by_layer`.
    """

    name: str
    study: Study
    cells: list[Cell]
    models: dict[str, str]
    folder: Path
    records: dict[str, Record] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)

    def next_jobs(self, cell: Cell) -> list[Job]:
        """What a cell waits for: the rest of its search, or its final runs; nothing where it is
        done."""
        if search := self.search(cell):
            return search
        if cell.like is not None and self.search(cell.like):
            return []
        if not self.rates_of(cell) and not cell.spec.untrained:
            self._give_up(cell)
        return [job for job in self.finals(cell) if job.key not in self.records]

    def search(self, cell: Cell) -> list[Job]:
        """The runs that a cell's search still needs, those of an extended one included."""
        while True:
            waiting = [job for job in cell.search() if job.key not in self.records]
            if waiting or not cell.searched or not cell.extend(next(iter(self.rates_of(cell)), None)):
                return waiting

    def finals(self, cell: Cell) -> list[Job]:
        """The runs that count, as far as is known with which learning rates."""
        few = self.study.tune.finish if self.study.tune else 1
        return cell.finals(self.rates_of(cell) or cell.candidates[:few], self.study.seeds)

    def round_of(self, job: Job) -> int:
        """When a run is made: the search comes first, then seed after seed of every arm, so that
        each finished round makes a whole table."""
        return 0 if job.phase == "tune" else 1 + self.study.seeds.index(job.seed)

    def made(self, cell: Cell) -> tuple[int, int]:
        """How many of the runs that are planned for a cell so far are done, and how many failed."""
        there = [
            (job, self.records[job.key]) for job in (*cell.search(), *self.finals(cell)) if job.key in self.records
        ]
        # Where no learning rate worked, final runs fail without being made.
        made = [record["status"] for job, record in there if record["learning_rate"] == job.learning_rate]
        failed = made.count("failed")
        return len(made) - failed, failed

    def rates_of(self, cell: Cell) -> list[float]:
        """The learning rates of a cell's final runs, the best first, as far as its search has
        come."""
        if cell.like is not None:
            return self.rates_of(cell.like)
        if not cell.searched:
            return cell.candidates
        found = {job.learning_rate: self.records.get(job.key, {}) for job in cell.search()}
        finished = {rate: r.get("eval_loss") for rate, r in found.items() if r.get("status") == "finished"}
        ranked = cell.ranked({rate: loss for rate, loss in finished.items() if rate is not None})
        return ranked[: self.study.tune.finish if self.study.tune else 1]

    def _give_up(self, cell: Cell) -> None:
        """No learning rate worked: the final runs are failed ones."""
        searched = cell.like or cell
        reasons = [self.records[job.key]["error"] for job in searched.search()]
        rates = ", ".join(f"{rate:g}" for rate in searched.candidates)
        error = f"no learning rate of {rates} came to a loss; the last one: {reasons[-1]}"
        for job in self.finals(cell):
            described = {**asdict(job), "key": job.key, "learning_rate": None}
            self.records[job.key] = record_of(described, self.folder / "none", {}, error)

    def write(self, command: str) -> None:
        """Write the results there are so far, in the study's order; a run that several cells share
        is there for each."""
        jobs = [job for cell in self.cells for job in (*cell.search(), *self.finals(cell))]
        known = [self.records[job.key] | job.cell for job in jobs if job.key in self.records]
        results = results_of(self.study, self.models, known, command, self.ranks)
        write_json(self.folder / RESULTS, results, "free some space; the same command goes on", indent=1)


def take_up(studies: Sequence[StudyProgress], known: Callable[[Job], Record | None]) -> list[tuple[int, int, int, Job]]:
    """Give studies the records that there are, and extend their searches as far as these go.

    Args:
        studies: changed; they may wait for the same runs.
        known: finds the record of a run, None where it is to be made.

    Returns:
        What can be made now: (number of the study, round, number of its cell, job), each run once,
            where it first comes up.
    """
    waiting: dict[str, tuple[int, int, int, Job]] = {}
    found = True
    while found:
        found = False
        for s, one in enumerate(studies):
            for c, cell in enumerate(one.cells):
                for job in one.next_jobs(cell):
                    if job.key in waiting:
                        continue
                    if (record := known(job)) is None:
                        waiting[job.key] = (s, one.round_of(job), c, job)
                    else:
                        one.records[job.key] = record
                        found = True
    return list(waiting.values())
