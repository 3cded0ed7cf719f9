"""A checkpoint counts once it is sealed, and as long as its files are what was sealed."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from svdtune.analysis.records import LogLine, read_lines
from svdtune.training.checkpoints import SEAL, fault, keep_newest, keep_steps, keep_up_to, latest_checkpoint, seal


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


BROKEN = {
    "half": (b'{"step": 3, "lo', None),
    "bytes": (b'{"step": 3, "loss": "\xff"}\n', "line 3 of log.jsonl is damaged and is left out: 'utf-8' codec"),
    "list": (b"[3]\n", "expected a JSON object, found a list"),
    "twice": (b'{"step": 3, "step": 1}\n', "the key 'step' stands there twice"),
    "deep": (b"[" * 100_000 + b"\n", "line 3 of log.jsonl is damaged"),
    "no-step": (b'{"loss": 1}\n', "1 lines of log.jsonl name no step and are left out"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_the_lines_of_a_log_are_read_in_one_way(kind: str, tmp_path: Path) -> None:
    """By a run that goes on, which leaves a damaged line out, and by a report, which leaves out the
    file."""
    broken, said = BROKEN[kind]
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": NaN}\n{"step": 2}\n' + broken)
    problems: list[str] = []
    read = read_lines(tmp_path, "log.jsonl", LogLine, problems)
    assert [line["step"] for line in read] == ([] if problems else [1, 2])
    assert len(problems) == (kind != "half")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keep_steps(tmp_path / "log.jsonl", 1)
    assert [str(one.message) for one in caught if said and said in str(one.message)] == [
        str(one.message) for one in caught
    ]
    assert len(caught) == (said is not None)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": NaN}\n'
    keep_steps(tmp_path / "none.jsonl", 1)
    assert not (tmp_path / "none.jsonl").exists()
