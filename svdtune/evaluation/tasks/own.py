"""A user's own grader: a function of a completion and its reference, by its path in Python."""

from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks.task import Grade, Reference, Task
from svdtune.registry import import_function


def own_task(path: str) -> Task:
    """The task that a function grades.

    Args:
        path: "package.module:function", found as Python finds it or from the working directory. It
            is called with the completion and the reference of an item, and says whether the
            completion is right.

    Raises:
        SvdtuneError: there is no such function; or, while it grades, that it fails or says neither
            yes nor no.
    """
    function = import_function(path, "the task")

    def grade(completion: str, reference: Reference) -> Grade:
        try:
            verdict: Any = function(completion, reference)
            correct = bool(verdict) if verdict in (True, False) else None
        except Exception as error:  # whatever a user's code raises
            raise SvdtuneError(
                f"the task {path} failed on the completion {completion!r:.60}: {type(error).__name__}: {error}"
            ) from error
        if correct is None:
            raise SvdtuneError(
                f"the task {path} says {verdict!r:.60} of a completion; expected True where it is right, else False"
            )
        return Grade(extracted=completion.strip(), correct=correct)

    return Task(path, grade)
