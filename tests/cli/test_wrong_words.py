"""Words on the command line that mean nothing: one sentence that says what was expected."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

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
