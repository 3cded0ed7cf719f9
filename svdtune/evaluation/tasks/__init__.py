"""Task families, one file each: how a completion is graded against its reference.

To add a family, write a file that builds its `Task`s and list them in `_TASKS` below; every command finds them by name.
"""

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.choice import CHOICE, LETTER
from svdtune.evaluation.tasks.e2e import E2E, E2E_BLEU
from svdtune.evaluation.tasks.exact import EXACT
from svdtune.evaluation.tasks.gsm8k import GSM8K
from svdtune.evaluation.tasks.humaneval import HUMANEVAL
from svdtune.evaluation.tasks.math import MATH
from svdtune.evaluation.tasks.number import NUMBER
from svdtune.evaluation.tasks.task import Grade, Grades, Reference, Task

_TASKS = {task.name: task for task in (NUMBER, LETTER, CHOICE, GSM8K, MATH, HUMANEVAL, E2E, E2E_BLEU, EXACT)}


def task_names() -> list[str]:
    """Names that `get_task` knows, in the order they are listed in help texts."""
    return list(_TASKS)


def get_task(name: str) -> Task:
    """Find a task by its name.

    Raises:
        SvdtuneError: If there is no such task; the message lists those there are.
    """
    if name not in _TASKS:
        raise SvdtuneError(f"there is no task {name!r}; choose one of: {', '.join(_TASKS)}")
    return _TASKS[name]


__all__ = ["Grade", "Grades", "Reference", "Task", "get_task", "task_names"]
