"""Answers to every row of a source, written as they are made.

Until all are there they lie in FILE.part, whose first line says what they depend on: the same call
after an interruption goes on, another begins anew.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from svdtune.data import Example, prompt_ids
from svdtune.data.cache import content_of
from svdtune.errors import SvdtuneError
from svdtune.evaluation.engines import TransformersEngine
from svdtune.evaluation.generation import GREEDY, plan_batches
from svdtune.evaluation.items import Item, check_items
from svdtune.models import LoadedModel
from svdtune.system import explain_write_errors, replace_text, whole_lines
from svdtune.training.lock import held_file

ANSWER = "generated"  # the column that is added
_BATCHES = 8  # whose prompts are sorted by length together


def answer_all(
    loaded: LoadedModel,
    examples: Sequence[Example],
    output: Path,
    *,
    template: str,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Write each row with its greedy answer, JSON one a line, in the order of the rows.

    Args:
        loaded: the model, with or without an adapter.
        examples: the rows as examples; only their prompts are shown to the model.
        output: the file to make, which is not there yet.
        template: around each prompt, as for `svdtune.data.prompt_ids`.
        max_new_tokens: length limit of an answer.
        batch_size: answers generated together.
        on_progress: called with (rows done, rows in all).

    Returns:
        How many answers were cut at the limit.

    Raises:
        SvdtuneError: the file is there, a prompt is empty or leaves too little room, or the file
            cannot be written, or another process is writing it.
    """
    if batch_size < 1:
        raise SvdtuneError(f"batch_size must be at least 1, got {batch_size}")
    engine = TransformersEngine(loaded)
    items = [Item(one.name, "", tuple(prompt_ids(one, loaded.tokenizer, template)), "") for one in examples]
    check_items(items, max_new_tokens, engine.context)
    tokens = [item.tokens for item in items]
    asked = {"rows": content_of("", [one.row for one in examples]), "prompts": content_of("", tokens)}
    settings = {**asked, "max_new_tokens": max_new_tokens, **engine.identity()}
    part = output.with_name(f"{output.name}.part")
    with explain_write_errors(output), held_file(output, "generate"):
        if output.exists():
            raise SvdtuneError(f"{output} is there already; name another --output, or remove it")
        done = _begun(part, settings)
        on_progress(len(done), len(items))
        for start in range(len(done), len(items), batch_size * _BATCHES):
            made = _complete(engine, tokens[start : start + batch_size * _BATCHES], max_new_tokens, batch_size)
            rows = zip(examples[start:], made, strict=False)
            lines = [{**example.row, ANSWER: text, "ended": ended} for example, (text, ended) in rows]
            with part.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            done += lines
            on_progress(len(done), len(items))
        replace_text(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in done))
        part.unlink()
    return sum(not line["ended"] for line in done)


def _complete(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[tuple[str, bool]]:
    """The text of each answer, and whether it ended by itself."""
    found: dict[int, tuple[str, bool]] = {}
    for batch in plan_batches(prompts, batch_size):
        completions = engine.complete([prompts[at] for at in batch], max_new_tokens, GREEDY, [0] * len(batch))
        for at, completion in zip(batch, completions, strict=True):
            text: Any = engine.tokenizer.decode(completion.tokens, skip_special_tokens=True)
            found[at] = (text, completion.ended)
    return [found[at] for at in range(len(prompts))]


def _begun(part: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier call with these settings wrote; without one, a new file."""
    written = whole_lines(part, cut=True) if part.is_file() else []
    lines = [json.loads(line.decode(errors="replace")) for line in written]
    if lines and lines[0] == settings:
        return lines[1:]
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return []
