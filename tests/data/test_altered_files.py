"""Whatever bytes a file of rows holds: rows come out, or a SvdtuneError that names the file."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdtune.data import read_rows
from svdtune.data.check import check_file
from svdtune.errors import SvdtuneError

PIECES = [
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"1" * 5000,
    b'"\\ud800"',
    b"\r",
    b'"',
    b"||",
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)
WHOLE = {
    ".json": b'[{"q": "a", "l": [1, {"a": null}]}]',
    ".jsonl": b'{"q": "a", "n": 1}\n{"q": "b", "n": 2}\n',
    ".csv": b'q,a\n"x, y",1\nz,2\n',
    ".txt": b"a line\nand another\n",
}


def refusal(path: Path) -> str | None:
    """What is said of a file that cannot be read, None where it can."""
    try:
        check_file(path)
    except SvdtuneError as error:
        return str(error)
    return None


@pytest.mark.parametrize("ending", [*WHOLE, *(f"{ending}.gz" for ending in WHOLE)])
@given(data=st.data())
def test_altered_files(ending: str, tmp_path: Path, data: st.DataObject) -> None:
    whole = WHOLE[ending.removesuffix(".gz")]
    whole = gzip.compress(whole) if ending.endswith(".gz") else whole
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    put_in = data.draw(st.sampled_from(PIECES) | st.binary(max_size=8))
    path = tmp_path / f"rows{ending}"
    path.write_bytes(whole[:start] + put_in + whole[stop:])
    message = refusal(path)
    assert message is None or str(path) in message


@given(rows=st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), JSON_VALUES), min_size=1, max_size=4))
def test_what_was_written_is_read(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_rows(tmp_path / "a.jsonl") == read_rows(tmp_path / "a.json") == rows


@given(
    text=st.text(max_size=20),
    encoding=st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "utf-7", "cp1252", "shift_jis"]),
)
@pytest.mark.parametrize("ending", WHOLE)
def test_other_encodings(ending: str, tmp_path: Path, text: str, encoding: str) -> None:
    """What is not UTF-8 is refused, or reads as other text: never as a traceback."""
    whole = WHOLE[ending].decode() + text
    path = tmp_path / f"rows{ending}"
    path.write_bytes(whole.encode(encoding, errors="replace"))
    message = refusal(path)
    assert message is None or str(path) in message


@given(data=st.data())
def test_altered_parquet(tmp_path: Path, data: st.DataObject) -> None:
    whole = parquet([{"q": "a", "n": 1}, {"q": "b", "n": 2}])
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 20)))
    path = tmp_path / "rows.parquet"
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:])
    message = refusal(path)
    assert message is None or str(path) in message


def parquet(rows: list[dict[str, object]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()
