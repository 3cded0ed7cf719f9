"""Several data sets asked in common batches: the same answers, in fewer batches."""

import json
from pathlib import Path

import pytest

from svdtune.evaluation import Decoding, TransformersEngine
from svdtune.evaluation.questions import BatchedEngine, ask, prepare
from svdtune.models import load

SETS = {"SVAMP": 3, "AddSub": 2, "SingleEq": 4}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "sara_math"
    folder.mkdir(parents=True)
    for name, count in SETS.items():
        rows = [{"instruction": f"{name} {'o' * n}?", "output": "It is 7.", "answer": "7"} for n in range(count)]
        (folder / f"{name}_test.json").write_text(json.dumps(rows))
    (folder / "math_data.json").write_text(json.dumps([{"instruction": "?", "output": "7", "answer": "7"}]))
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path / "data"))


def test_answers_are_those_of_each_set_alone(data, tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    engine = TransformersEngine(load(tiny_folder))
    sets = [prepare(None, name.lower(), max_new_tokens=6) for name in SETS]
    alone = [ask(engine, one, tmp_path / "alone" / str(at), 4) for at, one in enumerate(sets)]
    batches: list[int] = []
    complete = TransformersEngine.complete

    def counted(self, prompts, *rest):
        batches.append(len(prompts))
        return complete(self, prompts, *rest)

    monkeypatch.setattr(TransformersEngine, "complete", counted)
    together = BatchedEngine(engine, sets, 4)
    found = [ask(together, one, tmp_path / "together" / str(at), 4) for at, one in enumerate(sets)]
    assert batches == [4, 4, 1]
    assert [one.strict for one in found] == [one.strict for one in alone]
    for at in range(len(sets)):
        lines = [(tmp_path / how / str(at) / "predictions.jsonl").read_text() for how in ("alone", "together")]
        assert lines[0] == lines[1]


def test_what_is_drawn_is_drawn_batch_by_batch(data, tiny_folder: Path) -> None:
    engine = TransformersEngine(load(tiny_folder))
    sets = [prepare(None, name.lower(), max_new_tokens=6) for name in SETS]
    drawn = Decoding(temperature=1.0)
    prompts = [[5, 6, 7], [8, 9]]
    expected = engine.complete(prompts, 6, drawn, [3, 4])
    assert BatchedEngine(engine, sets, 4).complete(prompts, 6, drawn, [3, 4]) == expected
    assert BatchedEngine(engine, sets, 4).complete(prompts, 6, Decoding(), [0, 0]) == engine.complete(
        prompts, 6, Decoding(), [0, 0]
    )


def test_another_decoding_is_not_answered_from_the_first_ones_completions(data, tiny_folder: Path) -> None:
    engine = TransformersEngine(load(tiny_folder))
    together = BatchedEngine(engine, [], 4)
    for decoding in (Decoding(), Decoding(no_repeat_ngram_size=1)):
        assert together.complete([[5, 6, 7]], 8, decoding, [0]) == engine.complete([[5, 6, 7]], 8, decoding, [0])
