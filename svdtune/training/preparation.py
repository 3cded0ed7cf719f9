"""What a run needs before its model is adapted: rows read, checked for leaks and encoded, the base
model loaded, and what GRPO's answers are worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments, set_seed

from svdtune.data import Example, prompt_ids
from svdtune.data.columns import Columns
from svdtune.errors import SvdtuneError
from svdtune.models import LoadedModel, check_end_token, load
from svdtune.models.loader import context_length
from svdtune.registry import import_function
from svdtune.training.arguments import check_optimizer, training_arguments
from svdtune.training.leaks import check_leaks
from svdtune.training.recipe import Recipe
from svdtune.training.task_rows import Rows, TaskRows, TrainRows, moved_at_start


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its model is adapted; `eval_rows` are by the names of data.eval,
    `example` is the first row, before packing, and `more` what the task's trainer takes besides."""

    loaded: LoadedModel
    train_rows: Rows
    eval_rows: Mapping[str, Rows]
    example: dict[str, Any]
    args: TrainingArguments
    more: Mapping[str, Any] = field(default_factory=dict)


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """Read, check and load what a recipe of any task names.

    Raises:
        SvdtuneError: if a part is missing or does not fit the others, or if test questions are
            among the training rows.
    """
    # Before anything is read: what this machine lacks. While they live, ZeRO-3 partitions what is
    # loaded.
    early = training_arguments(recipe, rows=1)
    check_optimizer(early)
    check_grader(recipe.evaluation.task if recipe.evaluation else None)
    train = TrainRows(recipe)
    held_out = {name: TaskRows(recipe, source) for name, source in recipe.data.eval.items()}
    check_leaks(
        recipe,
        [part.questions for part in train.parts],
        {name: rows.questions for name, rows in held_out.items()},
        console,
    )
    more: dict[str, Any] = {}
    if recipe.training.task == "grpo":
        more["reward_funcs"] = load_rewards(
            recipe.training.rewards, recipe.data.answer, [row for _, row in train.judged]
        )
    set_seed(recipe.training.seed)  # a reward model's head starts at random
    loaded = load_base(recipe, chat=train.is_chat)
    train_rows = train.encode(loaded.tokenizer, console)
    eval_rows = {name: rows.encode(loaded.tokenizer, console) for name, rows in held_out.items()}
    example = train_rows[0]
    if recipe.training.packing:
        assert isinstance(train_rows, Columns)
        train_rows = _pack(train_rows, recipe, console)
    if recipe.training.task == "kto":
        # its batches keep the order of the rows, which may be sorted by their labels
        order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(recipe.training.seed))
        assert isinstance(train_rows, Columns)
        train_rows = train_rows.take(order.tolist())
    if recipe.training.task == "grpo":
        more["encode"] = lambda prompt: prompt_ids(Example(prompt), loaded.tokenizer, recipe.data.template)
    if note := moved_at_start(recipe):
        console.print(f"reference {note}", highlight=False)
    return Prepared(loaded, train_rows, eval_rows, example, training_arguments(recipe, len(train_rows)), more)


def _pack(rows: Columns, recipe: Recipe, console: Console) -> Columns:
    """TRL's packing, by best fit: no row is cut, since none is longer than data.max_length."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    packed = Columns.of_arrow(pack_dataset(Dataset(rows.to_arrow()), recipe.data.max_length, "bfd").data)
    full = len(packed.arrays["input_ids"]) / (len(packed) * recipe.data.max_length)
    console.print(
        f"packing   {len(packed):,} sequences of {recipe.data.max_length} tokens, {full:.0%} full", highlight=False
    )
    return packed


def load_base(recipe: Recipe, *, chat: bool) -> LoadedModel:
    """The base model of a recipe, with the end token checked; for a reward model, with a head that
    gives one number.

    Raises:
        SvdtuneError: if it cannot be loaded, end tokens disagree, or its context is too short.
    """
    section = recipe.model
    loaded = load(section.name, **section.model_dump(exclude={"name"}), reward=recipe.training.task == "reward")
    check_end_token(loaded.model, loaded.tokenizer, chat=chat or recipe.data.template == "chat")
    context = context_length(loaded.model.config)
    if context is not None and recipe.data.max_length > context:
        raise SvdtuneError(
            f"data.max_length is {recipe.data.max_length}, and the context of {section.name} is {context} tokens; "
            f"set data.max_length to at most that"
        )
    return loaded


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
    """The functions that GRPO's answers are worth something by.

    A function is one of TRL's: it takes `completions`, `prompts` and every column of the rows by
    name, a list each, and returns a number for each answer. Graders belong to the evaluation, which
    comes after training; they are reached by a path too.

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
