"""Run a short part of the suite on every Python that svdtune supports and `make test` does not run
on.

An interpreter is one on PATH, one of pyenv's, or one that uv has or can download. A version that
cannot be had, or that the disk has no room for, is named and is no failure. Each gets a virtual
environment of its own, .venv-3.12 for example, with the same releases as `make test`. It goes once
the tests have passed, since one with CUDA's libraries takes several GB.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
# What one environment takes while it is set up, in bytes. PyPI's torch for Linux on x86_64 brings
# CUDA's libraries: 7 GB were seen to go where no wheel had to be downloaded, and pip keeps the ones
# that it downloads.
ROOM = 10 * 10**9
# The methods in PEFT, their mathematics, the command line, a whole run, and an export.
TESTS = (
    "tests/linalg/test_factors.py",
    "tests/methods/test_math.py",
    "tests/methods/test_peft_verbs.py",
    "tests/methods/test_registration.py",
    "tests/cli/test_command_line.py",
    "tests/training/test_recipe.py",
    "tests/training/test_run.py",
    "tests/export/test_lora.py",
)


def main() -> int:
    """Print what was run; exit code 1 where a set-up or a test failed."""
    usual = version_of(ROOT / ".venv" / "bin" / "python")
    failed = []
    for version in VERSIONS:
        if version == usual:
            continue
        interpreter = find(version)
        free = shutil.disk_usage(ROOT).free
        if interpreter is None:
            print(f"interpreters: no Python {version} on this machine, and none can be downloaded; it was not tried")
        elif free < ROOM:
            print(
                f"interpreters: Python {version} was not tried: {free / 1e9:.1f} GB are free on the disk, and an "
                f"environment takes up to {ROOM / 1e9:.0f} GB"
            )
        elif not passes(version, interpreter):
            failed.append(version)
    if failed:
        print(f"interpreters: failed on Python {', '.join(failed)}")
    return int(bool(failed))


def passes(version: str, interpreter: str) -> bool:
    """Whether the tests pass in an environment of a version, or the disk was full before it was
    set up."""
    print(f"interpreters: Python {version}, {interpreter}", flush=True)
    environment = ROOT / f".venv-{version}"
    make = [shutil.which("make") or "make", "-C", str(ROOT), f"VENV={environment.name}", f"PYTHON={interpreter}"]
    set_up = subprocess.run([*make, f"{environment.name}/.dev"], stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(set_up.stderr)
    if set_up.returncode and os.strerror(errno.ENOSPC) in set_up.stderr:
        print(f"interpreters: Python {version} was not tried: the disk was full before its environment was set up")
        shutil.rmtree(environment, ignore_errors=True)
        return True
    if set_up.returncode or subprocess.run([*make, "test", f"PYTEST={' '.join(TESTS)}"], check=False).returncode:
        return False
    shutil.rmtree(environment, ignore_errors=True)
    return True


def find(version: str) -> str | None:
    """A working interpreter of a version, downloaded where it must be."""
    found = next((path for path in candidates(version) if version_of(path) == version), None)
    if found is None and uv("python", "install", version).returncode == 0:
        found = next((path for path in candidates(version) if version_of(path) == version), None)
    return found


def candidates(version: str) -> Iterator[str]:
    """Where a version may lie: as PATH has it, as pyenv keeps it, as uv does."""
    yield f"python{version}"
    yield from map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    yield uv("python", "find", "--no-python-downloads", version).stdout.strip()


def version_of(python: str | Path) -> str | None:
    """The version of an interpreter, such as 3.12; None where it does not work or cannot make
    environments."""
    ask = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        return None
    said = done.stdout.strip()
    return said if done.returncode == 0 and re.fullmatch(r"3\.\d+", said) else None


def uv(*words: str) -> subprocess.CompletedProcess[str]:
    """What uv says; it is installed beside the interpreter that runs this."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("uv")), *words], capture_output=True, text=True, check=False
    )


if __name__ == "__main__":
    raise SystemExit(main())
