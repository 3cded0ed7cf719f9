"""Evaluate: generate a completion for every item, grade it, keep it on disk, and report the accuracy.

items → batches by length → completions → grades → predictions.jsonl → result.json
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from svdtune._version import __version__
from svdtune.errors import SvdtuneError
from svdtune.evaluation.decoding import context_length, end_token_ids, greedy_batch, plan_batches
from svdtune.evaluation.interval import Interval, wilson_interval
from svdtune.evaluation.items import Item, check_items
from svdtune.evaluation.predictions import Prediction, PredictionStore
from svdtune.evaluation.tasks import Task
from svdtune.export.folder import explain_write_errors
from svdtune.models import LoadedModel


class Score(NamedTuple):
    """How many items are right, which share of all that is, and Wilson's 95 % interval of the share."""

    correct: int
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation, as `result.json` has it.

    Attributes:
        task: Name of the task that graded.
        n: Number of items.
        strict: The score of strict grading; None where the task grades no single completions.
        paper: The score of the paper's grading; None where no paper graded such items.
        metrics: Scores of all completions together, such as BLEU.
        unended: How many completions were cut at the length limit; where it is large, so should the limit be.
        seconds: Time this call spent generating; less than the whole where it continued an earlier one.
        settings: Everything the predictions depend on, and how they were made.
        folder: Where predictions and result lie.
    """

    task: str
    n: int
    strict: Score | None
    paper: Score | None
    metrics: dict[str, float]
    unended: int
    seconds: float
    settings: dict[str, Any]
    folder: Path

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, strictly graded."""
        return self.strict and self.strict.accuracy


def evaluate(
    loaded: LoadedModel,
    items: Sequence[Item],
    task: Task,
    output: str | Path,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    settings: dict[str, Any] | None = None,
    restart: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a model, with or without an adapter on it, by greedy decoding.

    Every batch is on disk before the next one starts. The same call after an interruption continues with the items that
    are missing; after a finished run it generates nothing.

    Args:
        loaded: Model and tokenizer.
        items: What to ask; their order is the order of `predictions.jsonl`.
        task: How to grade.
        output: Folder for `predictions.jsonl`, `settings.json` and `result.json`.
        max_new_tokens: Length limit of a completion.
        batch_size: Items generated together.
        settings: Further settings to record, such as the data's name; a rerun must bring the same.
        restart: Drop an earlier run's predictions in `output`.
        on_progress: Called with (items done, items in all) at the start and after each batch.

    Raises:
        SvdtuneError: If the items, the end tokens or the output folder cannot be used.
    """
    output = Path(output).expanduser()
    if batch_size < 1:
        raise SvdtuneError(f"batch_size must be at least 1, got {batch_size}")
    model = loaded.model.eval()
    check_items(items, max_new_tokens, context_length(model))
    for item in items:
        task.check(item.reference)  # a reference without an answer shows now, not after an hour
    identity = {
        **(settings or {}),
        "model": loaded.name,
        "weights": weights_fingerprint(model),
        "items": items_fingerprint(items),
        "task": task.name,
        "max_new_tokens": max_new_tokens,
        "end_token_ids": end_token_ids(model, loaded.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    started = time.perf_counter()
    with explain_write_errors(output):
        store = PredictionStore(output, identity, restart)
        _generate_missing(loaded, items, task, store, max_new_tokens, batch_size, on_progress or (lambda *_: None))
        how = {"batch_size": batch_size, "device": str(model.device), **_versions()}
        result = _summarize(store, task, time.perf_counter() - started, identity | how)
        store.finish(_as_json(result))
    return result


def _generate_missing(
    loaded: LoadedModel,
    items: Sequence[Item],
    task: Task,
    store: PredictionStore,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Complete, grade and store every item that the store lacks; each batch is stored before the next one starts."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    on_progress(len(store.done), len(items))
    for batch in plan_batches([item.tokens for item in items], batch_size):
        missing = [index for index in batch if index not in store.done]
        if not missing:
            continue
        completions = greedy_batch(model, [items[index].tokens for index in missing], max_new_tokens, ends, pad)
        texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
        store.append(
            _grade(index, items[index], text, task, len(completion.tokens), completion.ended)
            for index, text, completion in zip(missing, texts, completions, strict=True)
        )
        on_progress(len(store.done), len(items))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and up to 64 evenly spread values of every parameter and buffer that is saved.

    Cheap enough for any model, and changed by any training step, which moves nearly every value.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // 64))].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def items_fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 over every prompt, its tokens and its reference, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.id, item.prompt, item.tokens, item.reference)).encode())
    return digest.hexdigest()


def _grade(index: int, item: Item, completion: str, task: Task, tokens: int, ended: bool) -> Prediction:
    strict, paper = task.grade(completion, item.reference)
    return Prediction(
        index=index,
        id=item.id,
        prompt=item.prompt,
        completion=completion,
        reference=item.reference,
        extracted=strict and strict.extracted,
        correct=strict and strict.correct,
        paper_extracted=paper and paper.extracted,
        paper_correct=paper and paper.correct,
        tokens=tokens,
        ended=ended,
    )


def _summarize(store: PredictionStore, task: Task, seconds: float, settings: dict[str, Any]) -> Evaluation:
    done = [store.done[index] for index in sorted(store.done)]
    metrics = task.metrics([p.completion for p in done], [p.reference for p in done]) if task.metrics else {}
    return Evaluation(
        task=task.name,
        n=len(done),
        strict=_score([p.correct for p in done]) if task.strict else None,
        paper=_score([p.paper_correct for p in done]) if task.paper else None,
        metrics=dict(metrics),
        unended=sum(not prediction.ended for prediction in done),
        seconds=round(seconds, 3),
        settings=settings,
        folder=store.folder,
    )


def _score(verdicts: list[bool | None]) -> Score:
    correct = sum(map(bool, verdicts))
    return Score(correct, correct / len(verdicts), wilson_interval(correct, len(verdicts)))


def _as_json(result: Evaluation) -> dict[str, Any]:
    scores = {"strict": _score_json(result.strict), "paper": _score_json(result.paper)}
    return asdict(result) | scores | {"folder": str(result.folder)}


def _score_json(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    return score._asdict() | {"interval": {"method": "wilson", "level": 0.95, **score.interval._asdict()}}


def _versions() -> dict[str, str]:
    return {"svdtune": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
