"""`svdtune evaluate`: the score of a run, an adapter or a plain model on held-out items."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdtune.cli.options import AdapterFolder, DeviceName, DtypeName, RunOrModel
from svdtune.cli.outcome import for_json

if TYPE_CHECKING:
    from svdtune.evaluation import Evaluation, Metric, Score
    from svdtune.evaluation.averages import Average

app = typer.Typer()

DataName = Annotated[
    str | None,
    typer.Option(
        help="File, generator, hub data set, or a set or group of the papers (svdtune data list). "
        "Default: the sets of the run's evaluation section, or its data.eval."
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="How to grade: number, letter, choice, exact; of the papers gsm8k, math, humaneval, e2e, e2e_bleu; or "
        "lm-eval:NAME,... Default: as the data set asks for, or number."
    ),
]
PromptText = Annotated[
    str | None, typer.Option(help="Field to ask, or text with {fields}. Default: as the run, or question.")
]


class EngineName(StrEnum):
    """What generates."""

    transformers = "transformers"
    vllm = "vllm"


@app.command()
def evaluate(
    source: RunOrModel,
    data: DataName = None,
    task: TaskName = None,
    adapter: AdapterFolder = None,
    split: Annotated[str | None, typer.Option(help="Split of a generator or hub data set. Default: test.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first items.")] = None,
    prompt: PromptText = None,
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
    dtype: DtypeName = None,
    device: DeviceName = None,
    output: Annotated[Path | None, typer.Option(help="Folder for predictions and result.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop earlier predictions in that folder.")] = False,
) -> None:
    """Score a run, an adapter or a plain model, by greedy decoding unless told otherwise.

    Every prediction is kept in predictions.jsonl as soon as it is made: after an interruption the
    same command goes on where it stopped. result.json holds the accuracy, its 95 % interval and all
    settings.

    \b
    svdtune evaluate runs/sorsa
    svdtune evaluate runs/sorsa --data test.jsonl --prompt "{text}" --answer label --task exact
    svdtune evaluate my-model --adapter my-adapter --data openai/gsm8k --config main
    svdtune evaluate runs/llama-7b-math-sara --data sara_math
    svdtune evaluate runs/sorsa --task humaneval --samples 20 --temperature 0.8
    svdtune evaluate runs/sorsa --task e2e --beams 10 --length-penalty 0.8 --no-repeat-ngram-size 4
    svdtune evaluate runs/sorsa --task lm-eval:arc_easy,hellaswag
    """
    from svdtune.evaluation.sets import evaluate_source
    from svdtune.export import find_source

    form = {"split": split, "config": config, "limit": limit, "prompt": prompt, "answer": answer, "template": template}
    decoding = {"samples": samples, "temperature": temperature, "top_p": top_p, "seed": seed, "beams": beams}
    decoding |= {"length_penalty": length_penalty, "no_repeat_ngram_size": no_repeat_ngram_size}
    found = evaluate_source(
        find_source(source, adapter),
        source,
        data,
        task=task,
        form=form | {"max_new_tokens": max_new_tokens},
        decoding=decoding | {"stop_loops": stop_loops},
        batch_size=batch_size,
        engine=engine.value,
        dtype=dtype,
        device=device,
        output=output,
        restart=restart,
        watch=_watched,
        on_result=_tell,
    )
    for_json({"results": found.results, "averages": found.averages, "file": found.file})
    if found.table is not None:
        typer.echo(f"{found.table}\nall of it: {found.file}")
    elif found.file is not None:
        lines = [line for mode, average in found.averages.items() for line in _average_lines(mode, average)]
        typer.echo("\n".join([*lines, f"averages: {found.file}"]))


@contextmanager
def _watched(name: str, folder: Path) -> Iterator[Callable[[int, int], None]]:
    """Show the progress on one data set; a Ctrl-C says how to go on."""
    from svdtune.progress import counting
    from svdtune.system import open_console

    try:
        with counting(f"evaluating on {name}", open_console(stderr=True)) as on_progress:
            yield on_progress
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {folder} keeps what is done, the same command goes on") from None


def _tell(name: str, result: "Evaluation", sets: int) -> None:
    """Show the result on one data set, under its name where there are several."""
    shown = summary(result)
    typer.echo(f"{name}\n{textwrap.indent(shown, '  ')}" if sets > 1 else shown)


def _average_lines(mode: str, found: "Average") -> Iterator[str]:
    for kind, value, (low, high) in (
        ("macro", found.macro, found.macro_interval),
        ("micro", found.micro, found.micro_interval),
    ):
        share = f"{kind} average ({mode}) {value:.1%}, 95 % interval {low:.1%} to {high:.1%}"
        yield f"{share}; {found.sets} sets, {found.n} items"


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
