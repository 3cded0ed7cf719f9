"""Whatever a run's files hold, `svdtune report` writes its page, and names the file and the field
that it left out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run
from typer.testing import CliRunner

from svdtune.analysis import read_facts
from svdtune.cli import app
from svdtune.errors import SvdtuneError
from svdtune.reports import gather, report
from svdtune.reports.files import as_json

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
ODD: dict[str, Any] = {
    "null": None,
    "text": "x",
    "number": -7.5,
    "whole": -3,
    "huge": 10**400,
    "large": 1e300,
    "nan": float("nan"),
    "inf": float("inf"),
    "list": [],
    "object": {},
    "deep": DEEP,
    "true": True,
    "half": "\ud800",
}
FILES = [
    "training.json",
    "train_log.jsonl",
    "evaluations/math-math/result.json",
    "analysis/before.json",
    "analysis/after.json",
    "analysis/during.jsonl",
    "analysis/routing.json",
]
BYTES = {
    "empty": b"",
    "bytes": b"\xff\xfe\x00",
    "cut": b'{"n": 1, "st',
    "list": b"[1]\n",
    "deep": b"[" * 100_000 + b"\n",
    "twice": b'{"n": 1, "n": 2}\n',
    "digits": b'{"n": ' + b"9" * 5000 + b"}\n",
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a document: the fields of every object, and the first entries of lists."""
    inner: Any = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:2] if isinstance(value, list) else ()
    )
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def changed(text: str, path: tuple[Any, ...], value: Any) -> str:
    """A document with one field changed, or absent where the value is Ellipsis."""
    document = inner = json.loads(text)
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(document) + "\n"


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    heads = 2 if "routing" in str(request.node.callspec.params.get("file")) else 1
    method = {"name": "mosara", "threshold": 0.5, "num_heads": heads} if heads > 1 else {"name": "sorsa", "r": 8}
    return make_run(tmp_path / "run", method, depth=1, kinds=1, samples=2)


def page_of(run: Path) -> tuple[str, list[str]]:
    facts = read_facts(run)
    return as_json(gather([facts])), facts["missing"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.family(2)
def test_every_field_with_every_odd_value(run: Path, file: str) -> None:
    path = run / file
    lines = path.read_text().splitlines(keepends=True)
    before = page_of(run)[1]
    left_out = 0
    odd = list(ODD.values())
    for turn, place in enumerate(places(json.loads(lines[0]))):
        for value in (..., *odd[turn % 5 :: 5]):
            path.write_text("".join([changed(lines[0], place, value), *lines[1:]]))
            _, missing = page_of(run)
            told = [text for text in missing if "damaged" in text]
            assert told or missing[: len(before)] == before or "math-math" in file
            assert all(path.name in text and ": " in text for text in told), told
            left_out += len(told)
    assert left_out > 5


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", BYTES)
def test_files_that_are_no_json(run: Path, file: str, kind: str) -> None:
    (run / file).write_bytes(BYTES[kind])
    _, missing = page_of(run)
    if not (kind in ("empty", "cut", "bytes") and file.endswith("l")):  # a line that is not whole does not count
        assert any(
            text.startswith(f"{Path(file).name} is damaged and was left out: ") or "math-math/" in text
            for text in missing
        )


@pytest.mark.parametrize(
    ("file", "place", "value", "said"),
    [
        ("training.json", ("trained_parameters",), "many", "training.json is damaged and was left out: trained_parameters: "
         "expected a valid integer; got 'many'"),
        ("evaluations/math-math/result.json", ("strict", "accuracy"), 7.0, "math-math/result.json is damaged and was left "
         "out: strict.accuracy: expected less than or equal to 1; got 7.0"),
        ("train_log.jsonl", ("step",), ..., "train_log.jsonl is damaged and was left out: line 1: step: is required"),
    ],
)  # fmt: skip
def test_the_verb_names_file_and_field(run: Path, file: str, place: tuple[str, ...], value: Any, said: str) -> None:
    path = run / file
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([changed(lines[0], place, value), *lines[1:]]))
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0
    assert said in result.output


@pytest.mark.slow
def test_odd_names_of_layers(tmp_path: Path) -> None:
    name = "model.layers.0.$x_{/../\u202e|`<b>"
    run = make_run(tmp_path / "run", {"name": "sorsa", "r": 8}, depth=1, kinds=1, samples=2)
    (run / "adapter").mkdir()
    (run / "adapter" / "README.md").write_text("")
    path = run / "analysis" / "after.json"
    (layer,) = json.loads(path.read_text())["layers"].values()
    path.write_text(json.dumps({"layers": {name: layer}}))
    made = report([run], figures=tmp_path / "figures")
    assert all(file.parent == tmp_path / "figures" for file in made.figures)


@pytest.mark.parametrize("card", [b"\xff", b"---\n[\n---\n", b"---\na: b: c\n---\n"])
def test_a_damaged_card(tmp_path: Path, card: bytes) -> None:
    run = make_run(tmp_path / "run", {"name": "sorsa", "r": 8}, depth=1, kinds=1, samples=2)
    (run / "adapter").mkdir()
    (run / "adapter" / "README.md").write_bytes(card)
    with pytest.raises(SvdtuneError, match=r"README\.md is damaged: .*; mend its head, or delete it for a new one"):
        report([run])
