"""`svdtune evaluate`: the score of a run, an adapter or a plain model on held-out items."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from svdtune.evaluation import Evaluation, Metric, Score

app = typer.Typer()


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, adapter or model folder, or hub name.")],
    data: Annotated[
        str | None, typer.Option(help="File, generator or hub data set. Default: the run's data.eval.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="How to grade: number (the last one) or exact (the whole text).")
    ] = "number",
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
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a completion.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Items generated together.")] = 16,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or auto. Default: as the run, or auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu... Default: a GPU where there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for predictions and result.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop earlier predictions in that folder.")] = False,
) -> None:
    """Score a run, an adapter or a plain model by greedy decoding.

    Every prediction is kept in predictions.jsonl as soon as it is made: after an interruption the same command goes on
    where it stopped. result.json holds the accuracy, its 95 % interval and all settings.

    \b
    svdtune evaluate runs/sorsa
    svdtune evaluate runs/sorsa --data test.jsonl --prompt "{instruction}" --answer output --task exact
    svdtune evaluate HuggingFaceTB/SmolLM2-135M-Instruct --data openai/gsm8k --config main --adapter my-adapter
    """
    from rich.console import Console

    from svdtune.cli.asking import choose_template, held_out, placement
    from svdtune.cli.progress import counting
    from svdtune.data import read_rows, to_examples
    from svdtune.evaluation import evaluate as run_evaluation
    from svdtune.evaluation import get_task, to_items
    from svdtune.export import find_source, open_source

    grader, found = get_task(task), find_source(source, adapter)
    trained = found.recipe.data if found.recipe else None
    rows = held_out(found.recipe, data, split, config, limit)
    prompt = prompt or (trained.prompt if trained else "question")
    # A run without a field for the answer is graded against the completions it was trained towards.
    answer = answer or (trained.answer if trained else "answer")
    completion = trained.completion if trained and answer is None else None
    examples = to_examples(read_rows(**rows.model_dump()), prompt, completion, source=rows.source)

    loaded = open_source(found, **placement(dtype, device))
    template = choose_template(found.recipe, loaded.tokenizer, template)
    items = to_items(examples, loaded.tokenizer, template, answer)
    folder = output or _default_output(found.run, source, rows.source, task)
    try:
        with counting("evaluating", Console(stderr=True)) as on_progress:
            result = run_evaluation(
                loaded,
                items,
                grader,
                folder,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                settings={"data": rows.model_dump(), "prompt": prompt, "answer": answer, "template": template},
                restart=restart,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {folder} keeps what is done, the same command goes on") from None
    typer.echo(summary(result))


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
        lines.append(f"{result.unended} answers were cut at {limit} tokens; --max-new-tokens raises the limit")
    return "\n".join([*lines, f"predictions and settings: {result.folder}"])


def _score_line(mode: str, score: "Score", total: int) -> str:
    low, high = score.interval
    share = f"accuracy ({mode}) {score.accuracy:.1%}, 95 % interval {low:.1%} to {high:.1%}"
    return f"{share}; {score.correct} of {total} correct"


def _metric_line(name: str, metric: "Metric") -> str:
    low, high = metric.interval
    return f"{name} {metric.value:.4f}, 95 % interval {low:.4f} to {high:.4f}"


def _default_output(run: Path | None, source: str, data: str, task: str) -> Path:
    """In the run's own folder; for a model, whose folder is not ours to write to, below runs/evaluations."""
    name = f"{_short(data)}-{task}"
    return run / "evaluations" / name if run else Path("runs", "evaluations", f"{_short(source)}-{name}")


def _short(name: str) -> str:
    """The last part of a path or hub name, without file endings."""
    return Path(name).name.split(".")[0] or "data"
