"""What SECURITY.md promises of the code: no pickle, no code from texts, no shell, no secrets in
what is printed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import svdtune

ROOT = Path(svdtune.__file__).parent
# The one place that runs programs: HumanEval's sandbox, inside a process that can reach nothing.
RUNS_PROGRAMS = {"lab/sandbox/inside/__main__.py"}
SERIALIZERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN = {
    "eval": "runs a text",
    "exec": "runs a text",
    "compile": "runs a text",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "yaml.load": "objects of any class",
    "yaml.unsafe_load": "objects of any class",
    "numpy.load": "a pickle, if asked",
    "np.load": "a pickle, if asked",
    "tempfile.mktemp": "a name that another process may take",
}


def name_of(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {module}" for module in modules if module.split(".")[0] in SERIALIZERS)
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in FORBIDDEN:
            yield f"line {node.lineno}: {name}: {FORBIDDEN[name]}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if given.get("shell", "False") != "False":
            yield f"line {node.lineno}: a shell"
        if given.get("trust_remote_code") == "True":
            yield f"line {node.lineno}: code from a model's repository, unasked"
        if given.get("verify") == "False":
            yield f"line {node.lineno}: a connection to nobody knows whom"
        if name == "YAML" and given.get("typ") != "'safe'":
            yield f"line {node.lineno}: YAML that makes objects"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    if str(path.relative_to(ROOT)) not in RUNS_PROGRAMS:
        assert list(faults(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "os.system('ls')",
        "subprocess.run(words, shell=True)",
        "load(name, trust_remote_code=True)",
        "YAML().load(text)",
    ],
)
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert len(list(faults(ast.parse(code)))) == 1


def test_no_token_is_read() -> None:
    """Access to the hub is huggingface_hub's business: svdtune neither reads nor passes nor prints
    a token."""
    found = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if re.search(r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|get_token\(|WANDB_API_KEY", path.read_text(encoding="utf-8"))
    ]
    assert found == []
