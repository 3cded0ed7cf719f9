"""What `evaluate` and `generate` share: where a model computes, which items it is asked, and in what form."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdtune.training.recipe import Recipe, Source

_FILE_ENDINGS = {".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz"}


def placement(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Arguments for loading a model: what the user said, and a GPU where there is one and none was named."""
    import torch

    if device is not None:
        check_device(device)
    found = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None)
    return {key: value for key, value in {"dtype": dtype, "device": found}.items() if value is not None}


def check_device(device: str) -> None:
    """Make sure that there is such a device.

    Raises:
        SvdtuneError: There is none.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count()
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(gpus))])
        raise SvdtuneError(f"the device {device!r} is not there; expected one of {there}") from error


def choose_template(recipe: "Recipe | None", tokenizer: "PreTrainedTokenizerBase", given: str | None) -> str:
    """The user's, or the run's, or the chat template where the tokenizer has one."""
    if given is not None:
        return given
    if recipe is not None:
        return recipe.data.template
    return "chat" if tokenizer.chat_template else "plain"


@dataclass(frozen=True)
class Form:
    """In what form items are asked and graded.

    Attributes:
        task: Name of the task that grades.
        prompt: Field that is asked, or a text with fields.
        answer: Field to grade against; None for the completion.
        completion: As in training, where the completion is graded against; None otherwise.
        template: The prompt around it; None for the chat template where there is one.
        fallback: The template where there is none.
        max_new_tokens: Length limit.
    """

    task: str
    prompt: str
    answer: str | None
    completion: str | None
    template: str | None
    fallback: str
    max_new_tokens: int

    def template_for(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The template, once it is known whether the tokenizer has one for chats."""
        return self.template or ("chat" if tokenizer.chat_template else self.fallback)


def form(
    data: str,
    recipe: "Recipe | None",
    task: str | None,
    prompt: str | None,
    answer: str | None,
    template: str | None,
    max_new_tokens: int | None,
) -> Form:
    """What the user said; else what the run's recipe says of its evaluation; else what a data set of the papers asks for;
    else what the run was trained with.

    A run that was trained with a paper's prompt is asked with the prompt that the paper tests with.
    """
    from svdtune.data.catalogue import CATALOGUE
    from svdtune.data.prompts import TEMPLATES

    known, trained = CATALOGUE.get(data), recipe.data if recipe else None
    section = recipe.evaluation if recipe and known else None
    template = template or (section and section.template)
    max_new_tokens = max_new_tokens or (section and section.max_new_tokens)
    kept = trained and (known is None or trained.template not in TEMPLATES)
    own_answer = known.answer if known else trained.answer if trained else "answer"
    graded_against = answer or own_answer
    return Form(
        task=task or (known and known.task) or "number",
        prompt=prompt or (known.prompt if known else trained.prompt if trained else "question"),
        answer=graded_against,
        # A run without a field for the answer is graded against the completions it was trained towards.
        completion=trained.completion if trained and graded_against is None else None,
        template=template or (trained.template if kept else known.template if known and trained else None),
        fallback=known.template if known else "plain",
        max_new_tokens=max_new_tokens or (known.max_new_tokens if known else 256),
    )


def sets_to_ask(recipe: "Recipe | None", data: str | None, task: str | None) -> list[str | None]:
    """The names of what is scored: the data named, or the sets that the run's recipe names; groups as their members.

    None stands for what `held_out` finds by itself.
    """
    from svdtune.data.catalogue import GROUPS, scored

    if data is not None:
        return [dataset.name for dataset in scored(data)] if data in GROUPS else [data]
    if recipe is None or recipe.evaluation is None or task is not None:
        return [None]
    return [dataset.name for name in recipe.evaluation.data for dataset in scored(name)]


def held_out(
    recipe: "Recipe | None",
    data: str | None,
    split: str | None,
    config: str | None,
    limit: int | None,
    task: str | None = None,
) -> "Source":
    """Where the items come from: the data named, or the run's own held-out rows, or the data set that the task is made for.

    Raises:
        SvdtuneError: If none is there.
    """
    from svdtune.data.catalogue import CATALOGUE
    from svdtune.training.recipe import Source

    if limit is not None and limit < 1:
        raise SvdtuneError(f"limit is {limit}; expected at least 1 item")
    own, section = recipe.data.eval if recipe else None, recipe.evaluation if recipe else None
    if split is None and section is not None and data in CATALOGUE and section.split in CATALOGUE[data].splits:
        split = section.split
    if data is None and task in CATALOGUE and (own is None or own.source not in CATALOGUE):
        data = task

    given = {
        key: value for key, value in {"split": split, "config": config, "limit": limit}.items() if value is not None
    }
    if data is not None:
        # Files have no splits; the default of training, "train", would be the wrong one here.
        is_file = Path(data).suffix in _FILE_ENDINGS or Path(data).exists()
        default = {} if is_file else {"split": CATALOGUE[data].test if data in CATALOGUE else "test"}
        return Source(source=data, **default | given)
    if own is None:
        raise SvdtuneError("there is no data to evaluate on: name a file, generator or hub data set with --data")
    return own.model_copy(update=given)
