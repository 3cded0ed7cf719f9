"""The command line: one file a verb, imported only when its verb is called.

A verb is a name in VERBS and a module, `svdtune/cli/<verb>.py`, with an `app`, a `typer.Typer`: of
one command, whose docstring is the verb's help, or of several. Other modules in the folder are
helpers. The laboratory adds verbs of its own. `svdtune --help` imports all verbs for the first
lines of their help, so what only the work itself needs (torch, transformers) is imported inside the
command.

Errors: a word that is not UTF-8 is refused before any verb sees it. A `SvdtuneError` is printed as
one message, exit code 2. A `KeyboardInterrupt` prints its own text, which may say how to go on,
exit code 130. A full disk or memory that nothing nearer explained is one sentence too, exit code 2.
Anything else is a fault of svdtune and keeps its traceback.
"""

import importlib
import os
import signal
import sys
import warnings
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from svdtune._version import __version__
from svdtune.cli.outcome import plain_output, reporting
from svdtune.cli.values import check_words, guard
from svdtune.errors import SvdtuneError
from svdtune.registry import Registry, lab_note
from svdtune.system import last_resort

# In the order of use, which is the order in the help.
_OWN = (
    "demo",
    "new",
    "recipes",
    "plan",
    "init",
    "data",
    "train",
    "evaluate",
    "generate",
    "chat",
    "analyze",
    "merge",
    "export",
    "combine",
    "push",
    "report",
    "cache",
    "with",
)
_OTHERS = ("with",)  # whose words are another program's
_FILES = {"with": "with_"}  # a word of Python's own
VERBS: Registry[str] = Registry("cli", {verb: f"svdtune.cli.{_FILES.get(verb, verb)}" for verb in _OWN})


def verbs() -> list[str]:
    """The verbs that there are."""
    return list(VERBS)


class _Interrupt:
    """Python's own answer to Ctrl-C, which also remembers it.

    C code that asks an object for its kind, as `torch.asarray` does, may swallow the exception and
    raise another: an error after Ctrl-C is that interrupt.
    """

    came = False

    def __call__(self, number: int, frame: Any) -> None:
        self.came = True
        raise KeyboardInterrupt


_interrupt = _Interrupt()


class _Verbs(TyperGroup):
    """A group that finds its commands in VERBS, and turns user errors into one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return verbs()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            near = get_close_matches(cmd_name, VERBS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(VERBS)}{lab_note()}"
            raise SvdtuneError(f"there is no verb {cmd_name!r}{hint}")
        if cmd_name not in self.commands:
            app = importlib.import_module(VERBS[cmd_name]).app
            app._add_completion = False  # which svdtune itself has
            command = typer.main.get_command(app)
            command.name = cmd_name
            self.commands[cmd_name] = guard(command) if cmd_name in _OTHERS else reporting(guard(command))
        return self.commands[cmd_name]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse bytes that are no text: tokenizers, YAML and JSON all fail at them later, each in
        its own way. Refuse empty words too."""
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError as error:
                shown = os.fsencode(word).decode(errors="backslashreplace")
                typer.echo(
                    f"svdtune: '{shown}' on the command line is not UTF-8: character {error.start + 1} of it cannot be read; "
                    "type it again, rename the file that it names, or save the script that it stands in as UTF-8",
                    err=True,
                )
                raise typer.Exit(2) from error
        try:
            check_words(args)
        except SvdtuneError as error:
            typer.echo(f"svdtune: {error}", err=True)
            raise typer.Exit(2) from error
        return super().parse_args(ctx, args)

    def _run(self, ctx: Any) -> Any:
        """Run a verb; an error after Ctrl-C is that interrupt."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if _interrupt.came and not isinstance(error, typer.Exit):
                raise KeyboardInterrupt from error
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; what a user or the machine caused ends in one sentence and a status, not in a
        traceback."""
        try:
            return self._run(ctx)
        except SvdtuneError as error:
            if not (error.everywhere and _another_tells()):
                typer.echo(f"svdtune: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            if not _another_tells():
                typer.echo(f"svdtune: {str(interrupt) or 'interrupted'}", err=True)
            raise typer.Exit(130) from interrupt
        except Exception as error:
            if (sentence := last_resort(error)) is None:
                raise
            typer.echo(f"svdtune: {sentence}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Verbs, no_args_is_help=True, pretty_exceptions_enable=False)


def _another_tells() -> bool:
    """Whether this is not the first of several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _svdtune(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    """SVD-based parameter-efficient fine-tuning: SARA, Mo-SARA and SORSA."""


def main() -> None:
    """Run the command line; the entry point of the `svdtune` script."""
    usual = signal.getsignal(signal.SIGINT)
    try:
        if usual is signal.default_int_handler:  # not where a shell or a program above has its own wish
            signal.signal(signal.SIGINT, _interrupt)
        if not {*sys.argv[1:2]} & {*_OTHERS}:
            plain_output()
        # what a library will change in how others call it: a command's user can do nothing about it
        if not sys.warnoptions:
            warnings.simplefilter("ignore", FutureWarning)
        app()
    except KeyboardInterrupt:  # before the command line knows what to do
        typer.echo("svdtune: interrupted", err=True)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGINT, usual)
        _interrupt.came = False
