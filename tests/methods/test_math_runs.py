"""The equations in each method's math.py are what its layers compute: whoever changes a sign there
changes the method."""

import ast
import inspect
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from test_peft_verbs import adapted, layers, logits
from torch import nn

import svdtune
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, add_regularizer_gradients
from svdtune.methods.mosara import math as mosara
from svdtune.methods.sara import math as sara
from svdtune.methods.sorsa import math as sorsa

ROOT = Path(svdtune.__file__).parent
MATH = {"sara": sara, "mosara": mosara, "sorsa": sorsa}


def public_functions(module: ModuleType) -> list[str]:
    tree = ast.parse(inspect.getsource(module))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def used_names(module: ModuleType) -> set[str]:
    """The names of a math.py that other files of the package use, its reference left out."""
    own, found = Path(module.__file__), set()
    for path in ROOT.rglob("*.py"):
        if path in (own, own.with_name("reference.py")):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        loaded = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        local = {node.id for node in loaded}
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == module.__name__:
                found |= {alias.name for alias in node.names if (alias.asname or alias.name) in local}
            elif isinstance(node, ast.ImportFrom) and f"{node.module}.math" == module.__name__:
                modules |= {alias.asname or alias.name for alias in node.names if alias.name == "math"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                found.add(node.attr)
    return found


@pytest.mark.parametrize("method", MATH)
@pytest.mark.slow
def test_every_equation_has_a_caller(method):
    names = public_functions(MATH[method])
    assert len(names) >= 2
    assert set(names) <= used_names(MATH[method])


@pytest.fixture
def changed(monkeypatch):
    """Change a text in the source of a function, wherever the function has been imported to."""

    def change(module: ModuleType, name: str, old: str, new: str) -> None:
        function = getattr(module, name)
        source = textwrap.dedent(inspect.getsource(function))
        head, body = source.split("-> ", 1)  # the arguments have the same names
        assert body.count(old) == 1
        names: dict = {}
        exec(head + "-> " + body.replace(old, new), vars(module), names)
        monkeypatch.setattr(function, "__code__", names[name].__code__)

    return change


def hooked(model):
    """The model whose layers call their base layers, since somebody watches those."""
    for layer in layers(model):
        layer.get_base_layer().register_forward_hook(lambda *_: None)
    return model


def merged(model) -> torch.Tensor:
    return torch.cat([layer.delta("default").flatten() for layer in layers(model)])


def convolved(name: str) -> torch.Tensor:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3)), torch.randn(2, 4, 9, 9)
    config = {
        "sara": SaraConfig(r=3, target_modules=["0"]),
        "sorsa": SorsaConfig(r=3, target_modules=["0"]),
        "mosara": MoSaraConfig(r=3, num_heads=3, use_v=False, target_modules=["0"]),
    }[name]
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter *= 1.5
    return model(x).detach()


def generated(name: str) -> torch.Tensor:
    """What a model says after another token, with a key-value cache."""
    how = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    found = adapted(name, moved=0.1).generate(
        input_ids=torch.tensor([[5, 6, 7]]), output_logits=True, return_dict_in_generate=True, **how
    )
    return found.logits[1]


def forward(name: str) -> torch.Tensor:
    return logits(adapted(name, moved=0.1))


CHANGE_OF_SARA = (sara, "sara_change", "Product(U", "Product(-U")
CHANGE_OF_SORSA = (sorsa, "sorsa_change", "Product(U, s", "Product(U, -s")
U_OF_MOSARA = (mosara, "_projections", "scaled_rows(U, v)", "-scaled_rows(U, v)")
CHANGES = {
    "sara, forward": (*CHANGE_OF_SARA, lambda: forward("sara")),
    "sara, generating": (*CHANGE_OF_SARA, lambda: generated("sara")),
    "sara, added": (*CHANGE_OF_SARA, lambda: logits(hooked(adapted("sara", moved=0.1)))),
    "sara, merged": (*CHANGE_OF_SARA, lambda: merged(adapted("sara", moved=0.1))),
    "sara, convolved": (*CHANGE_OF_SARA, lambda: convolved("sara")),
    "sorsa, start": (sorsa, "principal_part", "factors.U * ", "-factors.U * ", lambda: forward("sorsa")),
    "sorsa, forward": (*CHANGE_OF_SORSA, lambda: forward("sorsa")),
    "sorsa, generating": (*CHANGE_OF_SORSA, lambda: generated("sorsa")),
    "sorsa, added": (*CHANGE_OF_SORSA, lambda: logits(hooked(adapted("sorsa", moved=0.1)))),
    "sorsa, merged": (*CHANGE_OF_SORSA, lambda: merged(adapted("sorsa", moved=0.1))),
    "sorsa, convolved": (*CHANGE_OF_SORSA, lambda: convolved("sorsa")),
    "sorsa, Eq. 4": (sorsa, "gram_error", "sub_(1)", "add_(1)", lambda: penalty_of(adapted("sorsa", moved=0.1))),
    "sorsa, its gradient": (
        sorsa,
        "penalty",
        "2 * weight",
        "-2 * weight",
        lambda: slope_of(adapted("sorsa", moved=0.1)),
    ),
    "mosara, Eq. 5": (*U_OF_MOSARA, lambda: forward("mosara")),
    "mosara, generating": (*U_OF_MOSARA, lambda: generated("mosara")),
    "mosara, Eq. 6": (mosara, "token_gate", "outer(a", "outer(-a", lambda: forward("mosara")),
    "mosara, in front": (mosara, "token_gate", "outer(a", "outer(-a", lambda: forward("mosara-front")),
    "mosara, added": (*U_OF_MOSARA, lambda: logits(hooked(adapted("mosara", moved=0.1)))),
    "mosara, convolved": (mosara, "token_gate", "outer(a", "outer(-a", lambda: convolved("mosara")),
    "mosara, mixed": (mosara, "mixed_values", "gate @ lam", "-gate @ lam", lambda: convolved("mosara")),
    "mosara, top-1": (mosara, "token_gate", "outer(a", "outer(-a", lambda: top1()),
    "mosara, merged": (
        mosara,
        "mosara_pair",
        "scaled_rows(U, v)",
        "-scaled_rows(U, v)",
        lambda: merged(adapted("mosara-one-head", moved=0.1)),
    ),
}


def top1() -> torch.Tensor:
    return logits(adapted("mosara", moved=0.5, gate="top1"))


def penalty_of(model) -> torch.Tensor:
    return add_regularizer_gradients(model, 0.01)


def slope_of(model) -> torch.Tensor:
    add_regularizer_gradients(model, 0.01)
    return layers(model)[0].sorsa_U["default"].grad.clone()


@pytest.mark.parametrize("name", CHANGES)
def test_a_sign_in_the_equation_is_a_sign_in_the_method(name, changed):
    module, function, old, new, result = CHANGES[name]
    before = result()
    assert torch.equal(result(), before)
    changed(module, function, old, new)
    assert not torch.allclose(result(), before, rtol=1e-3, atol=1e-5)
