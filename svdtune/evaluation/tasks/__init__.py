"""Task families, one file each: how a completion is graded against its reference.

To add a family, write a file that builds its `Task`s and list them in `TASKS` below; every command
finds them by name.
"""

from collections.abc import Callable

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.choice import CHOICE, LETTER
from svdtune.evaluation.tasks.exact import EXACT
from svdtune.evaluation.tasks.number import NUMBER
from svdtune.evaluation.tasks.own import own_task
from svdtune.evaluation.tasks.task import Grade, Grades, Reference, Task
from svdtune.registry import Registry, is_function

TASKS: Registry[Task] = Registry("tasks", {task.name: task for task in (NUMBER, LETTER, CHOICE, EXACT)})

# Collections of tasks that ask and grade by themselves, by the name in `--task NAME:TASK,...`:
# (model, names of tasks, folder, batch_size=, limit=) → a table for the terminal.
HARNESSES: Registry[Callable[..., str]] = Registry("harness")


def get_task(name: str) -> Task:
    """Find a task by its name, or make one of a function, "package.module:function".

    Raises:
        SvdtuneError: If there is no such task; the message lists those there are.
    """
    if is_function(name):
        return own_task(name)
    if name not in TASKS:
        raise SvdtuneError(
            f"there is no task {name!r}; choose one of: {TASKS.listed()}; or name a function of your own, module:function"
        )
    return TASKS[name]


__all__ = ["Grade", "Grades", "Reference", "Task", "get_task"]
