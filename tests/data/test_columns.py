"""Encoded rows by columns: the rows that went in come out."""

import pickle
from typing import Any

import pytest

from svdtune.data.columns import Columns
from svdtune.data.preferences import token_counts

SFT = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
PAIRS = [
    {"prompt_ids": [], "chosen_ids": [70_000], "rejected_ids": [2, 3]},
    {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": []},
]
LABELLED = [
    {"prompt_ids": [1], "completion_ids": [2], "label": True},
    {"prompt_ids": [3], "completion_ids": [4, 5], "label": False},
]


@pytest.mark.parametrize("rows", [SFT, PAIRS, LABELLED, []])
def test_rows_come_out_as_they_went_in(rows: list[dict[str, Any]]) -> None:
    columns = Columns.of(rows)
    assert list(columns) == rows
    assert columns[:] == rows
    assert list(Columns.join([columns, Columns.of([]), columns])) == rows + rows
    assert list(columns.take([1, 0] if rows else [])) == rows[::-1]
    assert list(Columns.of_tensors(columns.to_tensors())) == rows
    assert list(pickle.loads(pickle.dumps(columns))) == rows
    if rows:
        assert columns[-1] == rows[-1]
        assert type(columns[0].get("label", True)) is bool
    with pytest.raises(IndexError, match=f"there is no row {len(rows)}"):
        columns[len(rows)]


def test_columns_of_lists_go_through_arrow() -> None:
    assert list(Columns.of_arrow(Columns.of(SFT).to_arrow())) == SFT


def test_a_label_is_no_token() -> None:
    assert [token_counts(Columns.of(rows)) for rows in (SFT, PAIRS, LABELLED)] == [[3, 2], [3, 2], [2, 3]]
    assert [token_counts(rows) for rows in (SFT, PAIRS, LABELLED)] == [[3, 2], [3, 2], [2, 3]]
