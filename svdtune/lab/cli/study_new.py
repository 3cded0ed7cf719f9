"""`svdtune study new`: a model and a file become a study."""

from pathlib import Path
from typing import Annotated

import typer

from svdtune.cli.options import Revision, TrustRemoteCode
from svdtune.cli.outcome import for_json

Model = Annotated[str, typer.Argument(help="Hub name, local folder, .gguf file, or smollm2-135m.")]


def new(
    model: Model,
    data: Annotated[str, typer.Argument(help="File (.jsonl, .json, .csv, .tsv, .parquet, .txt) or hub name.")],
    methods: Annotated[str, typer.Option(help="Comma-separated; each is an arm.")] = "lora,sorsa,sara",
    output: Annotated[Path, typer.Option(help="The study to write; its recipe goes beside it.")] = Path("study.yaml"),
    budget: Annotated[str, typer.Option(help="Trained parameters of every arm: 300k, or a share, 0.5%.")] = "0.5%",
    test: Annotated[str | None, typer.Option(help="Rows to score on; without, a fifth of DATA is kept for it.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="number, exact, letter, nll (the answers' loss), module:function; told by the answers."),
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Column to grade against; the completion by default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of the prompt, or a text with {columns}.")] = None,
    completion: Annotated[str | None, typer.Option(help="Column of the answer, likewise.")] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Look at data, and write a study of methods on it.

    The study trains every method at the same size, searches each one's learning rate, and scores it
    on rows that no run trains on.

    \b
    svdtune study new smollm2-135m rows.jsonl --methods lora,sorsa,sara
    svdtune study new smollm2-135m train.csv --test test.csv --prompt question --completion answer
    """
    from svdtune.lab.study.draft import draft_study
    from svdtune.system import check_new_file, explain_write_errors, open_console, replace_text
    from svdtune.training.draft import Scoring

    recipe = output.with_name(f"{output.stem}-recipe.yaml")
    for path in (output, recipe):
        check_new_file(path, overwrite)
    made = draft_study(
        model,
        data,
        [name.strip() for name in methods.split(",") if name.strip()],
        recipe_name=recipe.name,
        budget=budget,
        scoring=Scoring(test, task, answer),
        prompt=prompt,
        completion=completion,
        origin={"revision": revision, "trust_remote_code": trust_remote_code},
        console=open_console(stderr=True),
    )
    seen = made.recipe
    typer.echo(f"format    {seen.format}")
    typer.echo(f"rows      {seen.rows:,} to train on, {seen.tokens:,} tokens, the longest {seen.longest:,}")
    for path, text in ((recipe, seen.text), (output, made.text)):
        with explain_write_errors(path):
            replace_text(path, text)
    for_json({"study": output, "recipe": recipe, "runs": made.runs, "format": seen.format, "rows": seen.rows})
    typer.echo(
        f"written   {output} and {recipe}: {made.runs} runs; look at them with: svdtune study {output} --dry-run"
    )
