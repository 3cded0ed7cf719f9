"""`svdtune with`: programs that do not import svdtune know the methods all the same."""

import os
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


def write_program(folder: Path) -> None:
    (folder / "program.py").write_text(PROGRAM)
    (folder / "program").write_text(f"#!{sys.executable}\n{PROGRAM}")


@pytest.mark.parametrize("way", [["program.py"], ["python", "program.py"], ["python", "-m", "program"], ["./program"]])
def test_a_program_is_run_as_python_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: list[str]) -> None:
    write_program(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    found = CliRunner().invoke(app, ["with", "--", *way, "--its", "options", "3"])
    assert found.stdout.strip() == SAID
    assert found.exit_code == 3, found.stderr


@pytest.mark.slow
def test_a_program_in_a_new_process_knows_the_methods_and_has_its_own_settings(tmp_path: Path) -> None:
    ours = {"COLUMNS", "TERMINAL_WIDTH", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    (tmp_path / "program.py").write_text(f"import os\nassert not {ours} & {{*os.environ}}\n{PROGRAM}")
    command = [sys.executable, "-m", "svdtune", "with", "--", "program.py", "--its", "options", "3"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
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
