"""What GRPO's answers are worth: functions by their Python path, or graders by name.

A function is one of TRL's: it takes `completions`, `prompts` and every column of the rows by name,
a list each, and returns a number for each answer. Graders belong to the evaluation, which comes
after training; they are reached by a path too.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.registry import import_function

Reward = Callable[..., Sequence[float | None]]
_GRADERS = "svdtune.evaluation.rewards"
_TASKS = "svdtune.evaluation.tasks"


def check_grader(name: str | None) -> None:
    """Import what grades a run once it is trained: before it is trained.

    Raises:
        SvdtuneError: there is no such task or function.
    """
    if name is not None:
        import_module(_TASKS).get_task(name)


def load_rewards(names: Sequence[str], answer: str | None, rows: Sequence[Mapping[str, Any]]) -> list[Reward]:
    """The functions that a recipe names.

    Args:
        names: "package.module:function", found as Python finds it or from the working directory; or
            a grader's name, as for `svdtune evaluate --task`.
        answer: the column of the reference answers, for graders.
        rows: that are trained on; graders look through their references.

    Raises:
        SvdtuneError: if there is no such function or grader, or a grader lacks references.
    """
    return [import_function(name, "training.rewards") if ":" in name else _grader(name, answer, rows) for name in names]


def _grader(name: str, answer: str | None, rows: Sequence[Mapping[str, Any]]) -> Reward:
    if answer is None:
        raise SvdtuneError(
            f"training.rewards: {name} grades against reference answers; name their column with data.answer, or give a "
            "function as package.module:function"
        )
    lacking = next((at for at, row in enumerate(rows, 1) if answer not in row), None)
    if lacking is not None:
        raise SvdtuneError(f"training row {lacking} has no field {answer!r} (data.answer), which {name} grades against")
    reward: Reward = import_module(_GRADERS).grader(name, answer, [row[answer] for row in rows])
    return reward
