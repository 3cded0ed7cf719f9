"""What every verb has besides its own options: `--quiet`, and `--json` for what it found."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from svdtune.cli.values import guard
from svdtune.errors import SvdtuneWarning
from svdtune.system import plain, write_text

_found: list[Any] = []  # of the verb that runs
_HELP_WIDTH = "110"


def for_json(document: Any) -> None:
    """Say what a verb found, for `--json`: dataclasses, paths and what JSON has."""
    _found.append(document)


def plain_output() -> None:
    """Where standard error is no terminal, no bars; where standard output is none, help of a fixed
    width. Before anything is imported that looks, and for svdtune's own verbs alone: these are
    settings of the process."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stdout.isatty():
        os.environ.setdefault("TERMINAL_WIDTH", _HELP_WIDTH)  # which Typer's help fills


def reporting(command: Any) -> Any:
    """The command, and those that it is made of, with both options."""
    for inner in getattr(command, "commands", {}).values():
        reporting(inner)
    work = command.callback
    if work is None or hasattr(command, "commands"):
        return command

    @wraps(work)
    def told(quiet: bool, json_to: Path | None, **given: Any) -> Any:
        _found.clear()
        with ExitStack() as kept:
            if quiet:
                kept.enter_context(_hushed())
            if json_to == Path("-"):
                kept.enter_context(redirect_stdout(sys.stderr))
            try:
                ended = work(**given)
            except typer.Exit:  # with a status that says what was found
                kept.close()
                _write(json_to)
                raise
        _write(json_to)
        return ended

    command.callback = told
    command.params = [*command.params, *_options()]
    return command


@cache
def _options() -> list[Any]:
    """The two options, as Typer makes them."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def both(
        quiet: Annotated[
            bool, typer.Option("--quiet", help="Print what was found alone, and not how far it is.")
        ] = False,
        json_to: Annotated[
            Path | None, typer.Option("--json", metavar="FILE", help="Write what was found as JSON; - prints it.")
        ] = None,
    ) -> None: ...

    return list(guard(typer.main.get_command(app)).params)


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on standard error but svdtune's own warnings; errors come after it."""
    stderr, show = sys.stderr, warnings.showwarning

    def told(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, SvdtuneWarning):
            stderr.write(f"svdtune: {message}\n")

    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        warnings.showwarning = told
        try:
            yield
        finally:
            warnings.showwarning = show


def _write(target: Path | None) -> None:
    if target is None or not _found:
        return
    document = plain(_found[0] if len(_found) == 1 else _found)
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if target == Path("-"):
        typer.echo(text, nl=False)
        return
    write_text(target, text)
    typer.echo(f"wrote {target}")
