"""A whole evaluation: graded, resumed after an interruption, and refused where its inputs cannot be
used."""

import errno
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svdtune.data import to_examples
from svdtune.errors import SvdtuneError
from svdtune.evaluation import (
    Decoding,
    Grade,
    Interval,
    Item,
    Metric,
    Task,
    TransformersEngine,
    evaluate,
    get_task,
    sets,
    to_items,
)
from svdtune.evaluation.generation import Completion
from svdtune.export.source import Source
from svdtune.models import LoadedModel, load

TEXTS = ["2+2=", "a longer question than the others?", "hi", "what is it", "one more"]


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


def make_items(loaded: LoadedModel, reference: str = "4") -> list[Item]:
    return [
        Item(f"q{index}", text, tuple(loaded.tokenizer.encode(text)), reference) for index, text in enumerate(TEXTS)
    ]


def interrupt_after(batches: int):
    """A progress callback like a user's Ctrl-C once so many batches are done."""
    calls = iter(range(batches + 1))

    def on_progress(done: int, total: int) -> None:
        if next(calls) == batches:
            raise KeyboardInterrupt

    return on_progress


def test_what_a_template_opens_an_answer_with_is_not_graded(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}so {% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    said = iter(["so 4", "4", "so so 4"])

    def complete(engine: TransformersEngine, prompts: list[list[int]], *_: object) -> list[Completion]:
        tokens = [loaded.tokenizer.encode(next(said), add_special_tokens=False) for _ in prompts]
        return [Completion(one, ended=True) for one in tokens]

    monkeypatch.setattr(TransformersEngine, "complete", complete)
    rows = [{"prompt": text, "completion": "4"} for text in TEXTS[:3]]
    items = to_items(to_examples(rows, "prompt", "completion"), loaded.tokenizer, "chat")
    evaluate(loaded, items, get_task("exact"), tmp_path, max_new_tokens=8, batch_size=1)
    lines = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
    assert sorted(line["completion"] for line in lines) == ["4", "4", "so 4"]
    assert {item.opening for item in to_items(to_examples(rows, "prompt", "completion"), loaded.tokenizer)} == {()}


def test_result_and_predictions(loaded: LoadedModel, tmp_path: Path) -> None:
    items, seen = make_items(loaded), []
    right = loaded.tokenizer.decode(loaded.model.generate(torch.tensor([items[2].tokens]), max_new_tokens=6)[0, 2:])
    items[2] = Item("q2", items[2].prompt, items[2].tokens, right)
    result = evaluate(
        loaded,
        items,
        get_task("exact"),
        tmp_path / "out",
        max_new_tokens=6,
        batch_size=2,
        settings={"data": "here"},
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert (result.n, result.strict.correct, result.accuracy, result.paper) == (5, 1, 0.2, None)
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["q0", "q1", "q2", "q3", "q4"]
    assert [line["correct"] for line in lines] == [False, False, True, False, False]
    assert lines[2]["extracted"] == lines[2]["completion"] == lines[2]["reference"] == right
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stored["strict"]["interval"] == {"level": 0.95, **result.strict.interval._asdict()}
    assert stored["settings"].items() >= {"data": "here", "max_new_tokens": 6, "batch_size": 2, "task": "exact"}.items()


def test_resumes_after_an_interruption_with_the_same_predictions(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, task = make_items(loaded), get_task("number")
    evaluate(loaded, items, task, tmp_path / "whole", max_new_tokens=6, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, items, task, tmp_path / "cut", max_new_tokens=6, batch_size=2, on_progress=interrupt_after(1))
    assert len((tmp_path / "cut" / "predictions.jsonl").read_text().splitlines()) == 2
    asked = []
    complete = TransformersEngine.complete
    monkeypatch.setattr(TransformersEngine, "complete", lambda *args: asked.extend(args[1]) or complete(*args))
    result = evaluate(loaded, items, task, tmp_path / "cut", max_new_tokens=6, batch_size=2)
    assert len(asked) == 3
    assert result.n == 5
    for name in ("predictions.jsonl", "settings.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = evaluate(loaded, items, task, tmp_path / "cut", max_new_tokens=6, batch_size=2)
    assert len(asked) == 3
    assert again.strict == result.strict


def test_predictions_of_other_weights_are_never_reused(loaded: LoadedModel, tmp_path: Path) -> None:
    items, task = make_items(loaded), get_task("number")
    evaluate(loaded, items, task, tmp_path, max_new_tokens=2)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(SvdtuneError, match=r"other settings.*weights"):
        evaluate(loaded, items, task, tmp_path, max_new_tokens=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "holds no items"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 500}, r"item q1: its prompt has 34 tokens.*512 positions"),
        ({"items": [Item("q9", "", (), "4")]}, "item q9: its prompt is empty"),
        ({"items": [Item("q9", "a", (3,), "four")]}, "needs a number in every reference"),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_written(
    loaded: LoadedModel, tmp_path: Path, change: dict, message: str
) -> None:
    arguments = {"items": make_items(loaded), "max_new_tokens": 2, "batch_size": 2} | change
    with pytest.raises(SvdtuneError, match=message):
        evaluate(loaded, arguments.pop("items"), get_task("number"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_error(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SvdtuneError, match=f"cannot write {tmp_path}: the disk is full"):
        evaluate(loaded, make_items(loaded), get_task("number"), tmp_path, max_new_tokens=2)


def test_both_modes_and_metrics_of_the_whole_are_reported(loaded: LoadedModel, tmp_path: Path) -> None:
    task = Task(
        "both",
        strict=lambda completion, reference: Grade("s", True),
        paper=lambda completion, reference: Grade(None, False),
        metrics=lambda completions, references: {"count": Metric(10.0, Interval(9.0, 11.0))},
    )
    result = evaluate(loaded, make_items(loaded), task, tmp_path, max_new_tokens=2)
    assert (result.strict.correct, result.paper.correct, result.metrics["count"].value) == (5, 0, 10.0)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert (stored["strict"]["accuracy"], stored["paper"]["accuracy"]) == (1.0, 0.0)
    assert stored["metrics"] == {"count": {"value": 10.0, "interval": {"level": 0.95, "low": 9.0, "high": 11.0}}}
    line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert (line["extracted"], line["correct"], line["paper_extracted"], line["paper_correct"]) == (
        "s",
        True,
        None,
        False,
    )


def test_several_samples_an_item_are_resumed_alike_and_scored_by_pass_at_k(loaded: LoadedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight.mul_(0.1)  # a flatter choice
    task = Task("even", strict=lambda completion, reference: Grade(completion, sum(completion.encode()) % 2 == 0))
    how = {"max_new_tokens": 3, "batch_size": 4, "decoding": Decoding(samples=3, temperature=1.0, seed=1)}
    items = make_items(loaded)
    whole = evaluate(loaded, items, task, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, items, task, tmp_path / "cut", **how, on_progress=interrupt_after(2))
    evaluate(loaded, items, task, tmp_path / "cut", **how)
    lines = (tmp_path / "whole" / "predictions.jsonl").read_text()
    assert (tmp_path / "cut" / "predictions.jsonl").read_text() == lines
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(i, sample) for i in range(5) for sample in range(3)]
    assert len({row["completion"] for row in rows}) > 5
    right = [[row["correct"] for row in rows if row["index"] == index] for index in range(5)]
    assert (whole.n, whole.strict.correct) == (5, sum(map(sum, right)))
    assert whole.accuracy == pytest.approx(whole.metrics["pass@1"].value)
    assert whole.metrics["pass@3"].value == pytest.approx(sum(map(any, right)) / 5)
    with pytest.raises(SvdtuneError, match="other settings"):
        evaluate(loaded, items, task, tmp_path / "cut", **how | {"decoding": Decoding(samples=3, temperature=0.5)})


def test_graders_that_start_processes_run_side_by_side(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.Barrier(5)  # holds all up for ever unless five are graded at once

    def grade(completion: str, reference: str) -> Grade:
        threads.wait()
        return Grade(completion, True)

    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    task = Task("slow", strict=grade, programs=True)
    assert evaluate(loaded, make_items(loaded), task, tmp_path, max_new_tokens=2).accuracy == 1


@pytest.mark.parametrize(("given", "used"), [(None, "bfloat16"), ("float32", "float32")])
def test_the_dtype_of_a_runs_evaluation_section_is_used_unless_another_is_given(
    given: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def opened(source: Source, engine: str, dtype: str | None, device: str | None) -> None:
        asked.append(dtype)
        raise SvdtuneError("enough")

    monkeypatch.setattr(sets, "_opened", opened)
    section = SimpleNamespace(dtype="bfloat16", beams=1, length_penalty=1.0, no_repeat_ngram_size=0)
    recipe = SimpleNamespace(evaluation=section)
    monkeypatch.setattr(sets, "sets_to_ask", lambda *_: [])
    with pytest.raises(SvdtuneError, match="enough"):
        sets.evaluate_source(Source("base", recipe=recipe), "base", dtype=given)
    assert asked == [used]
