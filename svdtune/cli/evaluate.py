"""`svdtune evaluate`: the score of a run, an adapter or a plain model on held-out items."""

import textwrap
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from svdtune.evaluation import Decoding, Evaluation, Metric, Score
    from svdtune.evaluation.questions import Asked
    from svdtune.evaluation.vllm import VllmEngine
    from svdtune.export import Source
    from svdtune.models import LoadedModel

app = typer.Typer()


class EngineName(StrEnum):
    """What generates."""

    transformers = "transformers"
    vllm = "vllm"


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, adapter or model folder, or hub name.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="File, generator, hub data set, or a set or group of the papers (svdtune data list). "
            "Default: the sets of the run's evaluation section, or its data.eval."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="How to grade: number, letter, choice, exact; of the papers gsm8k, math, humaneval, e2e, e2e_bleu; or "
            "lm-eval:NAME,... Default: as the data set asks for, or number."
        ),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder to put on a model.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a generator or hub data set. Default: test.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first items.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Field to ask, or text with {fields}. Default: as the run, or question.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Field to grade against. Default: as the run, or answer.")] = None,
    template: Annotated[
        str | None, typer.Option(help="plain, chat, or text with {prompt}. Default: as the run, or chat.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a completion. Default: as the data set asks for, or 256.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Completions generated together.")] = 16,
    engine: Annotated[EngineName, typer.Option(help="What generates.")] = EngineName.transformers,
    samples: Annotated[int, typer.Option(help="Completions of each item, for pass@k.")] = 1,
    temperature: Annotated[float, typer.Option(help="Draw tokens at this temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    beams: Annotated[int | None, typer.Option(help="Beams of a beam search. Default: as the run, or 1.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of a beam search. Default: as the run, or 1.")] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No n-gram of this size twice. Default: as the run, or 0, for no such rule.")
    ] = None,
    stop_loops: Annotated[
        bool, typer.Option("--stop-loops", help="Cut an answer that repeats itself, before the length limit does.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or auto. Default: as the run, or auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu... Default: a GPU where there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for predictions and result.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop earlier predictions in that folder.")] = False,
) -> None:
    """Score a run, an adapter or a plain model, by greedy decoding unless told otherwise.

    Every prediction is kept in predictions.jsonl as soon as it is made: after an interruption the
    same command goes on where it stopped. result.json holds the accuracy, its 95 % interval and all
    settings.

    \b
    svdtune evaluate runs/sorsa
    svdtune evaluate runs/sorsa --data test.jsonl --prompt "{instruction}" --answer output --task
    exact svdtune evaluate HuggingFaceTB/SmolLM2-135M-Instruct --data openai/gsm8k --config main
    --adapter my-adapter svdtune evaluate runs/llama-7b-math-sara --data sara_math
    svdtune evaluate runs/sorsa --task humaneval --samples 20 --temperature 0.8
    svdtune evaluate runs/sorsa --task e2e --beams 10 --length-penalty 0.8 --no-repeat-ngram-size 4
    svdtune evaluate runs/sorsa --task lm-eval:arc_easy,hellaswag
    """
    from svdtune.cli.averages import report_averages
    from svdtune.evaluation import Decoding
    from svdtune.evaluation.questions import decoding_of, output_folder, prepare, sets_to_ask
    from svdtune.evaluation.score_table import add_scores
    from svdtune.evaluation.tasks import HARNESSES
    from svdtune.export import find_source

    found = find_source(source, adapter)
    harness, _, harness_tasks = (task or "").partition(":")
    if harness_tasks and harness in HARNESSES:
        folder = output or output_folder(found.run, source, harness, harness_tasks.replace(",", "-"))
        typer.echo(_run_harness(harness, found, harness_tasks.split(","), folder, batch_size, limit, dtype, device))
        return
    # Greedy, or as the recipe of a run decodes.
    own = decoding_of(found.recipe)
    decoding = Decoding(
        samples,
        temperature,
        top_p,
        seed,
        own.beams if beams is None else beams,
        own.length_penalty if length_penalty is None else length_penalty,
        own.no_repeat_ngram_size if no_repeat_ngram_size is None else no_repeat_ngram_size,
        stop_loops,
    )
    names = sets_to_ask(found.recipe, data, task)
    asked = [
        prepare(found.recipe, name, split, config, limit, task, prompt, answer, template, max_new_tokens)
        for name in names
    ]
    results = {}
    with _opened(engine, found, dtype, device) as opened:
        for one in asked:
            own_folder = output_folder(found.run, source, one.rows.source, one.form.task)
            folder = own_folder if output is None else output if len(asked) == 1 else output / own_folder.name
            results[one.rows.source] = _ask(opened, one, folder, batch_size, decoding, restart)
            shown = summary(results[one.rows.source])
            typer.echo(f"{one.rows.source}\n{textwrap.indent(shown, '  ')}" if len(asked) > 1 else shown)
    if found.run and found.adapter:
        add_scores(found.run, found.adapter)
    if len(asked) > 1:
        group = data or (found.run.name if found.run else "sets")
        typer.echo(report_averages(results, (output or folder.parent) / f"{group}-averages.json"))


def _ask(
    opened: "LoadedModel | VllmEngine",
    asked: "Asked",
    folder: Path,
    batch_size: int,
    decoding: "Decoding",
    restart: bool,
) -> "Evaluation":
    """Score the model on one data set, before the user's eyes."""
    from rich.console import Console

    from svdtune.cli.progress import counting
    from svdtune.evaluation.questions import ask

    try:
        with counting(f"evaluating on {asked.rows.source}", Console(stderr=True)) as on_progress:
            return ask(opened, asked, folder, batch_size, decoding, restart, on_progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {folder} keeps what is done, the same command goes on") from None


@contextmanager
def _opened(
    engine: EngineName, source: "Source", dtype: str | None, device: str | None
) -> "Iterator[LoadedModel | VllmEngine]":
    """The model, ready to answer."""
    from svdtune.cli.options import placement
    from svdtune.evaluation.vllm import open_vllm
    from svdtune.export import open_source

    if engine is EngineName.transformers:
        yield open_source(source, **placement(dtype, device))
    else:
        if device is not None:
            raise SvdtuneError("vLLM chooses its device itself; leave out --device, or hide GPUs from it")
        with open_vllm(source, dtype) as opened:
            yield opened


def _run_harness(
    harness: str,
    source: "Source",
    tasks: list[str],
    output: Path,
    batch_size: int,
    limit: int | None,
    dtype: str | None,
    device: str | None,
) -> str:
    """Run tasks of a harness such as lm-eval; what the terminal shows of them."""
    from svdtune.cli.options import placement
    from svdtune.evaluation.tasks import HARNESSES
    from svdtune.export import open_source

    loaded = open_source(source, **placement(dtype, device))
    table = HARNESSES[harness](loaded, tasks, output, batch_size=batch_size, limit=limit)
    return f"{table}\nall of it: {output / 'results.json'}"


def summary(result: "Evaluation") -> str:
    """What the terminal shows of a result: the score first, then what to look at."""
    lines = [
        _score_line(mode, score, result.n * result.settings.get("samples", 1))
        for mode, score in (("strict", result.strict), ("paper", result.paper))
        if score
    ]
    lines += [_metric_line(name, metric) for name, metric in result.metrics.items()]
    if result.unended:
        limit = result.settings["max_new_tokens"]
        loops = ", or where they repeated themselves" if result.settings.get("stop_loops") else ""
        lines.append(f"{result.unended} answers were cut at {limit} tokens{loops}; --max-new-tokens raises the limit")
    return "\n".join([*lines, f"predictions and settings: {result.folder}"])


def _score_line(mode: str, score: "Score", total: int) -> str:
    low, high = score.interval
    share = f"accuracy ({mode}) {score.accuracy:.1%}, 95 % interval {low:.1%} to {high:.1%}"
    return f"{share}; {score.correct} of {total} correct"


def _metric_line(name: str, metric: "Metric") -> str:
    low, high = metric.interval
    return f"{name} {metric.value:.4f}, 95 % interval {low:.4f} to {high:.4f}"
