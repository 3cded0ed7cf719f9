"""Reading a study's results: what is refused, and how items are packed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import made_results, made_run, read

from svdtune.errors import SvdtuneError
from svdtune.lab.study.results import pack, read_results, unpack


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_items_survive_packing(right):
    assert unpack(pack(right), len(right)).tolist() == right


def test_the_first_item_is_the_highest_bit():
    assert pack([True, False, False, False, True]) == "11"
    assert pack([False] * 9) == "000"
    assert unpack("1", 3).tolist() == [False, False, True]


def write(folder, data):
    path = folder / "results.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_what_a_file_says(tmp_path):
    found = read_results(write(tmp_path, made_results([made_run(), made_run(seed=2, loss=float("nan"))])))
    assert found.runs[0].average == pytest.approx(np.mean([score.value for score in found.runs[0].scores.values()]))
    assert found.runs[0].scores["svamp"].items.mean() == found.runs[0].scores["svamp"].value
    assert found.runs[1].loss is None


def test_how_many_final_runs_are_not_there():
    """Two tasks at two budgets: three seeds of one arm at each, one arm without a size once, the
    untrained model once."""
    arms = {"base": {"untrained": True}, "lora": {}, "full": {"budget": False}}
    spec = {"tasks": {"math": "m.yaml", "e2e": "e.yaml"}, "budgets": ["300k", "2M"], "seeds": [1, 2, 3], "arms": arms}
    found = [made_run("base", method=None, budget=None), made_run("lora"), made_run("lora", phase="tune")]
    assert read(found, spec=spec).not_run == 2 * (1 + 2 * 3 + 3) - 2
    assert read(found, spec={}).not_run == 0


def test_a_run_with_a_score_that_is_no_number_has_no_average():
    nothing = {"metric": "BLEU", "value": float("nan"), "n": 9}
    assert read([made_run(scores={"e2e": nothing})]).runs[0].average is None
    assert read([made_run(scores={})]).runs[0].average is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"scores": {"svamp": {"metric": "accuracy", "value": 0.5, "n": 2, "correct": "f"}}},
            "4 bits, but there are 2",
        ),
        ({"scores": {"svamp": {"metric": "accuracy", "value": 0.2, "n": 4, "correct": "7"}}}, "0.7500 of the items"),
        ({"scores": {"svamp": {"metric": "accuracy", "value": 0.2, "n": 0}}}, "scores.svamp.n"),
        ({"status": "lost"}, "'finished', 'failed' or 'diverged'"),
        ({"seed": "one"}, r"runs\.1\.seed"),
        ({"seed": 1}, "is there twice"),
        ({"machine": 1}, "made on machine 1, counted from 0, but there are 1"),
        ({"scores": {"e2e": {"metric": "BLEU", "value": 0.5, "n": 120}}}, "no common average: BLEU, a share"),
        ({"scores": {"svamp": {"metric": "accuracy", "value": 0.5, "n": 99}}}, "disagree on how many items"),
    ],
)
def test_what_is_refused(tmp_path, changes, told):
    path = write(tmp_path, made_results([made_run(), made_run(seed=2) | changes]))
    with pytest.raises(SvdtuneError, match=told):
        read_results(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"title": "x"}'])
def test_files_that_are_no_results(tmp_path, text):
    with pytest.raises(SvdtuneError, match=r"results\.json is no study's results"):
        read_results(write(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(SvdtuneError, match="cannot read"):
        read_results(tmp_path / "results.json")
