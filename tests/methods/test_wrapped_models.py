"""What else is put around a model: torch.compile, torch.func, replicas of nn.DataParallel, a second
PeftModel, state dicts that nobody saves."""

import copy
from importlib import import_module

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError

CONFIGS = {
    "sara": lambda **s: SaraConfig(r=2, **s),
    "mosara": lambda **s: MoSaraConfig(r=2, num_heads=3, **s),
    "mosara-front": lambda **s: MoSaraConfig(r=2, num_heads=3, v_position="front", **s),
    "mosara-one-head": lambda **s: MoSaraConfig(r=2, num_heads=1, **s),
    "sorsa": lambda **s: SorsaConfig(r=2, **s),
}
KINDS = {
    "linear": lambda: nn.Linear(6, 6),
    "without-bias": lambda: nn.Linear(6, 6, bias=False),
    "bf16": lambda: nn.Linear(6, 6, dtype=torch.bfloat16),
    "convolution": lambda: nn.Conv1d(6, 6, 1),
    "other-class": lambda: type("OtherLinear", (nn.Linear,), {})(6, 6),
}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, KINDS[kind](), nn.Linear(6, 4)

    def forward(self, x):
        x = x[..., None] if self.kind == "convolution" else x
        y = self.a(x.to(self.a.weight.dtype))
        return self.b(torch.tanh(y.reshape(len(x), 6).float()))


def adapted(method, kind="linear", wrap=lambda net: net, **settings):
    torch.manual_seed(0)
    model = get_peft_model(wrap(Net(kind)), CONFIGS[method](target_modules=["a", "b"], **settings))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def trained(model) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
EVERY = [(method, kind) for method in CONFIGS for kind in KINDS]


def close(one: Tensor, other: Tensor, kind: str) -> bool:
    return torch.allclose(one, other, atol=3e-2 if kind == "bf16" else 1e-5, rtol=3e-2 if kind == "bf16" else 1e-5)


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_torch_func_differentiates_and_maps(method, kind):
    model = adapted(method, kind)
    factors = trained(model)

    def loss(factors, x):
        return torch.func.functional_call(model, factors, (x,)).square().sum()

    whole = torch.func.grad(loss)({name: factor.detach() for name, factor in factors.items()}, X)
    single = torch.func.vmap(torch.func.grad(lambda factors, x: loss(factors, x[None])), in_dims=(None, 0))(factors, X)
    model(X).square().sum().backward()
    for name, factor in factors.items():
        assert close(whole[name], factor.grad, kind)
        assert close(single[name].sum(0), factor.grad, kind)


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_replicas_compute_as_the_model_does(method, kind, monkeypatch):
    """nn.DataParallel's own replicate, the copying between GPUs by clones."""
    model = adapted(method, kind)
    want = model(X)
    want.square().sum().backward()
    gradients = {name: factor.grad.clone() for name, factor in trained(model).items()}
    model.zero_grad()
    replicate = import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices],
    )
    y = torch.cat([replica(part) for replica, part in zip(replicate.replicate(model, [0, 1]), X.split(3), strict=True)])
    assert close(y, want, kind)
    y.square().sum().backward()
    for name, factor in trained(model).items():
        assert close(factor.grad, gradients[name], kind)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.family(2)
def test_layers_of_a_compiled_model_keep_their_names(method, tmp_path):
    with torch.no_grad():
        compiled = adapted(method, wrap=lambda net: torch.compile(net, backend="eager"))
        assert compiled.base_model.model._compiled_call_impl is not None
        assert list(compiled.peft_config["default"].ranks) == ["a", "b"]
        assert torch.allclose(compiled(X), adapted(method)(X), atol=1e-6)
        compiled.save_pretrained(tmp_path)
        torch.manual_seed(0)
        net = Net("linear")
        again = PeftModel.from_pretrained(torch.compile(copy.deepcopy(net), backend="eager"), tmp_path)
        assert torch.equal(again(X), compiled(X))
        assert torch.equal(PeftModel.from_pretrained(net, tmp_path)(X), adapted(method)(X))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_compiled_block_is_refused_by_name(method):
    net = nn.Sequential(torch.compile(Net("linear"), backend="eager"))
    with pytest.raises(SvdtuneError, match=r"'0\._orig_mod\.a'.*compile"):
        get_peft_model(net, CONFIGS[method](target_modules=["a"]))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("method", CONFIGS)
def test_a_second_peft_model_is_told_of_load_adapter(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    with pytest.raises(SvdtuneError, match="load_adapter"):
        PeftModel.from_pretrained(model, tmp_path, adapter_name="other")


@pytest.mark.parametrize("method", CONFIGS)
def test_no_tensors_stay_behind_on_the_configuration(method):
    model = adapted(method)
    get_peft_model_state_dict(model)
    held = list(vars(model.peft_config["default"]).values())
    while held:
        value = held.pop()
        assert not isinstance(value, Tensor)
        held += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
