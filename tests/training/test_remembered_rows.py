"""Rows are encoded once: the cache gives what encoding would, and nothing else ever."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_training_tasks import rows_of, write

from runs import go, log_of, timeless
from svdtune.cache import entries, trim
from svdtune.data import cores
from svdtune.errors import SvdtuneError
from svdtune.spectra import store
from svdtune.training import task_rows

PROMPTS = [{"prompt": f"Add {i} to 1.", "completion": str(i + 1)} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in PROMPTS
]


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_folder)},
        "method": {"name": "sorsa", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": write(tmp_path / "train.jsonl", PROMPTS), "max_length": 64},
        "training": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": None},
        "output": {"dir": str(tmp_path / "run")},
    }


def line_of(shown: str) -> str:
    return next(line for line in shown.splitlines() if line.startswith("data "))


def again(recipe: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    folder, shown = go(recipe, overwrite=True)
    return timeless(log_of(folder)), line_of(shown)


@pytest.mark.parametrize("task", ["sft", "dpo", "kto", "reward"])
@pytest.mark.parametrize("kept", ["file", "rows"])
@pytest.mark.family(2)
def test_a_second_run_reads_no_row(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, kept: str
) -> None:
    rows = PROMPTS if task == "sft" else rows_of(task)
    recipe["data"]["train"] = write(tmp_path / "train.jsonl", rows)
    recipe["training"]["task"] = task
    if kept == "rows":  # of a source that is no file
        monkeypatch.setattr(task_rows, "read_rows", lambda *_, **__: rows)
        recipe["data"]["train"] = "made"
    losses, line = again(recipe)
    assert "12 " in line
    assert "cached" not in line
    with monkeypatch.context() as patch:
        patch.setattr(task_rows, "encode_all", None)
        patch.setattr(task_rows, "encode_pairs", None)
        patch.setattr(task_rows, "encode_labelled", None)
        if kept == "file":
            patch.setattr(task_rows, "read_task", None)
        assert again(recipe) == (losses, f"{line} (cached)")


@pytest.mark.slow
def test_whatever_decides_the_tokens_is_part_of_the_key(recipe: dict[str, Any], tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [*PROMPTS[:-1], {"prompt": "Add 7.", "completion": "8"}])
    changes: list[tuple[str, Any]] = [
        ("max_length", 63),
        ("loss_on", "all"),
        ("overlong", "drop"),
        ("template", "Q: {prompt}"),
        ("prompt", "{prompt} "),
        ("completion", "{completion} "),
        ("train", {"source": recipe["data"]["train"], "limit": 11}),
        ("train", other),
    ]
    again(recipe)
    for name, value in changes:
        recipe["data"][name] = value
        assert "cached" not in again(recipe)[1], name
    assert "cached" in again(recipe)[1]


def test_a_chat_template_is_part_of_the_key(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["data"]["train"] = write(tmp_path / "chats.jsonl", CHATS)
    form = tmp_path / "form.jinja"
    recipe["model"]["chat_template"] = str(form)
    for asks in ("Q: ", "asked: "):
        turn = "{% for m in messages %}" + asks + "{{ m.content }}<|end|>{% endfor %}"
        form.write_text(turn + "{% if add_generation_prompt %}" + asks + "{% endif %}")
        assert ["cached" in again(recipe)[1] for _ in range(2)] == [False, True]


def test_a_changed_file_is_read_anew_and_a_refusal_stays_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    again(recipe)
    write(tmp_path / "train.jsonl", [*PROMPTS[:-1], {"prompt": "Add 1 to 1.", "completion": "3"}])
    assert "cached" not in again(recipe)[1]
    held_out = write(tmp_path / "eval.jsonl", PROMPTS[3:4])
    recipe["data"]["eval"] = held_out
    for _ in range(2):
        with pytest.raises(SvdtuneError, match=r"row 1 \(training row 4\)"):
            go(recipe, overwrite=True)
    del recipe["data"]["eval"]
    write(tmp_path / "train.jsonl", [*PROMPTS, {"prompt": "Add"}])
    for _ in range(2):
        with pytest.raises(SvdtuneError, match="row 13 has no field 'completion'"):
            go(recipe, overwrite=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other version"])
@pytest.mark.family(1)
def test_damaged_files_of_the_cache_are_made_anew(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = again(recipe)
    files = [entry.path for entry in entries() if entry.kind in ("rows", "questions")]
    assert sorted(path.parent.name for path in files) == ["questions", "rows"]
    if damage == "other version":
        monkeypatch.setattr(store, "VERSION", "0")
    for path in files:
        data = path.read_bytes()
        if damage == "cut":
            path.write_bytes(data[:-3])
        elif damage == "flipped":
            path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert again(recipe) == first
    assert again(recipe)[1] == f"{first[1]} (cached)"


def test_without_a_cache(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDTUNE_CACHE", "off")
    assert again(recipe) == again(recipe)


def test_several_processes_encode_what_one_does(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["data"]["train"] = write(tmp_path / "many.jsonl", PROMPTS * 200)
    one = again(recipe)
    trim(0)
    monkeypatch.setattr(cores, "_cores", lambda: 2)
    monkeypatch.setattr(cores, "_FEW", cores.CHUNK)
    assert again(recipe) == one
    recipe["data"]["train"] = write(
        tmp_path / "many.jsonl", [*PROMPTS * 200, {"prompt": "long " * 30, "completion": ""}]
    )
    with pytest.raises(SvdtuneError, match=r"many\.jsonl row 2401: the prompt is"):
        go(recipe, overwrite=True)


def test_packing_and_grouping_by_length_take_remembered_rows(recipe: dict[str, Any]) -> None:
    for setting in ("packing", "group_by_length"):
        recipe["training"] |= {"packing": False, "group_by_length": False, setting: True}
        first = again(recipe)
        assert again(recipe)[0] == first[0]


def test_keys_hold_what_json_can_say() -> None:
    assert task_rows.content_of("x", [{"image": object()}]) is None
    assert task_rows.content_of("x", [{"a": 1}]) == task_rows.content_of("y", json.loads('[{"a": 1}]'))
