"""Imports point one way: a package may import only from those before it in the order that data
flows."""

import ast
import importlib.util
import io
import re
import tokenize
from pathlib import Path

import pytest

import svdtune

ROOT = Path(svdtune.__file__).parent
ORDER = [
    "_version",
    "errors",
    "registry",
    "system",
    "names",
    "cache",
    "progress",
    "processes",
    "linalg",
    "spectra",
    "checkpoint",
    "methods",
    "starts",
    "planning",
    "models",
    "data",
    "training",
    "export",
    "evaluation",
    "analysis",
    "reports",
    "api",
    "cli",
    "lab",
]
LAB_ORDER = ["gates", "baselines", "sandbox", "nlg", "data", "tasks", "harness", "study", "cli"]
DOOR = "registry.py"
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines
WIDEST_CODE, WIDEST = 120, 128  # columns: a sentence in a string may run a little over the code's


def imported(path: Path, package: str = "svdtune") -> set[str]:
    """The parts of a package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write svdtune.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == package else [node.module]
        found |= {
            name.removeprefix(f"{package}.").split(".")[0] for name in names if name and name.startswith(f"{package}.")
        }
    return found


def test_every_package_has_a_place_in_the_order():
    packages = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert packages - {"__init__", "__main__"} <= set(ORDER)


def test_imports_point_back_up_the_order():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        allowed = set(ORDER[: ORDER.index(package) + 1])
        wrong += [f"{path.relative_to(ROOT)} imports svdtune.{name}" for name in sorted(imported(path) - allowed)]
    assert not wrong


def test_imports_inside_the_laboratory_point_back_up_its_order():
    lab = ROOT / "lab"
    assert {path.stem for path in lab.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    } == {*LAB_ORDER}
    wrong = []
    for path in sorted(lab.rglob("*.py")):
        part = path.relative_to(lab).parts[0].removesuffix(".py")
        if part != "__init__":
            allowed = set(LAB_ORDER[: LAB_ORDER.index(part) + 1])
            wrong += [
                f"{path.relative_to(lab)} imports {name}" for name in sorted(imported(path, "svdtune.lab") - allowed)
            ]
    assert not wrong


def test_nothing_but_the_door_names_the_laboratory():
    core = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    named = {
        name
        for name, text in core.items()
        if not name.startswith("lab/")
        and re.search(r"svdtune[./]lab\b|from svdtune import .*\blab\b|['\"]lab['\"]", text)
    }
    assert named == {DOOR}


def test_the_references_are_imported_by_tests_and_benchmarks_alone():
    users = [
        path
        for path in ROOT.rglob("*.py")
        if "reference import" in path.read_text() or "import reference" in path.read_text()
    ]
    assert not users


def test_linalg_needs_torch_alone():
    for path in sorted((ROOT / "linalg").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        foreign = {m for m in modules if m.split(".")[0] in ("numpy", "scipy", "peft", "transformers", "safetensors")}
        assert not foreign, path


def test_a_class_name_names_one_thing():
    places: dict[str, list[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


def too_long(text: str) -> list[str]:
    """What of a file's text is longer or wider than the house allows: each line by its number."""
    found = [f"{len(text.splitlines())} lines"] if len(text.splitlines()) > LONGEST_FILE else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Its decorators are part of a function: an option there is read with the others.
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (node.end_lineno or 0) - first >= LONGEST_FUNCTION:
                found.append(f"{first}: {node.name} has {(node.end_lineno or 0) - first + 1} lines")
    wide = {number for number, line in enumerate(text.splitlines(), 1) if len(line) > WIDEST}
    depth = 0  # of f-strings, whose parts are tokens of their own from Python 3.12 on
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        depth += kind == "FSTRING_START"
        # A bracket, a comma or a colon that closes a sentence's line belongs to it.
        if token.end[1] > WIDEST_CODE and kind != "STRING" and not depth and token.string.strip(")]},:\n"):
            wide.add(token.end[0])
        depth -= kind == "FSTRING_END"
    return found + [f"{number}: too wide" for number in sorted(wide)]


def test_what_stands_beside_the_package_imports_what_it_has():
    """The benchmarks' scripts, most of which no test starts."""
    missing = []
    for folder in ("benchmarks", "conformance", "torture"):
        for path in sorted((ROOT.parent / folder).rglob("*.py")):
            nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
            for node in nodes:
                if (node.module or "").partition(".")[0] == "svdtune":
                    module = importlib.import_module(str(node.module))
                    missing += [
                        f"{path.name}: {node.module}.{one.name}" for one in node.names if not _has(module, one.name)
                    ]
    assert missing == []


def _has(module, name):
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def test_nothing_is_longer_than_the_house_allows():
    """No noqa lifts this, and neither a URL nor a string without a space does."""
    paths = sorted(ROOT.rglob("*.py"))
    for folder in ("benchmarks", "conformance", "torture", ".ci"):
        paths += sorted((ROOT.parent / folder).rglob("*.py"))
    found = {str(path.relative_to(ROOT.parent)): too_long(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "case",
    {
        "file": "x = 1\n" * 401,
        "function": "def f():\n" + "    x = 1\n" * 80,
        "decorated": "@f(\n" + "    1,\n" * 40 + ")\ndef g():\n" + "    x = 1\n" * 40,
        "method": "class A:\n    async def f(self):\n" + "        x = 1\n" * 80,
        "code": "x = [" + "1, " * 40 + "1]\n",
        "string": f"x = {'a' * 126!r}\n",
        "noqa": f"x = {'a' * 126!r}  # noqa: E501\n",
        "comment": "x = 1  # " + "a" * 120 + "\n",
    }.items(),
    ids=lambda case: case[0],
)
def test_what_is_too_long_is_found(case):
    assert too_long(case[1])
    assert not too_long(f"x = {'a' * 120!r}\n" + "def f():\n" + "    x = 1\n" * 79)
