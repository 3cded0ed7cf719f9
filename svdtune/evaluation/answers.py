"""Answers to every row of a source, kept as they are made.

Until all are there they lie in the folder FILE.part, as an evaluation's predictions do: the same
call after an interruption goes on.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from svdtune.data import Example, prompt_ids
from svdtune.data.cache import content_of
from svdtune.errors import SvdtuneError
from svdtune.evaluation.items import Item
from svdtune.evaluation.predictions import PredictionStore
from svdtune.evaluation.scores import evaluate
from svdtune.evaluation.tasks.task import Task
from svdtune.models import LoadedModel
from svdtune.system import read_objects, write_text
from svdtune.training.lock import held

ANSWER = "generated"  # the column that is added
_UNGRADED = Task("answers", strict=None)


def answer_all(
    loaded: LoadedModel,
    examples: Sequence[Example],
    output: Path,
    *,
    template: str,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    restart: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write each row with its greedy answer, JSON one a line, in the order of the rows.

    Args:
        loaded: the model, with or without an adapter.
        examples: the rows as examples; only their prompts are shown to the model.
        output: the file to make, which is not there yet.
        template: around each prompt, as for `svdtune.data.prompt_ids`.
        max_new_tokens: length limit of an answer.
        batch_size: answers generated together.
        restart: drop the answers that an interrupted call left.
        on_progress: called with (rows done, rows in all).

    Returns:
        How many answers were cut at the limit.

    Raises:
        SvdtuneError: the file is there, a row holds what JSON cannot, a prompt is empty or leaves
            too little room, an interrupted call had other rows or settings, the file cannot be
            written, or another process is writing it.
    """
    _check_rows(examples)  # now, not when all is generated
    part = output.with_name(f"{output.name}.part")
    items = [Item(one.name, "", tuple(prompt_ids(one, loaded.tokenizer, template)), "") for one in examples]
    with held(part, "generate"):
        if output.exists():
            raise SvdtuneError(f"{output} is there already; name another --output, or remove it")
        made = evaluate(
            loaded,
            items,
            _UNGRADED,
            part,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            settings={"rows": content_of("", [one.row for one in examples])},
            restart=restart,
            on_progress=on_progress,
        )
        found = read_objects(part / PredictionStore.PREDICTIONS)
        rows = [
            {**example.row, ANSWER: one["completion"], "ended": one["ended"]}
            for example, one in zip(examples, found, strict=True)
        ]
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for name in PredictionStore.FILES:
            (part / name).unlink()
    return made.unended


def _check_rows(examples: Sequence[Example]) -> None:
    for example in examples:
        for column, value in example.row.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise SvdtuneError(
                    f"{example.name} cannot be written as JSON: its column {column!r} holds {value!r:.60} ({error}); make "
                    "that a text in the data, or leave the column out"
                ) from error
