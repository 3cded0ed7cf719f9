"""The command line: verbs are found in their folder, and user errors are one message."""

import pytest
import typer
from typer.testing import CliRunner

from svdtune import __version__, cli
from svdtune.errors import SvdtuneError


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")


def test_help_lists_every_verb() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in cli.verbs())
    assert "Train an adapter as a recipe says." in result.stdout


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(cli.app, [verb, "--help"], prog_name="svdtune")
    assert result.exit_code == 0, result.output
    assert f"svdtune {verb}" in result.stdout


def test_an_unknown_verb_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli.app, ["trane"])
    assert result.exit_code == 2
    assert "trane" in result.output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SvdtuneError("that is wrong"), 2, "svdtune: that is wrong\n"),
        (KeyboardInterrupt(), 130, "svdtune: interrupted\n"),
        (KeyboardInterrupt("go on with --resume"), 130, "svdtune: go on with --resume\n"),
    ],
)
def test_errors_are_one_message(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str) -> None:
    failing = typer.Typer()

    @failing.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr("svdtune.cli.train.app", failing)
    result = CliRunner().invoke(cli.app, ["train"])
    assert (result.exit_code, result.stderr) == (code, message)
