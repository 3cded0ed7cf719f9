"""Evaluate: generate a completion for every item, grade it, keep it on disk, and report the
accuracy.

items → batches by length → completions → grades → predictions.jsonl → result.json
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from svdtune._version import __version__
from svdtune.errors import SvdtuneError
from svdtune.evaluation.engines import Engine, TransformersEngine
from svdtune.evaluation.generation import GREEDY, Completion, Decoding, plan_batches
from svdtune.evaluation.interval import Interval, Metric, pass_at, wilson_interval
from svdtune.evaluation.items import Item, check_items
from svdtune.evaluation.predictions import Prediction, PredictionStore
from svdtune.evaluation.tasks import Grades, Reference, Task
from svdtune.models import LoadedModel
from svdtune.system import explain_write_errors, is_out_of_memory

_SIDE_BY_SIDE = 16  # graders at once: each may use a gigabyte of memory


class Score(NamedTuple):
    """How many completions are right, which share of all that is, and the share's 95 % interval.

    The interval is Wilson's; with several samples an item, a bootstrap interval over the items.
    """

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
        metrics: Scores of all completions together, such as BLEU, and pass@k of programs and of
            several samples an item.
        unended: How many completions were cut, at the length limit or in a loop; where it is large,
            so should the limit be.
        seconds: Time this call spent generating; less than the whole where it continued an earlier
            one.
        settings: Everything the predictions depend on, and how they were made.
        folder: Where predictions and result lie.
    """

    task: str
    n: int
    strict: Score | None
    paper: Score | None
    metrics: dict[str, Metric]
    unended: int
    seconds: float
    settings: dict[str, Any]
    folder: Path

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, strictly graded."""
        return self.strict and self.strict.accuracy


def evaluate(
    engine: Engine | LoadedModel,
    items: Sequence[Item],
    task: Task,
    output: str | Path,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    decoding: Decoding = GREEDY,
    settings: dict[str, Any] | None = None,
    restart: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a model, with or without an adapter on it.

    Every batch is on disk before the next one starts. The same call after an interruption continues
    with the items that are missing; after a finished run it generates nothing.

    Args:
        engine: What completes the prompts, or a loaded model, which then runs by Transformers.
        items: What to ask; their order is the order of `predictions.jsonl`.
        task: How to grade.
        output: Folder for `predictions.jsonl`, `settings.json` and `result.json`.
        max_new_tokens: Length limit of a completion.
        batch_size: Completions generated together.
        decoding: How completions are drawn, and how many of each item; greedy by default.
        settings: Further settings to record, such as the data's name; a rerun must bring the same.
        restart: Drop an earlier run's predictions in `output`.
        on_progress: Called with (completions done, completions in all) at the start and after each
            batch.

    Raises:
        SvdtuneError: If the items, the end tokens or the output folder cannot be used.
    """
    output = Path(output).expanduser()
    if batch_size < 1:
        raise SvdtuneError(f"batch_size must be at least 1, got {batch_size}")
    engine = TransformersEngine(engine) if isinstance(engine, LoadedModel) else engine
    check_items(items, max_new_tokens, engine.context)
    for item in items:
        task.check(item.reference)  # a reference without an answer shows now, not after an hour
    identity = {
        **(settings or {}),
        "model": engine.name,
        **engine.identity(),
        "items": items_fingerprint(items),
        "task": task.name,
        "max_new_tokens": max_new_tokens,
        **({} if decoding == GREEDY else asdict(decoding)),
    }
    started = time.perf_counter()
    with explain_write_errors(output):
        store = PredictionStore(output, identity, restart)
        _generate_missing(engine, items, task, store, max_new_tokens, batch_size, decoding, on_progress)
        how = {"batch_size": batch_size, "svdtune": __version__, **engine.details()}
        result = _summarize(store, task, time.perf_counter() - started, identity | how)
        store.finish(_as_json(result))
    return result


def _generate_missing(
    engine: Engine,
    items: Sequence[Item],
    task: Task,
    store: PredictionStore,
    max_new_tokens: int,
    batch_size: int,
    decoding: Decoding,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Complete, grade and store what the store lacks; each batch is stored before the next one
    starts."""
    wanted = [(index, sample) for index in range(len(items)) for sample in range(decoding.samples)]
    tell = on_progress or (lambda *_: None)
    tell(len(store.done), len(wanted))
    for batch in plan_batches([items[index].tokens for index, _ in wanted], batch_size):
        missing = [place for place in batch if wanted[place] not in store.done]
        if not missing:
            continue
        asked = [items[wanted[place][0]] for place in missing]
        seeds = [decoding.seed * len(wanted) + place for place in missing]
        with _explain_out_of_memory(len(asked), max_new_tokens):
            completions = engine.complete([item.tokens for item in asked], max_new_tokens, decoding, seeds)
        said = [_answer(item.opening, found.tokens) for item, found in zip(asked, completions, strict=True)]
        texts = engine.tokenizer.batch_decode(said, skip_special_tokens=True)
        graded = _grade_all(task, [(text, item.reference) for text, item in zip(texts, asked, strict=True)])
        store.append(
            _prediction(*wanted[place], item, text, grades, completion)
            for place, item, text, grades, completion in zip(missing, asked, texts, graded, completions, strict=True)
        )
        tell(len(store.done), len(wanted))


def _answer(opening: tuple[int, ...], tokens: list[int]) -> list[int]:
    """A completion's tokens without what the chat template opens an answer with."""
    return tokens[len(opening) :] if tuple(tokens[: len(opening)]) == opening else tokens


@contextmanager
def _explain_out_of_memory(size: int, max_new_tokens: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        less = f"--batch-size {max(1, size // 2)}" if size > 1 else f"--max-new-tokens {max(1, max_new_tokens // 2)}"
        raise SvdtuneError(
            f"out of memory with {size} completions at once, of up to {max_new_tokens} new tokens each; what is done is kept. "
            f"Go on with {less}" + ("" if size > 1 else " --restart, or with --dtype bfloat16")
        ) from error


def _grade_all(task: Task, pairs: Sequence[tuple[str, Reference]]) -> list[Grades]:
    """Grade (completion, reference) pairs; programs side by side."""
    if not task.programs:
        return [task.grade(*pair) for pair in pairs]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _SIDE_BY_SIDE)) as pool:
        return list(pool.map(lambda pair: task.grade(*pair), pairs))


def items_fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 over every prompt, its tokens and its reference, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.id, item.prompt, item.tokens, item.reference)).encode())
    return digest.hexdigest()


def _prediction(index: int, sample: int, item: Item, text: str, grades: Grades, completion: Completion) -> Prediction:
    strict, paper = grades
    return Prediction(
        index=index,
        sample=sample,
        id=item.id,
        prompt=item.prompt,
        completion=text,
        reference=item.reference,
        extracted=None if strict is None else strict.extracted,
        correct=None if strict is None else strict.correct,
        paper_extracted=None if paper is None else paper.extracted,
        paper_correct=None if paper is None else paper.correct,
        tokens=len(completion.tokens),
        ended=completion.ended,
    )


def _summarize(store: PredictionStore, task: Task, seconds: float, settings: dict[str, Any]) -> Evaluation:
    done = [store.done[place] for place in sorted(store.done)]
    by_item = [list(group) for _, group in groupby(done, key=lambda prediction: prediction.index)]
    metrics = dict(task.metrics([p.completion for p in done], [p.reference for p in done])) if task.metrics else {}
    strict = [[bool(p.correct) for p in group] for group in by_item] if task.strict else None
    paper = [[bool(p.paper_correct) for p in group] for group in by_item] if task.paper else None
    for verdicts, mode in ((strict, ""), (paper, " (paper)")):
        if verdicts and (task.programs or len(verdicts[0]) > 1):
            metrics |= {f"{name}{mode}": metric for name, metric in pass_at(verdicts).items()}
    return Evaluation(
        task=task.name,
        n=len(by_item),
        strict=_score(strict) if strict else None,
        paper=_score(paper) if paper else None,
        metrics=metrics,
        unended=sum(not prediction.ended for prediction in done),
        seconds=round(seconds, 3),
        settings=settings,
        folder=store.folder,
    )


def _score(verdicts: list[list[bool]]) -> Score:
    """The share of right completions; each item has as many as the others."""
    correct, total = sum(map(sum, verdicts)), sum(map(len, verdicts))
    # Completions of one item are no independent trials.
    interval = wilson_interval(correct, total) if total == len(verdicts) else pass_at(verdicts)["pass@1"].interval
    return Score(correct, correct / total, interval)


def _as_json(result: Evaluation) -> dict[str, Any]:
    scores = {
        mode: score and _with_level(score) for mode, score in (("strict", result.strict), ("paper", result.paper))
    }
    metrics = {name: _with_level(metric) for name, metric in result.metrics.items()}
    return asdict(result) | scores | {"metrics": metrics, "folder": str(result.folder)}


def _with_level(found: Score | Metric) -> dict[str, Any]:
    return found._asdict() | {"interval": {"level": 0.95, **found.interval._asdict()}}
