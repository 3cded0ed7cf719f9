"""Graders as GRPO's rewards: 1 for a right answer, 0 for a wrong one."""

from collections.abc import Callable, Sequence
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks import Reference, get_task


def grader(name: str, answer: str, references: Sequence[Reference]) -> Callable[..., list[float]]:
    """A reward function of TRL's kind.

    Args:
        name: of a task.
        answer: the column that it grades against.
        references: all of that column, to be looked through before anything is generated.

    Raises:
        SvdtuneError: if there is no such task, it grades no single answers, or a reference holds no
            answer.
    """
    task = get_task(name)
    grade = task.strict or task.paper
    if grade is None:
        raise SvdtuneError(f"the task {name!r} scores all answers together, so that it is no reward for one of them")
    for reference in references:
        task.check(reference)

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        pairs = zip(completions, columns[answer], strict=True)
        return [float(grade(_text(completion), reference).correct) for completion, reference in pairs]

    reward.__name__ = name
    return reward


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")
