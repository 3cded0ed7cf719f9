"""E2E: the original files become the form that LoRA's experiments use, and a meaning gets all its
references."""

from pathlib import Path

import pytest

from svdtune.data import read_rows
from svdtune.data.files import read_file
from svdtune.errors import SvdtuneError
from svdtune.lab.data.e2e import group, linearise, separate, to_pairs


def test_a_meaning_is_linearised() -> None:
    meaning = "name[Blue Spice], eatType[coffee shop], priceRange[£20-25], familyFriendly[no], near[Café Rouge]"
    assert linearise(meaning) == (
        "name : Blue Spice | Type : coffee shop | price : £ 20 - 25 | family friendly : no | near : Café Rouge"
    )


@pytest.mark.parametrize(
    ("sentence", "separated"),
    [
        ("It isn't child-friendly.", "It is n't child - friendly ."),
        ("It's £20-25, near the river!", "It 's £ 20 - 25 , near the river !"),
        ("A 5-star pub.Cheap.", "A 5-star pub.Cheap ."),
    ],
)
def test_a_sentence_is_separated(sentence: str, separated: str) -> None:
    assert separate(sentence) == separated


def test_references_of_one_meaning_come_together() -> None:
    pairs = [{"context": c, "completion": s} for c, s in [("a", "1"), ("b", "2"), ("a", "3")]]
    assert group(pairs) == [
        {"context": "a", "completion": "1", "references": ["1", "3"]},
        {"context": "b", "completion": "2", "references": ["2"]},
    ]


def test_a_line_without_two_parts_is_named() -> None:
    with pytest.raises(SvdtuneError, match=r"e2e row 2 is 'name : B'; expected a meaning, \|\| and one sentence"):
        to_pairs([{"text": "name : A || A ."}, {"text": "name : B"}])


@pytest.mark.parametrize(
    ("original", "published", "different"),
    [("testset_w_refs.csv", "lora_test.txt", 22), ("devset.csv", "lora_valid.txt", 58)],
)
def test_the_original_files_give_the_published_form(
    shared_data: Path, original: str, published: str, different: int
) -> None:
    made = to_pairs(read_file(shared_data / "e2e" / original))
    expected = to_pairs(read_file(shared_data / "e2e" / published))
    assert [row["context"] for row in made] == [row["context"] for row in expected]
    differing = sum(row["completion"] != other["completion"] for row, other in zip(made, expected, strict=True))
    assert differing == different


def test_test_meanings_are_asked_once_and_never_trained_on(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDTUNE_DATA", str(shared_data))
    test, train = read_rows("e2e", "test"), read_rows("e2e", "train")
    assert (len(test), sum(len(row["references"]) for row in test), len(train)) == (630, 4693, 42061)
    assert not {row["context"] for row in test} & {row["context"] for row in train}
