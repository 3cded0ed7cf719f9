"""The command line: verbs are found in their folder, and user errors are one message."""

import signal

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


@pytest.mark.parametrize(("word", "hint"), [("trian", "did you mean train?"), ("xyz", "there are demo, new, ")])
def test_an_unknown_verb_is_a_usage_error(word: str, hint: str) -> None:
    result = CliRunner().invoke(cli.app, [word])
    assert result.exit_code == 2
    assert f"there is no verb '{word}'; {hint}" in result.stderr


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


@pytest.mark.parametrize("swallows", [SvdtuneError("the adapter does not fit"), TypeError("no shape")])
def test_ctrl_c_that_c_code_turned_into_another_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], swallows: Exception
) -> None:
    failing = typer.Typer()

    @failing.command()
    def fail() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise swallows from None

    monkeypatch.setattr("svdtune.cli.train.app", failing)
    monkeypatch.setattr("sys.argv", ["svdtune", "train"])
    monkeypatch.setattr(cli, "plain_output", lambda: None)  # which sets variables of the whole process
    # a shell starts its background jobs without it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "svdtune: interrupted\n"


def test_ctrl_c_before_any_verb_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "plain_output", interrupted)
    monkeypatch.setattr("sys.argv", ["svdtune", "train"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "svdtune: interrupted\n")
