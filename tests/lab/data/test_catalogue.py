"""The papers' data sets by name: exact sizes and splits, what is missing is named, and the hub is
the second choice."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from svdtune.data import read_rows
from svdtune.data import readers as reader_module
from svdtune.data.catalogue import CATALOGUE, GROUPS
from svdtune.errors import SvdtuneError

INDEX_NAMES = {"SVAMP": "svamp", "AQuA": "aqua", "AddSub": "addsub", "MultiArith": "multiarith"}
INDEX_NAMES |= {"SingleEq": "singleeq", "gsm8k": "gsm8k_sara"}


@pytest.fixture
def data(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVDTUNE_DATA", str(shared_data))
    return shared_data


def test_the_heldout_rows_of_sara_are_those_of_the_index(data: Path) -> None:
    wanted = defaultdict(list)
    for line in (data / "sara_math" / "sara_heldout_index.tsv").read_text().splitlines()[1:]:
        name, index = line.split("\t")
        wanted[INDEX_NAMES[name]].append(int(index))
    sizes = {}
    for name in GROUPS["sara_math"]:
        whole = read_rows(name, "all")
        assert read_rows(name, "heldout") == [whole[index] for index in wanted[name]]
        sizes[name] = len(wanted[name])
    assert sizes == {
        "svamp": 200,
        "aqua": 51,
        "addsub": 79,
        "multiarith": 110,
        "singleeq": 102,
        "gsm8k_sara": 264,
    }
    assert sum(sizes.values()) == 806


def test_the_training_file_of_sara_and_the_heldout_rows_share_no_row_but_34_questions(data: Path) -> None:
    train = [json.dumps(row, sort_keys=True) for row in read_rows("sara_math")]
    assert len(train) == 3260
    heldout = [row for name in GROUPS["sara_math"] for row in read_rows(name, "heldout")]
    assert not {json.dumps(row, sort_keys=True) for row in heldout} & set(train)
    assert len(heldout) - sum(len(read_rows(name, "unseen")) for name in GROUPS["sara_math"]) == 34


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("arc_challenge", "test", 1172),
        ("arc_easy", "test", 2376),
        ("boolq", "test", 3270),
        ("winogrande", "test", 1267),
        ("piqa", "test", 1838),
        ("siqa", "test", 1954),
        ("openbookqa", "test", 500),
        ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1319),
        ("math", "test", 5000),
        ("math500", "test", 500),
        ("humaneval", "test", 164),
    ],
)
def test_sizes_and_fields(data: Path, name: str, split: str, rows: int) -> None:
    dataset = CATALOGUE[name]
    found = read_rows(name, split, fields=(dataset.prompt, dataset.answer))
    assert len(found) == rows
    assert read_rows(name, split, limit=3) == found[:3]


def test_hellaswag_and_the_170k_mix_are_read_by_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path))
    row = {
        "instruction": "Please choose the correct ending to complete the given sentence: Playing drums: People stand. "
        "A man\n\nEnding1: a\n\nEnding2: b\n\nAnswer format: ending1/ending2",
        "input": "",
        "output": "the correct answer is ending2",
        "answer": "ending2",
    }
    for name in ("commonsense/hellaswag_test.json", "LLM-Adapters/ft-training_set/commonsense_170k.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row]))
    assert read_rows("hellaswag", "test") == read_rows("commonsense_170k") == [row]


def test_the_hub_is_asked_where_the_folder_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path))
    asked = []

    def from_hub(*words: str | None) -> list[dict[str, str]]:
        asked.append(words)
        return [{"query": "1+1?", "response": "The answer is: 2"}]

    monkeypatch.setattr(reader_module, "_read_hub", from_hub)
    assert read_rows("metamathqa")[0]["query"] == "1+1?"
    assert asked == [("meta-math/MetaMathQA", None, "train")]

    def offline(*_: str | None) -> None:
        raise SvdtuneError("no network")

    monkeypatch.setattr(reader_module, "_read_hub", offline)
    with pytest.raises(
        SvdtuneError, match=r"would have it as MetaMathQA-395K\.json, and the hub does not give it: no net"
    ):
        read_rows("metamathqa")


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDTUNE_DATA", str(tmp_path))
    with pytest.raises(SvdtuneError, match=r"dataset/SVAMP/test\.json there; get it \(git clone .*SVDTUNE_DATA"):
        read_rows("svamp", "all")
    with pytest.raises(SvdtuneError, match="svamp has no split 'test': expected one of all, heldout, unseen"):
        read_rows("svamp", "test")
