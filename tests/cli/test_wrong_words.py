"""Words on the command line that mean nothing: one sentence that says what was expected."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svdtune import cli
from svdtune.cli import app


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "MODEL", "--target-modules", "(("], "'((' is neither names nor a regular expression: missing )"),
        (["plan", "MODEL", "--device", "nowhere"], "the device 'nowhere' is not there; expected one of cpu"),
        (["generate", "MODEL", "hi", "--device", "nowhere"], "the device 'nowhere' is not there; expected one of cpu"),
        (["evaluate", "MODEL", "--data", "arithmetic", "--limit", "0"], "limit is 0; expected at least 1 item"),
        (["merge", "MODEL", "--output", "x"], "so there is nothing to merge; name a run or an adapter folder"),
    ],
)
def test_one_sentence(tiny_folder: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [str(tiny_folder) if word == "MODEL" else word for word in words])
    assert result.exit_code == 2
    assert result.stderr.startswith("svdtune: ")
    assert message in result.stderr


@pytest.mark.parametrize("verb", cli.verbs())
@pytest.mark.parametrize("words", [["a\udcffb"], ["fine", "--fine", "a\udcffb"]])
def test_bytes_that_are_no_text(verb: str, words: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [verb, *words])
    assert result.exit_code == 2
    assert result.stderr == (
        "svdtune: 'a\\xffb' on the command line is not UTF-8: character 2 of it cannot be read; type it again, rename the "
        "file that it names, or save the script that it stands in as UTF-8\n"
    )


@pytest.mark.parametrize("verb", ["plan", "generate"])
@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("config.json", '"model_type"', '"model_typo"'),
        ("config.json", '"hidden_size": 32', '"hidden_size": "x"'),
        ("config.json", "{", "["),
        ("tokenizer.json", '"ByteLevel"', '"BiteLevel"'),
    ],
)
def test_a_damaged_model_folder(
    tiny_folder: Path, tmp_path: Path, verb: str, file: str, before: str, after: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after, 1))
    result = CliRunner().invoke(app, [verb, str(folder), *(["hi"] if verb == "generate" else [])])
    if verb == "plan" and file == "tokenizer.json":
        assert result.exit_code == 0  # which planning does not read
        return
    assert result.exit_code == 2
    assert any(words in result.stderr for words in ("svdtune: the ", "describes no model", "is damaged"))
