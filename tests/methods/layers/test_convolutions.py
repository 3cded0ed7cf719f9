"""Convolutions: every kind, stride, padding, dilation and group count, against the literal matrix
on unfolded patches."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft_verbs import CONFIGS, MERGEABLE, UNCHANGED_AT_START, layers, move
from torch import nn

from pairwise import shared_out
from svdtune import SvdtuneError
from svdtune.methods.mosara import reference as mosara
from svdtune.spectra import as_stored, base_weight, matrix_shape

# kind → (layer, input)
KINDS = {
    "conv2d": (lambda: nn.Conv2d(6, 12, 3), (2, 6, 9, 8)),
    "conv2d-strided": (lambda: nn.Conv2d(6, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 9, 8)),
    "conv2d-reflect": (lambda: nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect", bias=False), (2, 6, 9, 8)),
    "conv2d-pointwise": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 4, 4)),
    "conv2d-groups": (lambda: nn.Conv2d(6, 12, 3, groups=3, padding="same"), (2, 6, 9, 8)),
    "conv2d-unbatched": (lambda: nn.Conv2d(6, 12, 3), (6, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 4, stride=2), (2, 6, 15)),
    "conv3d": (lambda: nn.Conv3d(3, 12, 2), (2, 3, 4, 5, 4)),
}


class Net(nn.Module):
    """One convolution and a linear head over its channels."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.conv = KINDS[kind][0]()
        self.head = nn.Linear(self.conv.out_channels, 3)
        self.positions = len(self.conv.kernel_size)

    def forward(self, x):
        y = torch.tanh(self.conv(x)).flatten(-self.positions)
        return self.head(y.mean(-1))


def config_of(name: str, **settings):
    cls, own = CONFIGS[name]
    return cls(**(own | {"target_modules": ["conv"]} | settings))


def adapted(name: str, kind: str, moved: float = 0.1, **settings):
    model = get_peft_model(Net(kind), config_of(name, **settings)).eval()
    return move(model, moved)


def data(kind: str):
    return torch.randn(*KINDS[kind][1], generator=torch.Generator().manual_seed(3))


def patches(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[N, positions ..., groups, in / groups · k ...]: what the kernel looks at in each place, by
    one-hot kernels."""
    inside = base_weight(conv).shape[1]
    one_hot = torch.eye(inside, dtype=x.dtype).reshape(inside, *conv.weight.shape[1:])
    found = conv._conv_forward(x, one_hot.repeat(conv.groups, *(1,) * (one_hot.dim() - 1)), None)
    positions = len(conv.kernel_size)
    return found.unflatten(-positions - 1, (conv.groups, inside)).movedim((-positions - 2, -positions - 1), (-2, -1))


class Literal(nn.Module):
    """The same layer with ΔW formed; several heads of Mo-SARA by the literal reference, patch by
    patch."""

    def __init__(self, layer):
        super().__init__()
        self.layer, layer.called = layer, True

    def forward(self, x):
        layer, conv = self.layer, self.layer.get_base_layer()
        if layer.method != "mosara" or layer.configs["default"].num_heads == 1:
            A, B = layer.pair("default")
            return conv._conv_forward(x, conv.weight + (B @ A.mT).reshape(conv.weight.shape), conv.bias)
        U, V, lam, v, w1, w2, front = layer._tensors("default")
        rows, share = patches(conv, x), len(U) // conv.groups
        parts = []
        for group in range(conv.groups):
            own = slice(group * share, (group + 1) * share)
            side = v if v is None or front else v[own]
            weight = torch.zeros(share, V.shape[0])
            flat = rows[..., group, :].flatten(0, -2)
            added = mosara.mosara_linear(flat, weight, None, U[own], V, lam, side, w1, w2, front)
            parts.append(added.view(*rows.shape[:-2], share))
        return conv(x) + torch.cat(parts, -1).movedim(-1, -len(conv.kernel_size) - 1)


SHARES = shared_out(["start and back", "merge", "save"], CONFIGS, KINDS)


class TestEveryConvolution:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", CONFIGS)
    def test_outputs_and_gradients_are_the_literal_ones(self, name, kind):
        model, x = adapted(name, kind), data(kind).requires_grad_()
        twin, x_twin = copy.deepcopy(model), x.detach().clone().requires_grad_()
        twin.base_model.model.conv = Literal(twin.base_model.model.conv)
        for one, at in ((model, x), (twin, x_twin)):
            one(at).square().sum().backward()
        assert torch.allclose(model(x), twin(x_twin), atol=1e-5)
        assert torch.allclose(x.grad, x_twin.grad, atol=1e-5)
        trained = [p for p in model.parameters() if p.requires_grad]
        wanted = [p for p in twin.parameters() if p.requires_grad]
        for parameter, want in zip(trained, wanted, strict=True):
            assert torch.allclose(parameter.grad, want.grad, atol=1e-4)

    @pytest.mark.parametrize(("name", "kind"), SHARES["start and back"])
    def test_start_and_back(self, name, kind):
        base, x = Net(kind), data(kind)
        want, weights = base(x), base.state_dict()
        model = adapted(name, kind, moved=0)
        if name in UNCHANGED_AT_START:
            assert torch.equal(model(x), want)
        move(model, 0.1)
        assert not torch.allclose(model(x), want, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(x), want)
        for key, value in model.unload().state_dict().items():
            assert torch.equal(value, weights[key]), key

    @pytest.mark.parametrize(("name", "kind"), SHARES["merge"])
    def test_merge_and_unmerge(self, name, kind):
        model, x = adapted(name, kind), data(kind)
        before, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
        if name not in MERGEABLE:
            with pytest.raises(SvdtuneError, match=r"heads, which cannot be merged"):
                model.merge_and_unload()
            return
        model.merge_adapter()
        assert torch.allclose(model(x), before, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        merged = model.merge_and_unload(safe_merge=True)
        assert torch.allclose(merged(x), before, atol=1e-5)
        assert not layers(merged)

    @pytest.mark.parametrize(("name", "kind"), SHARES["save"])
    def test_save_and_load(self, name, kind, tmp_path):
        model, x = adapted(name, kind), data(kind)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Net(kind), tmp_path).eval()
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
def test_dropout_and_autocast(name):
    model, x = adapted(name, "conv2d", dropout=0.5), data("conv2d")
    want = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        assert float((got.detach() - want).norm()) < 0.03 * float(want.norm())
        model.train()
        assert not torch.equal(model(x), model(x))
        model(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
def test_half_precision_bases(name, dtype):
    x = data("conv2d").to(dtype)
    model = move(get_peft_model(Net("conv2d").to(dtype), config_of(name)), 0.1)
    model(x).float().sum().backward()
    assert model(x).dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
def test_a_compiled_convolution_is_one_graph(name):
    model, x = adapted(name, "conv2d-groups"), data("conv2d-groups")
    layer = model.base_model.model.conv
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["mosara", "sorsa"])
def test_compact_files(name, tmp_path):
    model, x = adapted(name, "conv2d-groups", compact=True), data("conv2d-groups")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net("conv2d-groups"), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_of_a_kernel(kind):
    conv = KINDS[kind][0]()
    matrix = base_weight(conv)
    assert tuple(matrix.shape) == matrix_shape(conv)
    assert torch.equal(as_stored(conv, matrix), conv.weight)
    rows = patches(conv, data(kind)).unflatten(-2, (conv.groups, 1))
    own = matrix.unflatten(0, (conv.groups, -1))
    literal = torch.einsum("...goi,gni->...gn", rows, own).flatten(-2).movedim(-1, -len(conv.kernel_size) - 1)
    bias = 0 if conv.bias is None else conv.bias.view(-1, *(1,) * len(conv.kernel_size))
    assert torch.allclose(conv(data(kind)), literal + bias, atol=1e-5)


class TestClearErrors:
    def test_a_transposed_convolution(self):
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
        with pytest.raises(SvdtuneError, match=r"'0' is a ConvTranspose2d; .*Conv1d, Conv2d and Conv3d"):
            get_peft_model(model, config_of("sorsa", target_modules=["0"]))

    def test_a_parametrized_weight(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 2)))
        with pytest.raises(SvdtuneError, match=r"weight of '0' is computed by a parametrization.*weight_norm"):
            get_peft_model(model, config_of("sorsa", target_modules=["0"]))

    def test_a_rank_too_large(self):
        with pytest.raises(SvdtuneError, match=r"r = 20 is larger than layer 'conv' \[12, 54\] allows"):
            get_peft_model(Net("conv2d"), config_of("sorsa", r=20))
