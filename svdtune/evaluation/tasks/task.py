"""What a task is: a name, how one completion is graded (strictly, and as the paper did), and
metrics of the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from svdtune.evaluation.interval import Metric

# What a completion is graded against, as JSON has it: a text, several texts, or a row's fields.
Reference = str | list[str] | dict[str, Any]


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    Attributes:
        extracted: The answer that was read out of the completion, None where it holds none.
        correct: Whether that answer equals the reference's.
    """

    extracted: str | None
    correct: bool


class Grades(NamedTuple):
    """Both verdicts on one completion; None where the task has no such grader."""

    strict: Grade | None
    paper: Grade | None


Grader = Callable[[str, Reference], Grade]
Metrics = Callable[[Sequence[str], Sequence[Reference]], Mapping[str, Metric]]


@dataclass(frozen=True)
class Task:
    """How a family of items is scored.

    Attributes:
        name: What `--task` calls it.
        strict: Grades a completion against its reference as is right. None where single completions
            are neither right nor wrong, and only `metrics` counts.
        paper: Grades as the paper's published code does, its faults included, so that scores can be
            compared with the paper's. None where no paper graded such items.
        metrics: Scores all completions against all references, both in the order of the items: BLEU
            and its like.
        check: Raises SvdtuneError where a *reference* holds no answer: that is a fault of the data,
            not of the model. It is asked about every reference before anything is generated.
        programs: Completions are programs. The share of right ones is reported as pass@1, and they
            are graded side by side in threads, since each is run in processes of its own.
    """

    name: str
    strict: Grader | None
    paper: Grader | None = None
    metrics: Metrics | None = None
    check: Callable[[Reference], object] = lambda _: None
    programs: bool = False

    def grade(self, completion: str, reference: Reference) -> Grades:
        """Grade in both modes."""
        return Grades(*(grader and grader(completion, reference) for grader in (self.strict, self.paper)))
