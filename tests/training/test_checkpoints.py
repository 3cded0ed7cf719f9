"""A checkpoint counts once it is sealed, and as long as its files are what was sealed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svdtune.training.checkpoints import SEAL, fault, keep_newest, keep_up_to, latest_checkpoint, seal


def checkpoint(run: Path, step: int, sealed: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"state" * step)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    if sealed:
        seal(folder)
    return folder


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    for step in (3, 20, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert latest_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert not list(tmp_path.rglob("training_args.bin"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not sealed": (lambda folder: (folder / SEAL).unlink(), "it was not written to its end"),
    "a byte": (lambda folder: (folder / "optimizer.pt").write_bytes(b"stale" * 9), "its optimizer.pt was altered"),
    "cut": (lambda folder: (folder / "optimizer.pt").write_bytes(b"stat"), "its optimizer.pt was altered"),
    "missing": (lambda folder: (folder / "trainer_state.json").unlink(), "its trainer_state.json is missing"),
    "seal cut": (lambda folder: (folder / SEAL).write_text('{"opt'), f"its {SEAL} is damaged"),
    "seal empty": (lambda folder: (folder / SEAL).write_text("{}"), f"its {SEAL} is damaged"),
    "seal of another kind": (lambda folder: (folder / SEAL).write_text("[1]"), f"its {SEAL} is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_skipped_and_the_reason_told(name: str, tmp_path: Path) -> None:
    older, newer = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    damage, reason = DAMAGES[name]
    damage(newer)
    assert fault(newer) == reason
    assert latest_checkpoint(tmp_path) == (older, [f"checkpoint-6 is skipped: {reason}"])


def test_none_at_all(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) == (None, [])
    checkpoint(tmp_path, 6, sealed=False)
    assert latest_checkpoint(tmp_path) == (None, ["checkpoint-6 is skipped: it was not written to its end"])


def test_old_ones_go_and_the_newest_sealed_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, sealed=False)
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    keep_up_to(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
