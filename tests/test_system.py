"""Full disks, full memory and what is in the way: one sentence each, and no file or folder
half-written."""

import errno
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.system import (
    check_free,
    explain_write_errors,
    is_out_of_memory,
    new_folder,
    printable,
    read_json,
    replace_text,
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "no permission"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (Exception("No space left on device (os error 28)"), "the disk is full"),  # of tokenizers
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
        (Exception("No space left on device (os error 28)"), "cannot write: the disk is full"),
        (MemoryError(), "out of memory: give it smaller batches, a smaller model, or a machine with more"),
    ],
)
def test_the_command_lines_last_resort(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("svdtune.cache.cache_dir", fail)
    result = CliRunner().invoke(app, ["cache", "list"])
    assert result.exit_code == 2
    assert result.stderr == f"svdtune: {message}\n"


def test_a_fault_of_svdtunes_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("a fault")

    monkeypatch.setattr("svdtune.cache.cache_dir", fail)
    assert isinstance(CliRunner().invoke(app, ["cache", "list"]).exception, KeyError)


@pytest.mark.parametrize("existing", [True, False])
def test_appears_with_its_files_and_the_usual_permissions(tmp_path: Path, existing: bool) -> None:
    output = tmp_path / "a" / "result"
    if existing:
        output.mkdir(parents=True)
    with new_folder(output) as work:
        (work / "file").write_text("text")
        (work / "file").chmod(0o600)
        assert not (output / "file").exists()
    assert (output / "file").read_text() == "text"
    (tmp_path / "ordinary").mkdir()
    assert output.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    (tmp_path / "ordinary" / "file").touch()
    assert (output / "file").stat().st_mode == (tmp_path / "ordinary" / "file").stat().st_mode
    assert list(output.parent.iterdir()) == [output]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave the name, and empty files."""
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "result").exists()
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(tmp_path / "result") as work:
        (work / "file").write_text("text")
        (work / "inner").mkdir()
        (work / "inner" / "file").write_text("text")
    written = [tmp_path / "result" / "file", tmp_path / "result" / "inner" / "file"]
    assert sorted(synced) == sorted(path.stat().st_ino for path in written)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_leaves_nothing_when_stopped(tmp_path: Path, stop: type[BaseException]) -> None:
    def fill_and_stop() -> None:
        with new_folder(tmp_path / "result") as work:
            (work / "file").write_text("text")
            raise stop

    with pytest.raises(stop):
        fill_and_stop()
    assert list(tmp_path.iterdir()) == []


def test_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SvdtuneError, match="not empty"), new_folder(tmp_path / "full"):
        pass
    with pytest.raises(SvdtuneError, match="not a folder"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(SvdtuneError, match="cannot write"), new_folder(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "full" / "precious").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_never_overwrites_what_appears_meanwhile(tmp_path: Path) -> None:
    def fill_while_another_does() -> None:
        with new_folder(tmp_path / "result"):
            (tmp_path / "result").mkdir()
            (tmp_path / "result" / "precious").write_text("kept")

    with pytest.raises(SvdtuneError, match="something of that name"):
        fill_while_another_does()
    assert [path.name for path in tmp_path.rglob("*")] == ["result", "precious"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SvdtuneError, match="no permission"), new_folder(tmp_path / "result"):
        pass
    tmp_path.chmod(0o700)


class TestWhatIsNoRegularFile:
    def test_a_device_stays_one(self):
        with pytest.raises(SvdtuneError, match="the disk is full"), explain_write_errors(Path("/dev/full")):
            replace_text(Path("/dev/full"), "text" * 10_000)
        assert Path("/dev/full").is_char_device()

    def test_a_tokenizer_says_it_in_its_own_way(self, tiny_tokenizer):
        tokenizer = tiny_tokenizer.backend_tokenizer
        with pytest.raises(SvdtuneError, match="the disk is full"), explain_write_errors(Path("/dev/full")):
            tokenizer.save("/dev/full")

    def test_a_pipe_carries_it(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        read = threading.Thread(target=lambda: (tmp_path / "read").write_text(pipe.read_text()))
        read.start()
        replace_text(pipe, "text")
        read.join(60)
        assert (tmp_path / "read").read_text() == "text"
        assert pipe.is_fifo()

    def test_a_link_stays_one(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        link, file = tmp_path / "link", tmp_path / "elsewhere" / "file"
        link.symlink_to(file)
        for text in ("one", "two"):
            replace_text(link, text)
            assert file.read_text() == text
        assert link.is_symlink()
        assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": [{"a": null, "c": 1, "a": null}]}'])
def test_a_key_twice_in_json(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(
        SvdtuneError, match=r"file\.json is damaged: the key 'a' stands there twice; remove one of them"
    ):
        read_json(tmp_path / "file.json")


def test_what_steers_a_terminal_is_spelled_out():
    text = "a\x1b]0;title\x07b\x9b2Jc\u202ed\n\té\r"
    assert printable(text) == "a\\x1b]0;title\\x07b\\x9b2Jc\\x202ed\n\té\\x0d"


def test_room_on_the_disk(tmp_path):
    check_free(tmp_path / "not" / "there", 1, "a byte")
    with pytest.raises(
        SvdtuneError, match=r"run needs .* MB for its result, and .* MB are free on that disk; free some"
    ):
        check_free(tmp_path / "run", 10**18, "its result")
