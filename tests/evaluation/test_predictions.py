"""The predictions file after power cuts, with other settings, and damaged."""

import json
from pathlib import Path

import pytest

from svdtune.errors import SvdtuneError
from svdtune.evaluation.predictions import Prediction, PredictionStore


def prediction(index: int, completion: str = "4") -> Prediction:
    return Prediction(index, f"q{index}", "2+2=", completion, "4", "4", True, None, None, 1, True)


def test_lines_survive_and_come_back(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path / "new" / "out", {"model": "m"})
    store.append([prediction(2, "line\nbreak \u2028 and \x85"), prediction(0)])
    again = PredictionStore(tmp_path / "new" / "out", {"model": "m"})
    assert again.done == {(2, 0): prediction(2, "line\nbreak \u2028 and \x85"), (0, 0): prediction(0)}


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    PredictionStore(tmp_path, {}).append([prediction(0), prediction(1)])
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    store = PredictionStore(tmp_path, {})
    assert list(store.done) == [(0, 0)]
    store.append([prediction(1)])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]


def test_finish_puts_lines_into_the_order_of_the_data(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path, {})
    store.append([prediction(3), prediction(1)])
    store.append([prediction(0), prediction(2)])
    store.finish({"accuracy": 1.0})
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "result.json").read_text()) == {"accuracy": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.jsonl", "result.json", "settings.json"]


def test_other_settings_are_refused_and_restart_drops_the_old(tmp_path: Path) -> None:
    PredictionStore(tmp_path, {"model": "a", "ends": (0, 1)}).append([prediction(0)])
    assert PredictionStore(tmp_path, {"model": "a", "ends": (0, 1)}).done
    with pytest.raises(SvdtuneError, match=r"other settings \(model: 'a' there, 'b' now\).*--restart"):
        PredictionStore(tmp_path, {"model": "b", "ends": (0, 1)})
    assert PredictionStore(tmp_path, {"model": "b"}, restart=True).done == {}


def test_damage_is_named_by_line(tmp_path: Path) -> None:
    PredictionStore(tmp_path, {}).append([prediction(0)])
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"index": 1}\n')
    with pytest.raises(SvdtuneError, match=r"predictions\.jsonl, line 2 is damaged"):
        PredictionStore(tmp_path, {})


def test_predictions_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(SvdtuneError, match=r"no settings\.json beside it"):
        PredictionStore(tmp_path, {})


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SvdtuneError, match="is a file"):
        PredictionStore(tmp_path / "out", {})
