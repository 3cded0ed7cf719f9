"""What a run predicts of texts it does not train on, measured inside the run: the loss of reference
answers, and how far the tuned model's next tokens are from the base's.

RUN/analysis/measured.jsonl has one line a checkpoint: {"step", "seconds", "peak_bytes", "sets":
{name: {"nll": [items], "kl": [items]}}, "left_out": {name: items longer than data.max_length}}. No
weight is saved for it, and the run's steps stay what they are without it, bit for bit.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svdtune.data import Collator
from svdtune.data.columns import Columns
from svdtune.data.encoding import IGNORED
from svdtune.data.leaks import refuse_leaks
from svdtune.lab.study.spec import Measure, MeasuredSet
from svdtune.system import read_objects, replace_text
from svdtune.training.collators import AUTOCAST
from svdtune.training.folder import ANALYSIS
from svdtune.training.movement import sampled_steps
from svdtune.training.preparation import load_base
from svdtune.training.recipe import Recipe
from svdtune.training.task_rows import TaskRows, TrainRows

MEASURED = f"{ANALYSIS}/measured.jsonl"
_BATCH = 4096  # tokens of a batch, padding among them
_ROWS = 1024  # rows of logits in float32 at a time: 200 MB for 49,152 tokens


class MeasurementCallback(TrainerCallback):
    """Measures the live model before the first step and at equal fractions of the steps.

    What the model is compared with is a second copy of the base, in the host's memory between two
    checkpoints: switched off, an adapter need not leave the base (PiSSA's leaves the rest of its
    weights), and full fine-tuning has none to switch off.

    Args:
        recipe: of the run; tokens are predicted in its precision.
        section: what is measured.
        run: the run folder.

    Raises (when training begins):
        SvdtuneError: a set cannot be read, or its questions are among the training rows.
    """

    def __init__(self, recipe: Recipe, section: Measure, run: Path):
        self.recipe, self.section, self.path = recipe, section, run / MEASURED
        self.rows: dict[str, Columns] = {}
        self.left_out: dict[str, int] = {}
        self.base: Any = None
        self.pad_id = self.peak = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        began = time.monotonic()
        earlier = read_objects(self.path)
        kept = [line for line in earlier if 0 < line["step"] <= state.global_step]
        self.peak = max((line["peak_bytes"] or 0 for line in kept), default=0)
        first = earlier[:1] if state.global_step else []
        self.prepare(more["processing_class"], [*first, *kept])
        if state.global_step == 0:
            self.take(more["model"], 0, began)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # the start's

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.global_step in sampled_steps(self.section.checkpoints + 1, state.max_steps):
            self.take(more["model"], state.global_step)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, kept: Sequence[dict[str, Any]] = ()) -> None:
        """Load the base, read the sets, and begin the file with the lines that stay."""
        self.base = load_base(self.recipe, chat=False).model.eval()
        self.rows, self.left_out = measured_rows(self.recipe, self.section, tokenizer)
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def take(self, model: nn.Module, step: int, began: float | None = None) -> None:
        """Measure every set, and append the line, with the seconds since `began` or now."""
        began = time.monotonic() if began is None else began
        cuda = torch.cuda.is_available()
        if step:  # what came before the first step is not the steps' memory
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() if cuda else 0)
        dtype = AUTOCAST.get(self.recipe.training.precision)
        device = next(model.parameters()).device
        autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
        with undisturbed(model), autocast:
            self.base.to(device)
            sets = {
                name: losses(model, self.base if name in self.section.text else None, rows, self.pad_id)
                for name, rows in self.rows.items()
            }
            self.base.to("cpu")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the memory of measuring is not the run's
        line = {
            "step": step,
            "seconds": round(time.monotonic() - began, 3),
            "peak_bytes": self.peak or None,
            "sets": sets,
            "left_out": self.left_out,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def measured_rows(
    recipe: Recipe, section: Measure, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Columns], dict[str, int]]:
    """The tokens of every set, and of those that have some how many items do not fit into
    data.max_length: answers with the recipe's template around their questions, and labels on the
    answers; text as it stands, and labels on all of it.

    Of a set with more than `section.items` items so many are drawn, the same in every run.

    Raises:
        SvdtuneError: a set cannot be read, no item fits into data.max_length, or the run trains on
            what a set asks.
    """
    quiet = Console(quiet=True)
    train = TrainRows(recipe)
    trained = train.questions
    found: dict[str, Columns] = {}
    left_out: dict[str, int] = {}
    for name, one in (section.answers | section.text).items():
        rows = TaskRows(_recipe_of(recipe, one, text=name in section.text), one.rows())
        refuse_leaks(rows.questions, trained, name, train.name)
        encoded = rows.encode(tokenizer, quiet)
        assert isinstance(encoded, Columns)
        left_out |= {name: rows.overlong} if rows.overlong else {}
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0))
        found[name] = encoded.take(sorted(order[: section.items].tolist()))
    return found, left_out


def _recipe_of(recipe: Recipe, one: MeasuredSet, *, text: bool) -> Recipe:
    """The recipe as it would encode a set."""
    prompt, completion = one.fields()
    template = one.template or ("plain" if text else recipe.data.template)
    loss_on = "all" if text else "response"
    changes = {"prompt": prompt, "completion": completion, "template": template, "loss_on": loss_on}
    data = recipe.data.model_copy(update={**changes, "overlong": "drop"})
    return recipe.model_copy(
        update={"data": data, "training": recipe.training.model_copy(update={"task": "sft", "packing": False})}
    )


@torch.no_grad()
def losses(model: Any, base: Any, rows: Columns, pad_id: int) -> dict[str, list[float]]:
    """Of every item the mean over its labelled tokens of −log p(token), and with a base also that
    of KL(base ‖ model) over all next tokens there; both in nats, from logits in float32.

    Args:
        model: in evaluation mode.
        base: likewise, on the same device, or None.
        rows: the items' tokens and labels.
        pad_id: fills the batches, on the right.

    Returns:
        {"nll": [items]} and with a base "kl", in the order of the rows, rounded to six digits.
    """
    device = next(model.parameters()).device
    found = {name: [0.0] * len(rows) for name in (["nll"] if base is None else ["nll", "kl"])}
    for members in _batches([len(rows[at]["input_ids"]) for at in range(len(rows))]):
        batch = {name: x.to(device) for name, x in Collator(pad_id)([rows[at] for at in members]).items()}
        targets = batch.pop("labels")[:, 1:]
        counted = targets != IGNORED
        logits = _logits(model, batch)[counted]
        others = None if base is None else _logits(base, batch)[counted]
        for name, values in _of_tokens(logits, others, targets[counted]).items():
            tokens = torch.zeros(targets.shape, device=device, dtype=torch.float64)
            tokens[counted] = values.double()
            for at, mean in zip(members, (tokens.sum(1) / counted.sum(1)).tolist(), strict=True):
                found[name][at] = float(f"{mean:.6g}")
    return found


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of every token but the last, [rows, length − 1, vocabulary]; not those of tokens that prompt
    tuning puts ahead."""
    length = batch["input_ids"].shape[1]
    logits: Tensor = model(**batch).logits
    return logits[:, -length:-1]


def _of_tokens(logits: Tensor, others: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """−log p of each token [tokens], and KL(other ‖ this) of each place where others are given."""
    nll, kl = [], []
    for at in range(0, len(targets), _ROWS):
        rows = slice(at, at + _ROWS)
        log_p = logits[rows].float().log_softmax(-1)
        nll.append(-log_p.gather(1, targets[rows, None])[:, 0])
        if others is not None:
            log_q = others[rows].float().log_softmax(-1)
            kl.append((log_q.exp() * (log_q - log_p)).sum(-1))
    return {"nll": torch.cat(nll)} | ({"kl": torch.cat(kl)} if kl else {})


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Items of like length together, at most `_BATCH` tokens with their padding."""
    members: list[int] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if members and (len(members) + 1) * lengths[at] > _BATCH:
            yield members
            members = []
        members.append(at)
    if members:
        yield members


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, until the block ends; then modes and random numbers are exactly as
    before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
