"""The rows of each task: read by its format, made into tokens, and those of several sources each
shown as often as its weight says.

Every source is read, encoded and remembered by itself, so a change of weights or of one file leaves
the others cached.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svdtune.cache import trim
from svdtune.data import Example, encode_all, read_rows, to_examples
from svdtune.data.cache import content_of, key_of, tokenizer_facts
from svdtune.data.columns import Columns
from svdtune.data.cores import in_chunks, uncollected
from svdtune.data.encoding import CHAT, prompt_ids
from svdtune.data.examples import has_empty_answer
from svdtune.data.leaks import Questions, questions
from svdtune.data.preferences import encode_labelled, encode_pairs, to_labelled, to_pairs, token_counts
from svdtune.errors import SvdtuneError
from svdtune.spectra import store
from svdtune.training.recipe import Recipe
from svdtune.training.sections import DataSource

_REFERRED = ("dpo", "kto", "grpo")  # compared with the base while they are trained
Judged = list[tuple[Example, Any]]  # an example, and what the task has to it
Rows = Sequence[dict[str, Any]]  # of SFT, lists of token ids; see `svdtune.data.preferences` for others
Made = tuple[dict[str, Tensor], dict[str, Any]]  # what the cache keeps: tensors and facts
Entry = tuple[dict[str, Tensor], dict[str, Any], bool]  # and whether it was there


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


@uncollected()
def read_task(recipe: Recipe, source: DataSource) -> Judged:
    """The examples of a source, each with what the task has to it: the rejected answer, the label,
    the row that rewards look at, or nothing.

    Raises:
        SvdtuneError: if the source or a row is malformed, or lacks what the task learns from.
    """
    task, data = recipe.training.task, recipe.data
    rows = read_rows(**source.model_dump())
    if task == "sft":
        return [(example, None) for example in to_examples(rows, data.prompt, data.completion, source=source.source)]
    if task == "kto":
        return list(to_labelled(rows, data.prompt, data.completion or "completion", source=source.source))
    if task == "grpo":
        examples = to_examples(rows, data.prompt, source=source.source)
        # What a text prompt follows is sampled with it: all rows as messages, or none.
        whole = data.template == CHAT and any(example.before for example in examples)
        texts = [isinstance(example.prompt, str) and not whole for example in examples]
        return [
            (example, {**example.row, "prompt": example.asked_text if text else example.asked})
            for example, text in zip(examples, texts, strict=True)
        ]
    return list(to_pairs(rows, data.prompt, task=task, source=source.source))


class TaskRows:
    """The rows of a source for a task. They are read only where the cache lacks what is asked of
    them.

    Everything that has to read them raises SvdtuneError as `read_task` does.
    """

    def __init__(self, recipe: Recipe, source: DataSource):
        self.recipe, self.source = recipe, source
        self._file = content_of(source.source, None)
        self.empty = self.overlong = 0  # rows with an empty answer, and too long ones, once they are encoded

    @cached_property
    def judged(self) -> Judged:
        """The examples, read."""
        return read_task(self.recipe, self.source)

    @property
    def questions(self) -> Questions:
        """What the rows ask; of a chat, also what each of the user's turns does."""
        tensors = self._asked[0]
        return Questions(tensors["digests"].numpy(), tensors["rows"].numpy())

    @property
    def is_chat(self) -> bool:
        """Whether the first prompt is messages."""
        return bool(self._asked[1]["chat"])

    def encode(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> Rows:
        """The tokens of the examples; a line says how many there are.

        Raises:
            SvdtuneError: if an example does not fit, or none is left.
        """
        data, task = self.recipe.data, self.recipe.training.task
        if task == "grpo":  # whose rewards look at the rows themselves
            rows, overlong = _encode_prompts(
                self.judged, tokenizer, data.max_length, data.template, overlong=data.overlong
            )
            self._say(console, len(rows), sum(token_counts(rows)), overlong)
            return rows
        known = tokenizer_facts(tokenizer, data.template)
        how = known and [*known, data.template, data.max_length, data.loss_on, data.overlong]
        tensors, facts, cached = self._remembered("rows", how, lambda: self._encoded(tokenizer))
        columns = Columns.of_tensors(tensors)
        self.empty, self.overlong = facts["empty"], facts["overlong"]
        self._say(console, len(columns), sum(token_counts(columns)), facts["overlong"], " (cached)" if cached else "")
        return columns

    @cached_property
    def _asked(self) -> Entry:
        def ask() -> Made:
            found = Questions.join(in_chunks(_ask, self.judged))
            tensors = {"digests": torch.from_numpy(found.digests), "rows": torch.from_numpy(found.rows)}
            return tensors, {"chat": not isinstance(self.judged[0][0].prompt, str)}

        return self._remembered("questions", [], ask)

    def _encoded(self, tokenizer: PreTrainedTokenizerBase) -> Made:
        data, task = self.recipe.data, self.recipe.training.task
        if task == "sft":
            examples = [example for example, _ in self.judged]
            how_to = (data.max_length, data.loss_on, data.template)
            columns, overlong = encode_all(examples, tokenizer, *how_to, overlong=data.overlong)
        else:
            encode = encode_labelled if task == "kto" else encode_pairs
            columns, overlong = encode(self.judged, tokenizer, data.max_length, data.template, overlong=data.overlong)
        empty = sum(has_empty_answer(example) for example, _ in self.judged)
        return columns.to_tensors(), {"overlong": overlong, "empty": empty}

    def _remembered(self, kind: str, how: list[Any] | None, make: Callable[[], Made]) -> Entry:
        """What the cache has of these rows, else what `make` gives.

        Args:
            kind: of the cache's kinds.
            how: all that decides it besides the rows, None where that cannot be told.
            make: gives tensors and facts.
        """
        key = None if how is None or self._file is None else self._key(kind, self._file, how)
        if key is not None and (found := store.load(kind, key)) is not None:
            return *found, True
        if self._file is None and how is not None:  # the rows themselves are the key, once they are read
            content = content_of("", [example.row for example, _ in self.judged])
            key = None if content is None else self._key(kind, content, how)
            if key is not None and (found := store.load(kind, key)) is not None:
                return *found, True
        made = make()
        if key is not None and self._file == content_of(self.source.source, None):  # as it was when it was read
            store.store(kind, key, *made)
            trim()
        return *made, False

    def _key(self, kind: str, content: str, how: list[Any]) -> str:
        data = self.recipe.data
        return key_of(
            kind=kind,
            content=content,
            how=how,
            read=[
                self.recipe.training.task,
                data.prompt,
                data.completion,
                self.source.model_dump(exclude={"source", "seed"}),
            ],
        )

    def _say(self, console: Console, count: int, tokens: int, overlong: int, cached: str = "") -> None:
        data = self.recipe.data
        how = "cut off at" if data.overlong == "cut" else "left out as longer than"
        note = f", {overlong:,} {how} {data.max_length} tokens" if overlong else ""
        note += f", {self.empty:,} with an empty answer" if self.empty else ""
        what = f"{count:,} {_CALLED[self.recipe.training.task]}, {tokens:,} tokens"
        console.print(f"data      {self.source.source}: {what}{note}{cached}", highlight=False)


def _ask(judged: Sequence[tuple[Example, Any]]) -> Questions:
    return Questions.of([questions(example.prompt, example.completion) for example, _ in judged])


def _encode_prompts(
    judged: Judged, tokenizer: PreTrainedTokenizerBase, max_length: int, template: str, *, overlong: str
) -> tuple[Rows, int]:
    rows: list[dict[str, Any]] = []
    for example, row in judged:
        if example.tools:
            raise SvdtuneError(
                f"{example.name}: the row has tools, which training.task: grpo does not offer while it samples answers; "
                "write them into the prompt, or rename the column, which the rewards then get under that name"
            )
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


_CALLED = {"sft": "examples", "dpo": "pairs", "reward": "pairs", "kto": "labelled answers", "grpo": "prompts"}


class TrainRows:
    """All rows that a recipe trains on, one source after another; as `TaskRows` is of one."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.parts = [TaskRows(recipe, source.plain) for source in recipe.data.train]

    @property
    def name(self) -> str:
        """What to call the rows in a message."""
        return " and ".join(source.source for source in self.recipe.data.train)

    @property
    def judged(self) -> Judged:
        """The examples of all sources, each once."""
        return [one for part in self.parts for one in part.judged]

    @property
    def questions(self) -> Questions:
        """What the rows ask, each once."""
        return Questions.join(part.questions for part in self.parts)

    @property
    def is_chat(self) -> bool:
        """Whether a source's first prompt is messages."""
        return any(part.is_chat for part in self.parts)

    def encode(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> Rows:
        """The tokens of the examples, as often as their weights say; a line for each source says
        how many there are.

        Raises:
            SvdtuneError: as `TaskRows.encode`.
        """
        encoded = [part.encode(tokenizer, console) for part in self.parts]
        weights = [source.weight for source in self.recipe.data.train]
        if len(encoded) == 1 and weights == [1]:
            return encoded[0]
        seed = self.recipe.training.seed
        orders = [places(len(rows), weight, seed) for rows, weight in zip(encoded, weights, strict=True)]
        told = ", ".join(
            f"{len(order):,} of {source.source} (weight {source.weight:g})"
            for order, source in zip(orders, self.recipe.data.train, strict=True)
        )
        console.print(f"mixture   {told}", highlight=False, soft_wrap=True)
        taken = zip(encoded, orders, strict=True)
        if all(isinstance(rows, Columns) for rows in encoded):
            return Columns.join(rows.take(order) for rows, order in taken if isinstance(rows, Columns))
        return [rows[at] for rows, order in taken for at in order]


def places(count: int, weight: float, seed: int) -> Sequence[int]:
    """Which of `count` rows a pass shows: all of them as often as the weight's whole part says, and
    a share as large as the rest of it, drawn by lot and in the rows' order; at least one row.

    The draw depends on the seed and the count alone, so a run that is resumed has the same rows.
    """
    whole = int(weight)
    rest = max(round((weight - whole) * count), 0 if whole else 1)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:rest]
    return [*range(count)] * whole + sorted(drawn.tolist())
