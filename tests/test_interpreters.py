"""`make interpreters` fails on a test or a set-up that fails, and not on a disk that is full."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "interpreters.py"
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"


@pytest.fixture
def interpreters(monkeypatch, tmp_path):
    if not SCRIPT.is_file():
        pytest.skip("the script is not part of a source distribution")
    spec = importlib.util.spec_from_file_location("interpreters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VERSIONS", ("3.12",))
    monkeypatch.setattr(module, "find", lambda version: sys.executable)
    monkeypatch.setattr(module, "ROOM", 0)
    return module


@pytest.mark.parametrize(
    ("set_up", "tests", "code", "said", "kept"),
    [
        ((0, ""), 0, 0, "", False),
        ((0, ""), 1, 1, "failed on Python 3.12", True),
        ((2, "ERROR: No matching distribution found for torch\n"), 0, 1, "failed on Python 3.12", True),
        ((2, FULL), 0, 0, "Python 3.12 was not tried: the disk was full", False),
    ],
    ids=["all pass", "a test fails", "the set-up fails", "the disk is full"],
)
def test_what_a_version_ends_with(interpreters, monkeypatch, capsys, set_up, tests, code, said, kept):
    environment = interpreters.ROOT / ".venv-3.12"

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess:
        environment.mkdir(exist_ok=True)
        code, error = (tests, "") if "test" in words else set_up
        return subprocess.CompletedProcess(words, code, "", error)

    monkeypatch.setattr(interpreters, "version_of", lambda python: "3.11")
    monkeypatch.setattr(subprocess, "run", run)
    assert interpreters.main() == code
    assert said in capsys.readouterr().out
    assert environment.is_dir() == kept


def test_a_disk_without_room_is_said_before_anything_is_set_up(interpreters, monkeypatch, capsys):
    monkeypatch.setattr(interpreters.shutil, "disk_usage", lambda path: SimpleNamespace(free=2_500_000_000))
    monkeypatch.setattr(interpreters, "ROOM", 10**10)
    monkeypatch.setattr(interpreters, "passes", lambda *given: pytest.fail("something was set up"))
    assert interpreters.main() == 0
    assert "2.5 GB are free on the disk, and an environment takes up to 10 GB" in capsys.readouterr().out
