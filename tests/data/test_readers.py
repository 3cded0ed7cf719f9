"""Readers: every format gives the same rows, and every fault names the file and the line."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from svdtune.data import read_rows
from svdtune.errors import SvdtuneError

ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": 'say "é"\u2028twice,\nplease', "answer": "é é"}]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        text = lines if "jsonl" in kind else json.dumps(rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert read_rows(write(tmp_path / f"rows.{kind}", ROWS)) == ROWS


def test_a_byte_order_mark_is_not_part_of_the_first_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffquestion,answer\na,b\n".encode())
    assert read_rows(path) == [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_a_table_is_read_by_the_sign_between_its_columns(tmp_path: Path, name: str, between: str, ending: str) -> None:
    lines = [["question", "answer"], ['"two, and; two\t?"', "4"], ["a", '"4 ""or"" 5"']]
    (tmp_path / name).write_bytes(("\ufeff" + "".join(between.join(line) + ending for line in lines)).encode())
    assert [tuple(row.values()) for row in read_rows(tmp_path / name)] == [("two, and; two\t?", "4"), ("a", '4 "or" 5')]
    assert [*read_rows(tmp_path / name)[0]] == ["question", "answer"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("between", [",", ";", "\t", "|"], ids=["comma", "semicolon", "tab", "bar"])
def test_what_stands_above_a_header_and_in_its_quotes_is_no_column(tmp_path: Path, between: str, ending: str) -> None:
    """Blank lines, the `sep=` line that Excel writes, and every sign within quotes."""
    path = tmp_path / "a.csv"
    for above in ([], [""], ["", " "], [f"sep={between}"], ["", f'"sep={between}"', ""]):
        if between == "|" and not any("sep" in line for line in above):
            continue  # no sign is taken for one that nothing says
        lines = [*above, between.join(['"short, or; or\t""long"""', 'answer (5")']), between.join(["a", '"b\n"'])]
        path.write_bytes(ending.join([*lines, ""]).encode())
        assert read_rows(path) == [{'short, or; or\t"long"': "a", 'answer (5")': "b\n"}]
        path.write_bytes(ending.join([*lines[:-1], "alone", ""]).encode())
        with pytest.raises(SvdtuneError, match=rf"line {len(lines)} does not have the 2 columns of the header"):
            read_rows(path)


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (['"Hi" she said', "ok"], ['"Hi" she said', "ok"]),
        (['"Hi', "ok"], ['"Hi', "ok"]),
        (["ok", '"'], ["ok", '"']),
        (['"Hi\tok\nok"', "5"], ["Hi\tok\nok", "5"]),
        (['"Hi ""you"""', '5"'], ['Hi "you"', '5"']),
    ],
    ids=["word", "open", "sign", "lines", "doubled"],
)
def test_a_table_of_tabs_may_quote_nothing(tmp_path: Path, cells: list[str], read: list[str]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("q\ta\n1\t2\n" + "\t".join(cells) + "\n")
    assert [[*row.values()] for row in read_rows(path)] == [["1", "2"], read]


def test_a_table_of_one_column_of_tabs_may_hold_commas(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\nHi, you; and "you"\n')
    assert read_rows(tmp_path / "a.tsv") == [{"text": 'Hi, you; and "you"'}]


def test_a_json_object_around_one_list_is_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_rows(path) == ROWS


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert read_rows(path, limit=1) == ROWS[:1]
    with pytest.raises(SvdtuneError, match="limit is 0; expected at least 1 row"):
        read_rows(path, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl line 3 is not valid JSON: .* at column 7"),
        ("a.jsonl", '{"a": 1},\n{"a": 2}\n', "at column 9; take out the comma behind the object"),
        ("a.jsonl", '[{"a": 1},\n{"a": 2}]', r"; a list of objects is JSON: rename it to \.json"),
        ("a.jsonl", "[1]\n", r"a\.jsonl line 1 is \[1\]; expected an object with named fields"),
        ("a.json", '[{"a": 1},\n{"a"}]', r"a\.json line 2 is not valid JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"line 2 is not valid JSON: Extra data; .* rename it to \.jsonl"),
        ("a.json", '{"a": 1}', "holds one JSON dict; expected a list of objects"),
        ("a.json", "[1]", "row 1 is 1; expected an object"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3 does not have the 2 columns of the header"),
        ("a.csv", "a,b\n1,2,3\n", "line 2 does not have the 2 columns"),
        ("a.csv", 'a,b\n1,"2\n', "is not valid CSV after line 1: unexpected end"),
        ("a.tsv", 'q\ta\n"Hi" you\tok\nalone\n', r"a\.tsv line 3 does not have the 2 columns"),
        ("a.tsv", '"q"\t"a"\n"Hi" you\t"ok"\n', r"a\.tsv is not valid TSV after line 1: .* expected after"),
        ("a.parquet", "text", "is not a readable Parquet file"),
        ("a.jsonl.gz", "text", "is not a whole gzip file"),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 3}', r"a\.jsonl line 1 has the field 'a' twice; keep one of them"),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', r"a\.json has the field 'b' twice"),
        ("a.jsonl", '{"a": "\\ud83d"}', r"a\.jsonl line 1 holds half a character"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1 holds a number of thousands of digits; put it in quotes"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, "line 1 holds values too deep in each other; flatten them"),
        ("a.json", "[" * 100_000, r"a\.json holds values too deep"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv has two columns of the name 'a'; rename one of them"),
        ("a.json", "", r"a\.json is empty: it has no rows"),
        ("a.jsonl", "\n", r"a\.jsonl is empty: it has no rows"),
        ("a.csv", "a,b\n", r"a\.csv is empty: it has no rows"),
        ("a.md", "hello", r"cannot tell its format; expected a name ending in \.json"),
        ("a.txt", "\n  \n", r"a\.txt is empty: it has no rows"),
    ],
)
def test_a_fault_names_the_file_and_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SvdtuneError, match=message):
        read_rows(path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a\nok\n\xe9\n")
    with pytest.raises(SvdtuneError, match=r"a\.csv line 3 is not UTF-8"):
        read_rows(path)


def test_a_missing_field_names_row_and_nearest_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"question": "x", "anwser": "y"}])
    with pytest.raises(SvdtuneError, match=r"a\.jsonl row 3 has no field 'answer': .*did you mean 'anwser'\?"):
        read_rows(path, fields=["question", "answer"])


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match=r"there is no file .*gone\.jsonl"):
        read_rows(tmp_path / "gone.jsonl")
    with pytest.raises(SvdtuneError, match=r" is a folder; name the file of rows in it"):
        read_rows(tmp_path)


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match="is a file, which has no split or config"):
        read_rows(write(tmp_path / "a.jsonl", ROWS), "test")


def test_a_name_that_is_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline\nmore"))
    )
    with pytest.raises(SvdtuneError, match=r"no generator \(arithmetic, gsm_symbolic\), and could not .*: offline$"):
        read_rows("nobody/nothing")


def test_a_hub_name_is_loaded_by_split_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, config, split: asked.append((name, config, split)) or ROWS
    )
    assert read_rows("some/set", "test", config="main") == ROWS
    assert asked == [("some/set", "main", "test")]


@pytest.mark.parametrize(
    ("path", "count", "fields"),
    [
        ("sara_math/math_data.json", 3260, {"instruction", "output", "answer"}),
        ("gsm8k/train.jsonl.gz", 7473, {"question", "answer"}),
        ("e2e/trainset.csv.gz", 42061, {"mr", "ref"}),
    ],
)
def test_real_data_sets(shared_data: Path, path: str, count: int, fields: set[str]) -> None:
    rows = read_rows(shared_data / path, fields=sorted(fields))
    assert len(rows) == count


def test_a_giant_row_and_a_whole_pair_of_surrogates_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 300_000 + ",1\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["a"]) == 300_000
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read_rows(tmp_path / "a.jsonl") == [{"a": "\U0001f600"}]


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b'{"a": 1}\n' * 100))
    whole[10] = 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    with pytest.raises(SvdtuneError, match=r"a\.jsonl\.gz is not a whole gzip file: .*invalid"):
        read_rows(tmp_path / "a.jsonl.gz")
