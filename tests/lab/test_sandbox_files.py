"""What confined programs write: hidden files count, and a full disk is no verdict."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from test_sandbox import AMPLE, ASLEEP, HOUR, LACKING, RIGHT, run

from svdtune.errors import SvdtuneError
from svdtune.lab.sandbox import Verdict, disk, supervise

pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"this system has no whole sandbox: {LACKING}")

# A file without a name: how it comes, and how it is kept.
HIDDEN = """
import mmap, os, tempfile, time
kept = []
for i in range(2000):
    if {born!r} == "unlinked":
        fd = os.open("x", os.O_RDWR | os.O_CREAT)
        os.unlink("x")
    elif {born!r} == "replaced":
        fd = os.open("x", os.O_RDWR | os.O_CREAT)
        os.close(os.open("y", os.O_RDWR | os.O_CREAT))
        os.rename("y", "x")
    else:
        fd = os.open(".", os.O_RDWR | os.O_TMPFILE)
    os.write(fd, bytes(10**6))
    if {kept!r} == "mapped":
        kept.append(mmap.mmap(fd, 4096))
    elif {kept!r} == "mapped and closed":
        import ctypes
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        assert libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0)) != 2**64 - 1
    if {kept!r} != "open":
        os.close(fd)
    if len(os.listdir(".")) > 60 or i > 50:
        break
time.sleep(10**6)
"""


@pytest.mark.parametrize("born", ["unlinked", "replaced", "born without a name"])
@pytest.mark.parametrize("kept", ["open", "mapped", "mapped and closed"])
def test_hidden_files_count(born: str, kept: str):
    verdict = run(HIDDEN.format(born=born, kept=kept), limits=replace(AMPLE, wall_seconds=60))
    assert not verdict.passed
    assert verdict.reason.startswith("wrote more than")


def test_a_file_without_a_name_may_be_used():
    uses = "    with tempfile.TemporaryFile() as file:\n        file.write(b'a' * 99)\n        return x * 2\n"
    assert run(f"import tempfile\ndef f(x):\n{uses}").passed


def test_a_full_disk_is_no_verdict_on_a_program(monkeypatch: pytest.MonkeyPatch):
    failed = Verdict(False, "OSError: no space")
    verdicts = iter([(failed, True), (Verdict(True, ""), False)])
    monkeypatch.setattr(supervise, "_check", lambda *_: next(verdicts))
    assert run(RIGHT).passed
    monkeypatch.setattr(supervise, "_check", lambda *_: (failed, True))
    with pytest.raises(
        SvdtuneError, match="fills up while programs run there; make room, or name another folder in TMPDIR"
    ):
        run(RIGHT)
    too_much = Verdict(False, "wrote more than 16777216 bytes or 256 files")
    monkeypatch.setattr(supervise, "_check", lambda *_: (too_much, True))
    assert run(RIGHT) == too_much


def test_room_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    told = iter([False, False, True])
    monkeypatch.setattr(disk, "has_room", lambda *_: next(told, False))
    disk.wait_for_room(tmp_path, 10**6, HOUR)
    with pytest.raises(SvdtuneError, match="has no room for a program's files: expected 1 MB; make room"):
        disk.wait_for_room(tmp_path, 10**6, 0)


def test_a_write_that_finds_the_disk_full_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    write, turns = supervise._write, iter([True])

    def full(path: Path, text: str) -> None:
        if next(turns, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(supervise, "_write", full)
    assert run(RIGHT).passed


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = []
    kept = supervise.subprocess.Popen

    def remember(*args, **kwargs):
        started.append(kept(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(supervise.subprocess, "Popen", remember)
    monkeypatch.setattr(supervise.tempfile, "tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    assert not run("import time\nopen('x', 'w')\ntime.sleep(10**6)", limits=ASLEEP).passed
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
