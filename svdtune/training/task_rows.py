"""What a run of any task needs before its model is adapted; of SFT it is `preparation.prepare`."""

from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from svdtune import processes
from svdtune.data import Example, read_rows, to_examples
from svdtune.data.encoding import prompt_ids
from svdtune.data.preferences import encode_labelled, encode_pairs, to_labelled, to_pairs, tokens_of
from svdtune.errors import SvdtuneError
from svdtune.training.arguments import training_arguments
from svdtune.training.leaks import check_leaks
from svdtune.training.preparation import Prepared, Rows, load_base, prepare
from svdtune.training.recipe import DataSource, Recipe
from svdtune.training.rewards import load_rewards

_REFERRED = ("dpo", "kto", "grpo")  # compared with the base while they are trained
Judged = list[tuple[Example, Any]]


def prepare_task(recipe: Recipe, console: Console) -> Prepared:
    """Read, check and load what a recipe names.

    Raises:
        SvdtuneError: if a part is missing or does not fit the others, or if test questions are
            among the training rows.
    """
    if recipe.training.task == "sft":
        return prepare(recipe, console)
    train = _read(recipe, recipe.data.train)
    held_out = _read(recipe, recipe.data.eval) if recipe.data.eval else None
    check_leaks(recipe, [example for example, _ in train], [example for example, _ in held_out or []], console)
    if processes.under_deepspeed():
        early = training_arguments(recipe, len(train))  # while it lives, ZeRO-3 partitions what is loaded  # noqa: F841
    more: dict[str, Any] = {}
    if recipe.training.task == "grpo":
        more["reward_funcs"] = load_rewards(recipe.training.rewards, recipe.data.answer, [row for _, row in train])
    set_seed(recipe.training.seed)  # a reward model's head starts at random
    loaded = load_base(recipe, chat=not isinstance(train[0][0].prompt, str))
    train_rows = _encode(recipe, train, loaded.tokenizer, console)
    eval_rows = _encode(recipe, held_out, loaded.tokenizer, console) if held_out else None
    example = train_rows[0]
    if recipe.training.task == "kto":
        # its batches keep the order of the rows, which may be sorted by their labels
        order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(recipe.training.seed))
        train_rows = [train_rows[at] for at in order.tolist()]
    if recipe.training.task == "grpo":
        more["encode"] = partial(_prompt_ids, tokenizer=loaded.tokenizer, template=recipe.data.template)
    if note := moved_at_start(recipe):
        console.print(f"reference {note}", highlight=False)
    return Prepared(loaded, train_rows, eval_rows, example, training_arguments(recipe, len(train_rows)), more)


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


def _read(recipe: Recipe, source: DataSource) -> Judged:
    task, data = recipe.training.task, recipe.data
    rows = read_rows(source.source, source.split, config=source.config, limit=source.limit, seed=source.seed)
    if task == "kto":
        return list(to_labelled(rows, data.prompt, data.completion or "completion", source=source.source))
    if task == "grpo":
        examples = to_examples(rows, data.prompt, source=source.source)
        return [(example, {**example.row, "prompt": example.prompt}) for example in examples]
    return list(to_pairs(rows, data.prompt, task=task, source=source.source))


def _encode(recipe: Recipe, judged: Judged, tokenizer: PreTrainedTokenizerBase, console: Console) -> Rows:
    data = recipe.data
    encode, what = _ENCODERS[recipe.training.task]
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


def _prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    return prompt_ids(Example(prompt), tokenizer, template)


# How a task's rows become tokens, and what they are called.
_ENCODERS: dict[str, tuple[Any, str]] = {
    "dpo": (encode_pairs, "pairs"),
    "reward": (encode_pairs, "pairs"),
    "kto": (encode_labelled, "labelled answers"),
    "grpo": (_encode_prompts, "prompts"),
}
