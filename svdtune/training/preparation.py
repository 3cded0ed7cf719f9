"""What a run needs before its model is adapted: rows read, checked for leaks and encoded, and the
base model loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from transformers import TrainingArguments

from svdtune import processes
from svdtune.data import Example, encode_all, read_rows, to_examples
from svdtune.errors import SvdtuneError
from svdtune.models import LoadedModel, check_end_token, load
from svdtune.training.arguments import training_arguments
from svdtune.training.leaks import check_leaks
from svdtune.training.recipe import DataSource, Recipe

Rows = list[dict[str, Any]]  # of SFT, lists of token ids; see `svdtune.data.preferences` for others


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its model is adapted; `example` is the first row, before packing, and
    `more` what the task's trainer takes besides."""

    loaded: LoadedModel
    train_rows: Rows
    eval_rows: Rows | None
    example: dict[str, Any]
    args: TrainingArguments
    more: Mapping[str, Any] = field(default_factory=dict)


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """Read, check and load what a recipe names.

    Raises:
        SvdtuneError: if a part is missing or does not fit the others, or if test questions are
            among the training rows.
    """
    train_examples = _read(recipe, recipe.data.train)
    eval_examples = _read(recipe, recipe.data.eval) if recipe.data.eval else None
    check_leaks(recipe, train_examples, eval_examples or [], console)
    if processes.under_deepspeed():
        early = training_arguments(recipe, len(train_examples))  # while it lives, ZeRO-3 partitions what is loaded  # noqa: F841
    loaded = load_base(recipe, chat=not isinstance(train_examples[0].prompt, str))
    train_rows = _encode(recipe, train_examples, loaded, console)
    eval_rows = _encode(recipe, eval_examples, loaded, console) if eval_examples else None
    example = train_rows[0]
    if recipe.training.packing:
        train_rows = _pack(train_rows, recipe, console)
    return Prepared(loaded, train_rows, eval_rows, example, training_arguments(recipe, len(train_rows)))


def _pack(rows: Rows, recipe: Recipe, console: Console) -> Rows:
    """TRL's packing, by best fit: no row is cut, since none is longer than data.max_length."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    packed = pack_dataset(Dataset.from_list(rows), recipe.data.max_length, "bfd").to_list()
    full = sum(len(row["input_ids"]) for row in packed) / (len(packed) * recipe.data.max_length)
    console.print(
        f"packing   {len(packed):,} sequences of {recipe.data.max_length} tokens, {full:.0%} full", highlight=False
    )
    return packed


def _read(recipe: Recipe, source: DataSource) -> list[Example]:
    data = recipe.data
    rows = read_rows(
        source.source,
        source.split,
        config=source.config,
        limit=source.limit,
        seed=source.seed,
    )
    return to_examples(rows, data.prompt, data.completion, source=source.source)


def load_base(recipe: Recipe, *, chat: bool) -> LoadedModel:
    """The base model of a recipe, with the end token checked; for a reward model, with a head that
    gives one number.

    Raises:
        SvdtuneError: if it cannot be loaded, end tokens disagree, or its context is too short.
    """
    section = recipe.model
    loaded = load(
        section.name,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        chat_template=section.chat_template,
        end_token=section.end_token,
        reward=recipe.training.task == "reward",
    )
    check_end_token(loaded.model, loaded.tokenizer, chat=chat or recipe.data.template == "chat")
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.data.max_length > context:
        raise SvdtuneError(
            f"data.max_length is {recipe.data.max_length}, and the context of {section.name} is {context} tokens; "
            f"set data.max_length to at most that"
        )
    return loaded


def _encode(recipe: Recipe, examples: list[Example], loaded: LoadedModel, console: Console) -> Rows:
    data = recipe.data
    rows, overlong = encode_all(
        examples, loaded.tokenizer, data.max_length, data.loss_on, data.template, overlong=data.overlong
    )
    tokens = sum(len(row["input_ids"]) for row in rows)
    how = "cut off at" if data.overlong == "cut" else "left out as longer than"
    note = f", {overlong:,} {how} {data.max_length} tokens" if overlong else ""
    source = examples[0].name.rpartition(" row ")[0]
    console.print(f"data      {source}: {len(rows):,} examples, {tokens:,} tokens{note}", highlight=False)
    return rows
