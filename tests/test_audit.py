"""The audit of the dependencies fails on a fault that has a fix, and says where nothing can be
looked up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"
FAULT = {"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}
FAULTY = {"name": "django", "version": "1.2", "vulns": [FAULT]}


@pytest.fixture
def audit():
    if not SCRIPT.is_file():
        pytest.skip("the audit is not part of a source distribution")
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(monkeypatch: pytest.MonkeyPatch, *reports: object) -> None:
    """Let pip-audit answer with these, one a call; a text is what it says on stderr, without a
    report."""
    answers = iter(reports)

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess:
        answer = next(answers)
        if isinstance(answer, str):
            return subprocess.CompletedProcess(words, 1, "", answer)
        return subprocess.CompletedProcess(words, 0, json.dumps({"dependencies": answer, "fixes": []}), "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["audit"])


@pytest.mark.parametrize(
    ("reports", "code", "said"),
    [
        (([FAULTY], [FAULTY]), 1, "django 1.2 has PYSEC-1, fixed in 1.1: upgrade"),
        (([FAULTY], [FAULTY | {"vulns": [FAULT | {"fix_versions": []}]}]), 0, "has PYSEC-1, not fixed yet"),
        (([FAULTY], [{"name": "a", "version": "1", "vulns": []}]), 0, "1 of 1 packages looked up"),
        (([FAULTY], [{"name": "a", "skip_reason": "not on PyPI"}]), 0, "0 of 1 packages looked up\naudit: not known"),
        (([FAULTY], "Connection lost"), 1, "the lookup stopped half-way (Connection lost)"),
        (("Traceback\nNo such host",), 0, "could not be looked up from here (No such host)"),
        (([{"name": "django", "skip_reason": "not on PyPI"}],), 0, "of django==1.2, which has many, none was found"),
    ],
)
def test_the_verdict(audit, monkeypatch, capsys, reports: tuple[object, ...], code: int, said: str) -> None:
    say(monkeypatch, *reports)
    assert audit.main() == code
    assert said in capsys.readouterr().out


def test_installed_packages_are_asked_about_by_their_public_version(audit) -> None:
    pins = dict(pin.split("==") for pin in audit.pins(importlib.metadata.distributions()))
    assert {"torch", "peft", "safetensors"} <= set(pins)
    assert "+" not in pins["torch"]
    assert "svdtune" not in pins or not (SCRIPT.parents[1] / "pyproject.toml").is_file()
