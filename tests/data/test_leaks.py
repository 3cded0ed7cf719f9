"""Leaks: the same question in other dress is found, another question is not, and rows are named."""

import pytest

from svdtune.data.leaks import Questions, leaks, normalise, refuse_leaks
from svdtune.errors import SvdtuneError


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Tom has 3 cats , and 2 dogs .", "tom has 3 cats, and 2 dogs", True),
        ("Ａ “quoted” question?", 'a "quoted" question', True),
        ("Add 2.5 to it.", "Add 25 to it.", False),
        ("Add -3 to it.", "Add 3 to it.", False),
        ("Fill the _ in.", "Fill the in.", False),
        ("What is $2 - 3$?", "What is $2-3$ ?", True),
        ("What is 2 + 3?", "What is 2 - 3?", False),
        ("a family-friendly pub", "a family friendly pub", True),
        ("3 cats", "3 dogs", False),
    ],
)
def test_same_question(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


def test_rows_are_named_with_the_first_training_row() -> None:
    def asked(*texts: str | list[str]) -> Questions:
        return Questions.of(texts)

    assert leaks(asked("a b", "c"), asked("x", "C!", "c", "c")) == [(1, 1)]
    # of several questions of one row, and behind rows of another part
    assert leaks(asked("c"), Questions.join([asked("x", ["y", "z"]), asked(["b", "c"])])) == [(0, 2)]
    assert leaks(asked(["b", "c"]).first(), asked("c")) == []
    assert leaks(asked("a"), asked()) == leaks(asked(), asked("a")) == []
    refuse_leaks(asked("a"), asked("b"), "svamp", "train.json")
    with pytest.raises(
        SvdtuneError, match=r"6 of the 7 questions of svamp are also in t\.json.*: row 2 \(training row 1\)"
    ) as e:
        refuse_leaks(asked("b", *"aaaaaa"), asked("A."), "svamp", "t.json")
    assert "row 6 (training row 1) and 1 more. Take them out" in str(e.value)
    assert "data.allow_leaks: [svamp]" in str(e.value)
