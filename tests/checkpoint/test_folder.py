"""A result folder appears whole or not at all, and what stands in its way is named."""

import os
from pathlib import Path

import pytest

from svdtune.checkpoint.folder import new_folder
from svdtune.errors import SvdtuneError


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
