"""Get the tests of the installed PEFT from its source distribution, once, into a cache folder."""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def cache_folder() -> Path:
    """Where PEFT's tests and the models for them stay: a folder of their own beside svdtune's
    cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "svdtune-conformance"


def fetch_tests() -> Path:
    """The folder `tests` of the installed PEFT's source distribution, downloaded by pip where it is
    not there yet.

    Raises:
        RuntimeError: pip could not get it; the message has pip's last line.
    """
    release = f"peft-{version('peft')}"
    target = cache_folder() / release / "tests"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "--dest", folder]
        done = subprocess.run([*command, release.replace("-", "==")], capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
            raise RuntimeError(
                f"cannot download the source distribution of {release} ({reason}). The tests need the package index once; "
                f"offline, unpack the folder `tests` of that archive into {target.parent}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work, tarfile.open(archives[0]) as archive:
            inside = [member for member in archive if "/tests/" in f"/{member.name}" and "/src/" not in member.name]
            archive.extractall(work, members=inside, filter="data")
            unpacked = next(Path(work).glob("*/tests"))
            # the archive lacks it, and the tests import each other relatively
            (unpacked / "__init__.py").touch()
            unpacked.rename(target)
    return target
