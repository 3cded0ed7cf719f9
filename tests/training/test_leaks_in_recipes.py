"""A run that would be trained on what it is scored on is refused, unless the set is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from svdtune.errors import SvdtuneError
from svdtune.training import train
from svdtune.training.recipe import check_recipe

ROWS = [{"instruction": f"What is {n} + 1?", "input": "", "output": f"{n + 1}", "answer": f"{n + 1}"} for n in range(9)]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return str(path)


def settings(tmp_path: Path, tiny_folder: Path, **data: Any) -> dict[str, Any]:
    return {
        "model": str(tiny_folder),
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {
            "train": write(tmp_path / "t.json", ROWS),
            "prompt": "instruction",
            "completion": "output",
            "max_length": 128,
        }
        | data,
        "training": {"learning_rate": 1e-3, "max_steps": 1, "save_steps": None},
        "output": {"dir": str(tmp_path / "run")},
    }


def test_held_out_rows_that_are_trained_on(tmp_path: Path, tiny_folder: Path) -> None:
    held_out = write(tmp_path / "h.json", [ROWS[3] | {"instruction": "what is 3+1"}, ROWS[3] | {"instruction": "new?"}])
    with pytest.raises(SvdtuneError, match=r"1 of the 2 questions of .*h\.json .*row 1 \(training row 4\)"):
        train(check_recipe(settings(tmp_path, tiny_folder, eval=held_out)))
    assert not (tmp_path / "run").exists()
    train(check_recipe(settings(tmp_path, tiny_folder, eval=held_out, allow_leaks=[held_out])))


def test_plain_text_asks_itself(tmp_path: Path, tiny_folder: Path) -> None:
    texts = [{"text": f"story {n}"} for n in range(5)]
    raw = settings(tmp_path, tiny_folder, train=write(tmp_path / "a.json", texts[:3]))
    for name in ("prompt", "completion"):
        del raw["data"][name]
    train(check_recipe(raw | {"data": raw["data"] | {"eval": write(tmp_path / "b.json", texts[3:])}}))
    raw["data"]["eval"] = write(tmp_path / "b.json", texts[2:])
    with pytest.raises(SvdtuneError, match=r"1 of the 3 questions of .*b\.json"):
        train(check_recipe(raw), overwrite=True)


def test_data_sets_of_the_evaluation_section(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path / "data"))
    write(tmp_path / "data" / "commonsense" / "boolq_test.json", [ROWS[0], ROWS[1]])
    raw = settings(tmp_path, tiny_folder) | {"evaluation": {"data": ["boolq", "piqa"]}}
    with pytest.raises(SvdtuneError, match="2 of the 2 questions of boolq are also in"):
        train(check_recipe(raw))
    raw["data"]["allow_leaks"] = ["boolq"]
    train(check_recipe(raw))  # piqa is not at hand, and not compared
    raw["data"]["allow_leaks"] = ["winogrande"]
    with pytest.raises(SvdtuneError, match="allow_leaks names 'winogrande', which this recipe is not scored on: boolq"):
        train(check_recipe(raw), overwrite=True)


def test_what_is_held_out_of_one_file_is_compared_with_the_others(tmp_path: Path, tiny_folder: Path) -> None:
    one, same = write(tmp_path / "a.json", ROWS), write(tmp_path / "b.json", ROWS)
    other = write(tmp_path / "c.json", [row | {"instruction": f"{row['instruction']} Now?"} for row in ROWS])
    without, only = {"source": one, "without": 0.4}, {"source": one, "only": 0.4}
    raw = settings(tmp_path, tiny_folder, train=[without, same])
    with pytest.raises(SvdtuneError, match=r"questions of .*\(training row"):
        train(check_recipe(settings(tmp_path, tiny_folder, train=[without, same], eval=only)))
    with pytest.raises(SvdtuneError, match=r"questions of .*a\.json"):
        train(check_recipe(raw | {"evaluation": {"data": [only], "task": "number", "answer": "answer"}}))
    train(check_recipe(settings(tmp_path, tiny_folder, train=[without, other], eval=only)))
