"""A first recipe for a user's own data: what the rows are, how long they are, and settings that fit
them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from svdtune._version import __version__
from svdtune.data import read_rows, to_examples
from svdtune.data.examples import COMPLETION, PROMPT, check_fields, fields_of
from svdtune.data.preferences import CHOSEN, LABEL, REJECTED, label_of, token_counts
from svdtune.data.standard import CHATS, capitals
from svdtune.errors import SvdtuneError
from svdtune.models import load_tokenizer
from svdtune.models.loader import context_length, load_config, locate
from svdtune.training.preview import show_example, show_judged
from svdtune.training.recipe import check_recipe
from svdtune.training.task_rows import TaskRows
from svdtune.training.yaml_files import read_yaml

# Where docs/guide.md says to start a search, for an adapter of rank 32 or so on a small model.
RATES = {"sara": "1e-2", "mosara": "3e-2", "sorsa": "1e-4", "full": "1e-4"}
OTHER_RATE = "1e-3"  # LoRA's and its relatives'
_GENTLER = 0.1  # of the rate, for tasks that move a model a little from a reference
_NO_RANK = ("full", "mosara")
# What the guide recommends beside the paper's form, which stays the default.
_BESIDE = {
    "sorsa": "\n  # components: middle  # forgets less than the paper's first ones, with learning_rate 3e-3 at rank 4",
    "sara": "\n  # init: zero_v  # starts as the model does and forgets less than the paper's start, with learning_rate 3e-2",
}
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_ROWS_A_STEP = 32
_ANY_LENGTH = 10**9
_FEW = 40  # rows of which none are held out
SCORED = 0.2  # of the rows, where a recipe is to be scored and no test set is named
_ANSWERS = (16, 32, 64, 128, 256, 512, 1024)  # tokens
# How a format is told to the user, by the columns that tell it, and what else is read.
_FORMATS = {
    ("chosen", "rejected"): (
        "preferences: the answer that is chosen, and the one that is rejected",
        ("prompt", "instruction", "input", *CHATS),
    ),
    ("completion", "label"): ("labelled answers", ("prompt",)),
    ("messages",): ("chats (messages); the assistant's turns are trained on", ("tools",)),
    ("conversations",): ("chats (ShareGPT's conversations); the assistant's turns are trained on", ("tools",)),
    ("instruction", "output"): ("Alpaca's instruction, input and output", ("input",)),
    ("prompt", "completion"): ("prompts and completions", ("tools",)),
    ("text",): ("plain text, all of which is trained on", ()),
}


@dataclass(frozen=True)
class Draft:
    """A recipe for some data, and what was seen of the data.

    Attributes:
        text: the recipe, YAML with comments.
        format: what the rows are, in words.
        rows: how many there are.
        tokens: of all rows.
        longest: tokens of the longest row.
        overlong: by length in tokens, how many rows are longer.
        empty: how many rows have an empty answer.
        unread: the columns that nothing is made of.
    """

    text: str
    format: str
    rows: int
    tokens: int
    longest: int
    overlong: dict[int, int]
    empty: int
    unread: list[str]


@dataclass(frozen=True)
class Scoring:
    """What a recipe's runs are scored on.

    Attributes:
        test: a source of its own; None for a share of the rows, which no run trains on.
        task: as `evaluation.task`; None to tell it by the answers: number where every one is a
            number, else exact.
        answer: the field of the reference answer; None for the completion.
    """

    test: str | None = None
    task: str | None = None
    answer: str | None = None


def draft(
    model: str,
    data: str,
    *,
    method: str = "sorsa",
    task: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    scoring: Scoring | None = None,
    origin: Mapping[str, Any] | None = None,
    console: Console,
) -> Draft:
    """Look at rows, and write a recipe for them.

    Args:
        model: hub name, local folder, .gguf file, or smollm2-135m; its tokenizer and configuration
            are read, no weight.
        data: as `data.train` of a recipe.
        method: as `method.name` of a recipe.
        task: as `training.task`; by default told by the columns.
        prompt: field of the prompt, or a text with fields in braces, where the columns are those of
            no format.
        completion: likewise.
        scoring: what its runs are scored on; None for a recipe that says nothing of it.
        origin: `revision` and `trust_remote_code` of a hub model, which the recipe keeps.
        console: where the first example is shown.

    Raises:
        SvdtuneError: the rows are of no format that is known, an option is not one, or the model
            has no tokenizer.
    """
    first = read_rows(data, limit=100)
    columns = sorted({name for row in first for name in row})
    task = task or _task_of(first)
    found, read = _format_of(columns, task, prompt, completion)
    origin = {name: value for name, value in (origin or {}).items() if value}
    tokenizer = load_tokenizer(model, **origin)
    settings = _settings(model, data, method, task, _template(tokenizer, columns, prompt), prompt, completion)
    settings["model"] |= origin
    if scoring is not None:
        settings["evaluation"] = _evaluation(scoring, data, prompt, completion, tokenizer)
        if scoring.test is None:
            settings["data"]["train"] = {"source": data, "without": SCORED}
    seen = check_recipe(settings | {"data": settings["data"] | {"max_length": _ANY_LENGTH}}, "the recipe")
    made = TaskRows(seen, seen.data.train[0].plain)
    rows = made.encode(tokenizer, Console(quiet=True))
    lengths = token_counts(rows)
    (show_example if task == "sft" else show_judged)(console, rows[0], tokenizer)
    settings["data"]["max_length"] = longest = _length_for(lengths, _context(model, **origin))
    settings["training"] |= _amount(len(rows))
    if longest < max(lengths):
        settings["data"]["overlong"] = "drop"
    text = _written(settings, lengths)
    overlong = {length: sum(one > length for one in lengths) for length in (*_LENGTHS, longest)}
    check_recipe(read_yaml(text, "the recipe") | {"output": settings["output"]})
    judged = task != "sft" and any(isinstance(row.get(one), list) for row in first for one in (CHOSEN, COMPLETION))
    opened = judged and any(isinstance(row.get(PROMPT), str) for row in first)  # a chat of text, after `system`
    unread = [name for name in columns if name not in read and not (opened and name == "system")]
    return Draft(text, found, len(rows), sum(lengths), max(lengths), overlong, made.empty, unread)


def _task_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The task that columns tell; SFT is what is left. A label may be anything: it judges answers
    where KTO takes every one that is looked at."""
    columns = {name for row in rows for name in row}
    if {CHOSEN, REJECTED} <= columns:
        return "dpo"
    judged = all(label_of(row.get(LABEL)) is not None for row in rows)
    return "kto" if judged and columns & {COMPLETION, *CHATS} else "sft"


def _format_of(
    columns: Sequence[str], task: str, prompt: str | None, completion: str | None
) -> tuple[str, Sequence[str]]:
    """What the rows are, in words, and the columns that are read."""
    if prompt is not None:
        read = fields_of(prompt, completion or COMPLETION)
        return f"rows with {prompt} and {completion or COMPLETION}", read
    system = ["system"] if {*CHATS} & {*columns} else []
    if "instruction" in columns and PROMPT not in columns:
        system = ["system", "history"]
    if task == "kto" and COMPLETION not in columns:
        return "labelled answers, the last of each chat", [*CHATS, LABEL, "tools", *system]
    for told, (words, more) in _FORMATS.items():
        if {*told} <= {*columns} and (LABEL not in told or task == "kto"):
            return words, [*told, *more, *system]
    raise SvdtuneError(
        f"the columns {', '.join(map(repr, columns))} are those of no format (messages, conversations, prompt and "
        f"completion, instruction and output, text, chosen and rejected, completion and label{capitals(columns)}). Say "
        "which hold what is asked and answered: --prompt question --completion answer, or texts with fields in braces"
    )


def _template(tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], prompt: str | None) -> str:
    """The chat template where the tokenizer has one, and the rows ask something."""
    asks = prompt is not None or not {"text"} & {*columns} or {"prompt", "instruction"} & {*columns}
    return "chat" if asks and tokenizer.chat_template else "plain"


def _settings(
    model: str, data: str, method: str, task: str, template: str, prompt: str | None, completion: str | None
) -> dict[str, Any]:
    rate = RATES.get(method, OTHER_RATE)
    if task != "sft":
        rate = f"{float(rate) * _GENTLER:.0e}".replace("e-0", "e-")
    fields = {"prompt": prompt, "completion": completion}
    return {
        "model": {"name": model},
        "method": {"name": method} | ({} if method in _NO_RANK else {"r": 32}),
        "data": {"train": data, "template": template} | {name: value for name, value in fields.items() if value},
        "training": {"task": task, "learning_rate": float(rate)},
        "output": {"dir": "runs/new"},
    }


def _evaluation(
    scoring: Scoring, data: str, prompt: str | None, completion: str | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The evaluation section: the rows, how they are graded, and room for the longest answer."""
    name = scoring.test or data
    source = {"source": name} | ({"only": SCORED} if scoring.test is None else {})
    rows = read_rows(name, only=None if scoring.test else SCORED)
    found = to_examples(rows, prompt or PROMPT, completion or COMPLETION, source=name)
    if scoring.answer is not None:
        for example in found:
            check_fields(example.row, [scoring.answer], example.name)
    references = [str(one.row[scoring.answer]) if scoring.answer else one.completion for one in found]
    if not all(reference.strip() for reference in references):
        raise SvdtuneError(
            f"rows of {name} have no answer to grade against; name its field with --answer, or rows that have one"
        )
    numbers = all(re.fullmatch(r"\s*-?[\d,]*\.?\d+\s*", reference) for reference in references)
    longest = max(len(tokenizer(one.completion)["input_ids"]) for one in found)
    return {
        "data": source,
        "task": scoring.task or ("number" if numbers else "exact"),
        **({} if scoring.answer is None else {"answer": scoring.answer}),
        "max_new_tokens": next((length for length in _ANSWERS if length > longest), _ANSWERS[-1]),
    }


def _context(model: str, **origin: Any) -> int | None:
    """How many tokens a model can see, None where that is not said."""
    path = locate(model)
    if str(path).endswith(".gguf"):
        return None
    return context_length(load_config(path, **origin))


def _length_for(lengths: Sequence[int], context: int | None) -> int:
    """The least usual length that holds every row, else the context, at most 8,192 tokens."""
    most = min(context or _LENGTHS[-1], _LENGTHS[-1])
    return next((length for length in _LENGTHS if max(lengths) <= length <= most), most)


def _amount(rows: int) -> dict[str, Any]:
    """Batches and epochs for so many rows: steps of 32 rows, fewer where an epoch has few steps."""
    batch_size = min(8, rows)
    accumulation = max(1, min(_ROWS_A_STEP, rows // 10) // batch_size)
    return {"batch_size": batch_size, "gradient_accumulation": accumulation, "epochs": 3 if rows < 10_000 else 1}


def _written(settings: dict[str, Any], lengths: Sequence[int]) -> str:
    """The settings as YAML that says what they are for."""
    model, method, data, training = (settings[name] for name in ("model", "method", "data", "training"))
    rank = (f"\n  r: {method['r']}" if "r" in method else "") + _BESIDE.get(method["name"], "")
    fields = "".join(f"\n  {name}: {json.dumps(data[name])}" for name in ("prompt", "completion") if name in data)
    overlong = data.get("overlong", "error")
    scored = settings.get("evaluation")
    kept = len(lengths) >= _FEW and scored is None
    held_out = "\n  eval: 5%  # of the rows, held out for a loss that is not trained on" if kept else ""
    gpu = torch.cuda.is_available()
    origin = "".join(f"\n  {name}: {json.dumps(value)}" for name, value in model.items() if name != "name")
    return f"""\
# Written by svdtune {__version__} for {len(lengths):,} rows of {sum(lengths):,} tokens, the longest of {max(lengths):,}.
# Every setting can be changed for one run: svdtune train FILE --method.r 64
model:
  name: {json.dumps(model["name"])}{origin}
  dtype: {"bfloat16" if gpu else "float32"}

method:
  name: {method["name"]}  # sara, mosara, sorsa, lora, or any other PEFT method; full trains everything{rank}

data:
  train: {json.dumps(data["train"])}{held_out}{fields}
  template: {data["template"]}  # plain, chat (the tokenizer's), or a text with {{prompt}}
  max_length: {data["max_length"]}
  overlong: {overlong}  # rows that are longer: error, drop or cut

training:
  task: {training["task"]}
  learning_rate: {training["learning_rate"]:g}  # the setting that matters most: try three times more and less
  epochs: {training["epochs"]}
  batch_size: {training["batch_size"]}
  gradient_accumulation: {training["gradient_accumulation"]}  # an optimizer step sees batch_size times this many rows
  schedule: cosine
  warmup: 0.03  # of all steps
  precision: {"bf16" if gpu else "fp32"}
{_scored(scored)}"""


def _scored(section: dict[str, Any] | None) -> str:
    """The lines of an evaluation section."""
    if section is None:
        return ""
    answer = f"\n  answer: {json.dumps(section['answer'])}" if "answer" in section else ""
    return f"""
evaluation:
  data: {json.dumps(section["data"])}  # what a run is scored on, and never trains on
  task: {section["task"]}  # number, letter, exact, or a function of yours: module:function{answer}
  max_new_tokens: {section["max_new_tokens"]}
"""
