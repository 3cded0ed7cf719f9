"""The rows of each task: read by its format, and made into tokens."""

from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from svdtune.data import Example, encode_all, read_rows, to_examples
from svdtune.data.encoding import prompt_ids
from svdtune.data.preferences import encode_labelled, encode_pairs, to_labelled, to_pairs, tokens_of
from svdtune.errors import SvdtuneError
from svdtune.training.recipe import DataSource, Recipe

_REFERRED = ("dpo", "kto", "grpo")  # compared with the base while they are trained
Judged = list[tuple[Example, Any]]  # an example, and what the task has to it
Rows = list[dict[str, Any]]  # of SFT, lists of token ids; see `svdtune.data.preferences` for others


def moved_at_start(recipe: Recipe) -> str | None:
    """A sentence where the method changes the model at step 0, so that training begins away from
    its reference, the base; None elsewhere."""
    method = recipe.method
    if (
        recipe.training.task not in _REFERRED
        or method.name != "sara"
        or method.options.get("init", "kaiming") != "kaiming"
    ):
        return None
    return (
        "SARA changes the model at step 0, as in its paper, so that training begins away from the base, which is the "
        'reference; method.init: zero_v (init="zero_v") begins at it'
    )


def read_task(recipe: Recipe, source: DataSource) -> Judged:
    """The examples of a source, each with what the task has to it: the rejected answer, the label,
    the row that rewards look at, or nothing.

    Raises:
        SvdtuneError: if the source or a row is malformed, or lacks what the task learns from.
    """
    task, data = recipe.training.task, recipe.data
    rows = read_rows(source.source, source.split, config=source.config, limit=source.limit, seed=source.seed)
    if task == "sft":
        return [(example, None) for example in to_examples(rows, data.prompt, data.completion, source=source.source)]
    if task == "kto":
        return list(to_labelled(rows, data.prompt, data.completion or "completion", source=source.source))
    if task == "grpo":
        examples = to_examples(rows, data.prompt, source=source.source)
        return [(example, {**example.row, "prompt": example.prompt}) for example in examples]
    return list(to_pairs(rows, data.prompt, task=task, source=source.source))


def encode_task(recipe: Recipe, judged: Judged, tokenizer: PreTrainedTokenizerBase, console: Console) -> Rows:
    """The tokens of a task's examples; a line says how many there are.

    Raises:
        SvdtuneError: if an example does not fit, or none is left.
    """
    task, data = recipe.training.task, recipe.data
    if task == "sft":
        examples = [example for example, _ in judged]
        how_to = (data.max_length, data.loss_on, data.template)
        rows, overlong = encode_all(examples, tokenizer, *how_to, overlong=data.overlong)
        what = "examples"
    else:
        encode, what = _ENCODERS[task]
        rows, overlong = encode(judged, tokenizer, data.max_length, data.template, overlong=data.overlong)
    how = "cut off at" if data.overlong == "cut" else "left out as longer than"
    note = f", {overlong:,} {how} {data.max_length} tokens" if overlong else ""
    source = judged[0][0].name.rpartition(" row ")[0]
    tokens = sum(tokens_of(row) for row in rows)
    console.print(f"data      {source}: {len(rows):,} {what}, {tokens:,} tokens{note}", highlight=False)
    return list(rows)


def _encode_prompts(
    judged: Judged, tokenizer: PreTrainedTokenizerBase, max_length: int, template: str, *, overlong: str
) -> tuple[Rows, int]:
    rows: Rows = []
    for example, row in judged:
        ids = prompt_ids(example, tokenizer, template)
        if len(ids) <= max_length:
            rows.append({**row, "prompt_ids": ids})
        elif overlong == "error":
            raise SvdtuneError(
                f"{example.name}: the prompt is {len(ids)} tokens long, and max_length is {max_length}; raise it, or leave "
                "such rows out with `data.overlong: drop`"
            )
    if not rows:
        raise SvdtuneError(f"no row is left: all prompts are longer than max_length = {max_length} tokens")
    return rows, len(judged) - len(rows)


def encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Tokens of a prompt, text or messages, up to where the model has to go on."""
    return prompt_ids(Example(prompt), tokenizer, template)


# How the rows of tasks besides SFT become tokens, and what they are called.
_ENCODERS: dict[str, tuple[Any, str]] = {
    "dpo": (encode_pairs, "pairs"),
    "reward": (encode_pairs, "pairs"),
    "kto": (encode_labelled, "labelled answers"),
    "grpo": (_encode_prompts, "prompts"),
}
