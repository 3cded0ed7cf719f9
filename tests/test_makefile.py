"""What `make` would do in a folder where a set-up was left half done, is under way, or is old."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import svdtune

ROOT = Path(svdtune.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="the source distribution has no Makefile")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the set-up reads, in a folder whose name has a space."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    given(folder, "requirements/uv.txt")
    return folder


def would_do(clone: Path, *words: str) -> str:
    make = ["make", "--dry-run", *words]
    return subprocess.run(make, cwd=clone, env=told(), capture_output=True, text=True, check=True).stdout


def told() -> dict[str, str]:
    """Nothing of what a `make` that runs these tests was told."""
    return {"PATH": os.environ["PATH"]}


def given(clone: Path, *names: str) -> None:
    """Empty files, the later ones not older."""
    for name in names:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()


def test_an_environment_without_pip_is_made_again(clone: Path) -> None:
    given(clone, ".venv/bin/python")
    assert "-m venv .venv" in would_do(clone, "lint")
    given(clone, ".venv/bin/pip", ".venv/.dev")
    assert "-m venv" not in would_do(clone, "lint")


def test_the_newest_releases_are_asked_for_again_and_the_lowest_once(clone: Path) -> None:
    given(clone, *(f".venv-{kind}/{name}" for kind in ("latest", "lowest") for name in ("bin/pip", ".dev")))
    assert "pip install --disable-pip-version-check --upgrade" in would_do(clone, "latest")
    assert "pip install" not in would_do(clone, "lowest")


def test_the_lowest_releases_are_tried_on_the_python_that_they_have_wheels_for(clone: Path) -> None:
    assert 'python="python3.11"' in would_do(clone, "lowest")
    assert 'python="/opt/python3.11"' in would_do(clone, "lowest", "PYTHON=/opt/python3.11")


def test_half_a_torch_is_none(clone: Path, tmp_path: Path) -> None:
    (test,) = [line for line in would_do(clone, "lint").splitlines() if "import torch" in line]
    code = test.split('-c "')[1].split('"')[0]
    (tmp_path / "site" / "torch" / "lib").mkdir(parents=True)
    run = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, '{tmp_path / 'site'}'); {code}"]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 1


def test_what_a_build_lacks_is_said(clone: Path) -> None:
    given(clone, ".venv/bin/pip")
    python = clone / ".venv" / "bin" / "python"  # whose pip fails over a list
    python.write_text(f'#!/bin/sh\ncase "$*" in *docs.txt) exit 1;; *pip*) ;; *) exec "{sys.executable}" "$@";; esac\n')
    python.chmod(0o755)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    for compiler, there in [("/nowhere/gcc", False), (sys.executable, headers)]:
        make = ["make", "docs", f"CC={compiler}"]
        done = subprocess.run(make, cwd=clone, env=told(), capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert ("apt install gcc python3-dev" not in done.stderr) == there


def test_every_set_up_waits_for_its_turn(clone: Path) -> None:
    lines = [part for words in (["docs"], ["lock"]) for part in would_do(clone, *words).splitlines()]
    touching = [line for line in lines if "-m pip install" in line or "-m venv" in line]
    assert len(touching) > 5
    assert all("flock Makefile" in line for line in touching)
