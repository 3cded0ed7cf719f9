"""What a task is: a name, and a function that grades one completion."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    Attributes:
        extracted: The answer that was read out of the completion, None where it holds none.
        correct: Whether that answer equals the reference's.
    """

    extracted: str | None
    correct: bool


@dataclass(frozen=True)
class Task:
    """How a family of items is scored.

    Attributes:
        name: What `--task` calls it.
        description: One line for help texts.
        grade: Takes a completion and its reference. Raises SvdtuneError where the *reference* holds no answer: that is
            a fault of the data, not of the model.
    """

    name: str
    description: str
    grade: Callable[[str, str], Grade]
