"""Full disks, full memory and files in the way: one sentence each, and no file half-written."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.system import explain_write_errors, is_out_of_memory, replace_text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "no permission"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
    ],
)
def test_the_systems_errors_become_one_message(error: Exception, message: str) -> None:
    with pytest.raises(SvdtuneError, match=f"cannot write out: .*{message}"), explain_write_errors(Path("out")):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "Bad file descriptor"), SafetensorError("invalid header")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain_write_errors(Path("out")):
        raise error
    assert caught.value is error


def test_torchs_own_error_of_a_write_that_stops_half_way(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with (
            pytest.raises(
                SvdtuneError, match=r"writing stopped half-way, with [\d,]+ MB left on the disk; name another"
            ),
            explain_write_errors(tmp_path),
        ):
            torch.save({"a": torch.zeros(100_000)}, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "cannot use /x/y: you have no permission"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write: the disk is full"),
        (MemoryError(), "out of memory: give it smaller batches, a smaller model, or a machine with more"),
    ],
)
def test_the_command_lines_last_resort(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("svdtune.spectra.store.cache_dir", fail)
    result = CliRunner().invoke(app, ["cache", "list"])
    assert result.exit_code == 2
    assert result.stderr == f"svdtune: {message}\n"


def test_a_fault_of_svdtunes_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("a fault")

    monkeypatch.setattr("svdtune.spectra.store.cache_dir", fail)
    assert isinstance(CliRunner().invoke(app, ["cache", "list"]).exception, KeyError)
