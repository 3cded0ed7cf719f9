"""The offline tasks: right answers, no item twice, and splits that share no template."""

import re

import pytest

from svdtune.data import GENERATORS, arithmetic, read_rows
from svdtune.errors import SvdtuneError


def test_worked_solutions_are_right() -> None:
    for row in [*read_rows("arithmetic", limit=500), *read_rows("arithmetic", "test", limit=500)]:
        *steps, last = row["solution"].split("\n")
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right) >= 2
        assert last == f"#### {row['answer']}"
        assert steps[-1].endswith(f"= {row['answer']}")
        given = re.findall(r"\d+", row["question"])
        used = [*re.findall(r"\d+", steps[0].split("=")[0]), steps[1].split(" = ")[0].split()[-1]]
        assert used == given


@pytest.mark.parametrize("task", sorted(GENERATORS))
def test_items_do_not_repeat_within_or_across_splits(task: str) -> None:
    train = [row["question"] for row in read_rows(task, "train", limit=800)]
    test = [row["question"] for row in read_rows(task, "test", limit=200, seed=5)]
    assert len({*train, *test}) == 1000


def test_the_splits_share_no_wording() -> None:
    assert not {t.text for t in arithmetic.TRAIN} & {t.text for t in arithmetic.TEST}

    def wordings(split: str) -> set[str]:
        names = "|".join([*arithmetic._NAMES, *arithmetic._THINGS, r"\d+"])
        return {re.sub(names, "_", row["question"]) for row in read_rows("arithmetic", split, limit=1000)}

    assert len(wordings("train")) == len(arithmetic.TRAIN)
    assert not wordings("train") & wordings("test")


@pytest.mark.parametrize("task", sorted(GENERATORS))
def test_rows_depend_on_the_seed_alone(task: str) -> None:
    assert read_rows(task, limit=20, seed=3) == read_rows(task, limit=20, seed=3)
    assert read_rows(task, limit=20, seed=3) != read_rows(task, limit=20, seed=4)


@pytest.mark.parametrize("task", sorted(GENERATORS))
def test_an_unknown_split(task: str) -> None:
    with pytest.raises(SvdtuneError, match=f"'{task}' has no split 'dev': expected"):
        read_rows(task, "dev")
