"""One program at a time in a run folder, and nothing of an overwritten run stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svdtune.analysis import analyze
from svdtune.analysis.facts import read_facts
from svdtune.errors import SvdtuneError
from svdtune.evaluation.score_table import add_scores
from svdtune.evaluation.sets import evaluate_source
from svdtune.export import find_source
from svdtune.export.merge_checkpoint import merge
from svdtune.training import check_recipe, train
from svdtune.training.folder import SUMMARY, trained_weights
from svdtune.training.lock import HOLDER, LOCK, held

PROGRAM = """
import sys, time
from pathlib import Path
from svdtune.training.lock import held
with held(Path(sys.argv[1]), "train"):
    Path(sys.argv[1], "begun").touch()
    time.sleep(600)
"""


def recipe_of(model: Path, folder: Path, **training: object):
    return check_recipe(
        {
            "model": str(model),
            "method": {"name": "sorsa", "r": 2, "target_modules": ["q_proj"]},
            "data": {
                "train": {"source": "arithmetic", "limit": 8},
                "eval": {"source": "arithmetic", "split": "test", "limit": 2},
                "prompt": "question",
                "completion": "answer",
                "max_length": 256,
            },
            "training": {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 2} | training,
            "output": {"dir": str(folder)},
        }
    )


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(recipe_of(tiny_folder, folder))
    return folder


@pytest.fixture
def other(finished: Path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, finished])
    while not (finished / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()
    (finished / "begun").unlink(missing_ok=True)


@pytest.mark.slow
def test_every_verb_that_works_there_says_who_is_at_work(tiny_folder, finished, tmp_path, other) -> None:
    match = rf"run is in use by `svdtune train`, process {other.pid} on .* since 20.*Wait until that has ended"
    verbs = [
        lambda: train(recipe_of(tiny_folder, finished), overwrite=True),
        lambda: evaluate_source(find_source(finished), "run"),
        lambda: analyze(finished),
        lambda: merge(find_source(finished), tmp_path / "merged"),
    ]
    for verb in verbs:
        with pytest.raises(SvdtuneError, match=match):
            verb()
    assert not (tmp_path / "merged").exists()
    assert (finished / SUMMARY).is_file()


@pytest.mark.slow
def test_a_dead_holder_is_no_holder(finished, other) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (finished / HOLDER).exists()
    with held(finished, "evaluate"):
        assert json.loads((finished / HOLDER).read_text())["pid"] == os.getpid()
        with held(finished, "merge"):  # what this process holds already
            pass
    assert not (finished / HOLDER).exists()


def test_a_run_that_does_not_begin_leaves_nothing(tmp_path) -> None:
    with held(tmp_path / "run", "train"):
        assert (tmp_path / "run" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be(tmp_path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(SvdtuneError, match=r"cannot use .*file/run: Not a directory; name another output"),
        held(tmp_path / "file" / "run", "train"),
    ):
        pass


def test_scores_of_an_overwritten_run_are_nobodys(tiny_folder, tmp_path) -> None:
    folder = tmp_path / "run"
    train(recipe_of(tiny_folder, folder))
    evaluate_source(find_source(folder), "run", form={"max_new_tokens": 4})
    assert read_facts(folder)["scores"]
    [result] = folder.glob("evaluations/*/result.json")
    kept = result.read_text()
    assert json.loads(kept)["weights"] == trained_weights(folder)
    train(recipe_of(tiny_folder, folder, seed=7), overwrite=True)
    assert not (folder / "evaluations").exists()
    # put back, as a copy from elsewhere
    result.parent.mkdir(parents=True)
    result.write_text(kept)
    facts = read_facts(folder)
    assert not facts["scores"]
    assert any("which are of other weights" in text for text in facts["missing"])
    add_scores(folder, folder / "adapter")
    assert "Scores" not in (folder / "adapter" / "README.md").read_text()


def test_the_disk_is_looked_at_before_training(tiny_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("svdtune.system.free_bytes", lambda path: 10_000)
    monkeypatch.setattr("svdtune.training.run._fit", lambda *_: pytest.fail("it began to train"))
    with pytest.raises(SvdtuneError, match=r"needs 0 MB for its result and 2 checkpoints, and 0 MB are free"):
        train(recipe_of(tiny_folder, tmp_path / "run", save_steps=1))
    assert not (tmp_path / "run").exists()
