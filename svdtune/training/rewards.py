"""What GRPO's answers are worth: functions by their Python path, or graders by name.

A function is one of TRL's: it takes `completions`, `prompts` and every column of the rows by name,
a list each, and returns a number for each answer. Graders belong to the evaluation, which comes
after training; they are reached by a path too.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from svdtune.errors import SvdtuneError

Reward = Callable[..., Sequence[float | None]]
_GRADERS = "svdtune.evaluation.rewards"


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
    return [_function(name) if ":" in name else _grader(name, answer, rows) for name in names]


def _function(path: str) -> Reward:
    module, _, name = path.partition(":")
    here = os.getcwd()
    sys.path.append(here)
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise SvdtuneError(
            f"training.rewards: {path!r} cannot be imported: {error}; expected package.module:function, found from here or "
            "installed"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise SvdtuneError(f"training.rewards: {module} has no function {name!r}")
    reward: Reward = found
    return reward


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
