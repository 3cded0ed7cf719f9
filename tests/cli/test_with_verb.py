"""`svdtune with`: programs that do not import svdtune know the methods all the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svdtune.cli import app

PROGRAM = """
import sys
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert "svdtune" not in globals()
print(sys.argv[1:], __name__, sorted({"SARA", "MOSARA", "SORSA"} & {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}))
sys.exit(int(sys.argv[-1]))
"""
SAID = "['--its', 'options', '3'] __main__ ['MOSARA', 'SARA', 'SORSA']"


def svdtune(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "svdtune", "with", "--", *words], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("way", [["program.py"], ["python", "program.py"], ["python", "-m", "program"], ["./program"]])
def test_a_program_knows_the_methods(tmp_path: Path, way: list[str]) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "program").write_text(f"#!{sys.executable}\n{PROGRAM}")
    found = svdtune(*way, "--its", "options", "3", cwd=tmp_path)
    assert found.stdout.strip() == SAID
    assert found.returncode == 3, found.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-program"], "there is no program 'no-such-program': name a script"),
        (["python"], "needs a script or -m MODULE after it"),
        (["python", "-m"], "needs a module's name after it"),
        (["python", "-c", "1"], "runs no text (-c); write it into a file"),
        (["python", "-O", "x.py"], "gives Python no options; got '-O'"),
        (["/bin/ls"], "/bin/ls is no Python program"),
    ],
)
def test_what_cannot_be_run(words: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["with", "--", *words])
    assert found.exit_code == 2
    assert message in found.stderr
