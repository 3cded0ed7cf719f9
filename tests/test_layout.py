"""Imports point one way: a package may import only from those before it in the order that data
flows."""

import ast
import re
from pathlib import Path

import svdtune

ROOT = Path(svdtune.__file__).parent
ORDER = [
    "_version",
    "errors",
    "registry",
    "system",
    "names",
    "cache",
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
