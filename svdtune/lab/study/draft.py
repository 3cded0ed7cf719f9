"""A first study of a user's own rows: a recipe that is scored on some of them, and a study file
that compares methods on it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from svdtune._version import __version__
from svdtune.errors import SvdtuneError
from svdtune.lab.study.spec import load_study
from svdtune.training.draft import OTHER_RATE, RATES, SCORED, Draft, Scoring, draft
from svdtune.training.method import FULL, method_problems
from svdtune.training.problems import refuse

NLL = "nll"  # what a user calls the loss of reference answers
_SEEDS = (1, 2, 3)
_AROUND = (1 / 3, 1, 3)  # of the rate to start at


@dataclass(frozen=True)
class StudyDraft:
    """A study for some data.

    Attributes:
        text: the study file, YAML with comments.
        recipe: the recipe that its task names, and what was seen of the data.
        runs: how many runs it takes, searches that are extended aside.
    """

    text: str
    recipe: Draft
    runs: int


def draft_study(
    model: str,
    data: str,
    methods: Sequence[str],
    *,
    recipe_name: str,
    budget: str = "0.5%",
    scoring: Scoring,
    prompt: str | None = None,
    completion: str | None = None,
    origin: Mapping[str, Any] | None = None,
    console: Console,
) -> StudyDraft:
    """Look at rows, and write a study of methods on them.

    Args:
        model, data, prompt, completion, origin, console: as for `svdtune.training.draft.draft`.
        methods: names of methods, each an arm.
        recipe_name: what the recipe's file will be called, beside the study.
        budget: trained parameters of every arm: 300k, or a share of the model, 0.5%.
        scoring: what the runs are scored on; the task "nll" measures the loss of the reference
            answers in place of answering.

    Raises:
        SvdtuneError: the rows are of no format, hold no answers, or a method or the budget is none.
    """
    twice = sorted({name for name in methods if list(methods).count(name) > 1})
    if not methods or twice:
        raise SvdtuneError(f"expected different methods, such as lora,sorsa,sara; got {', '.join(methods) or 'none'}")
    refuse([problem for name in methods for problem in method_problems(name, {})], "--methods")
    fields: dict[str, Any] = {"prompt": prompt, "completion": completion}
    by_loss = scoring.task == NLL
    graded = replace(scoring, task=None) if by_loss else scoring
    how: Any = {"method": methods[0], "task": "sft", "scoring": graded, "origin": origin, "console": console}
    recipe = draft(model, data, **how, **fields)
    text = _written(data, methods, recipe_name, budget)
    if by_loss:
        text += _measured(_name(data), data, scoring, fields)
    made = StudyDraft(text, recipe, 1 + len(methods) * 2 * len(_SEEDS))
    with TemporaryDirectory() as folder:  # as svdtune study will read it
        Path(folder, recipe_name).write_text(recipe.text, encoding="utf-8")
        Path(folder, "study.yaml").write_text(made.text, encoding="utf-8")
        load_study(Path(folder, "study.yaml"))
    return made


def _written(data: str, methods: Sequence[str], recipe: str, budget: str) -> str:
    """The study as YAML that says what its parts are for."""
    name = _name(data)
    arms = "\n".join(_arm(method) for method in methods)
    baseline = "lora" if "lora" in methods else methods[0]
    return f"""\
# Written by svdtune {__version__}. What it will run: svdtune study FILE --dry-run
title: {json.dumps(f"{_listed(methods)} on {name}")}
question: Which method scores best on {name} when all train as many parameters and all learning rates are searched alike?
tasks: {{{name}: {recipe}}}  # the recipe has the model, the rows, and what runs are scored on
budgets: [{budget}]  # trained parameters of every arm: 300k, 1.5M, or a share of the model

arms:
  base: {{untrained: true}}  # the model as it is
{arms}

tune:  # rates are chosen by the loss on training rows that the search holds out, never by what is scored
  learning_rates: {_rates("lora")}
  share: 0.1
  extend: 1  # one more rate where the best is the first or the last

seeds: {[*_SEEDS]}  # the final runs of every arm
baseline: {baseline}
"""


def _name(data: str) -> str:
    return Path(data).name.split(".")[0] or "rows"


def _measured(name: str, data: str, scoring: Scoring, fields: Mapping[str, str | None]) -> str:
    """The lines of a study that takes the loss of the reference answers."""
    source = {"source": data, "only": SCORED} if scoring.test is None else {"source": scoring.test}
    items = source | {field: value for field, value in fields.items() if value is not None}
    return f"""
measure:  # the loss of every reference answer, which no run trains on
  answers: {{{name}: {json.dumps(items)}}}
generate: false  # true also has the recipe's evaluation section answered and graded
"""


def _arm(method: str) -> str:
    section = "{name: full}" if method == FULL else f"{{name: {method}, target_modules: all-linear}}"
    sized = "\n    budget: false  # its size is the model's" if method == FULL else ""
    return f"  {method}:\n    method: {section}\n    learning_rates: {_rates(method)}{sized}"


def _rates(method: str) -> str:
    rate = float(RATES.get(method, OTHER_RATE))
    around = (float(f"{rate * factor:.0e}") for factor in _AROUND)
    return f"[{', '.join(f'{one:g}' for one in around)}]"


def _listed(methods: Sequence[str]) -> str:
    return " and ".join([", ".join(methods[:-1]), methods[-1]] if len(methods) > 1 else methods)
