"""The core works with the laboratory deleted, and never imports it of itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import svdtune
from svdtune.registry import Registry, has_lab

ROOT = Path(svdtune.__file__).parent


@pytest.mark.slow
def test_every_core_verb_works_on_a_copy_without_the_laboratory(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "svdtune", ignore=shutil.ignore_patterns("lab", "__pycache__"))
    # what deleting the files may leave
    (tmp_path / "svdtune" / "lab" / "__pycache__").mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).with_name("core_alone.py")),
            str(tiny_folder),
            str(tmp_path),
        ],
        env=environment | {"SVDTUNE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"


def test_importing_svdtune_imports_nothing_of_the_laboratory() -> None:
    code = "import svdtune, sys; print(*(name for name in sys.modules if name.startswith('svdtune.lab')))"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == ""


def test_a_registry_gives_what_is_added_and_refuses_another_of_the_name() -> None:
    assert has_lab()
    things: Registry[int] = Registry("cli", {"own": 1})
    things.add("other", 2)
    assert dict(things) == {"own": 1, "other": 2}
    assert (len(things), things.listed()) == (2, "own, other")
    with pytest.raises(ValueError, match="there is another 'own' already"):
        things.add("own", 3)
    with pytest.raises(KeyError):
        things["neither"]
