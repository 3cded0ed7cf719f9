"""The orthonormal regularizer: closed form against autograd, three doors, and exactness under every
kind of step."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from operations import Operations
from svdtune import SorsaConfig, SvdtuneError, add_regularizer_gradients, regularize
from svdtune.methods.compute.gram import gram, has_few_fp64_units
from svdtune.methods.sorsa.math import gram_error, penalty
from svdtune.methods.sorsa.reference import orthonormal_regularizer
from svdtune.methods.sorsa.regularizer import trained_factors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.head = nn.Linear(12, 7), nn.Linear(7, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.tall(torch.tanh(self.wide(x)))))


def adapted(moved: float = 0.1, **settings):
    torch.manual_seed(0)
    model = get_peft_model(Net(), SorsaConfig(r=3, target_modules=["wide", "tall", "head"], **settings))
    with torch.no_grad():
        for factor, _ in trained_factors(model):
            factor += moved * torch.randn_like(factor)
    return model


def layers(model):
    return [module for module in model.modules() if hasattr(module, "sorsa_U")]


def autograd_gradients(model, reduction):
    pairs = [(layer.sorsa_U["default"], layer.sorsa_V["default"]) for layer in layers(model)]
    total = sum(orthonormal_regularizer(U, V) for U, V in pairs)
    if reduction == "mean":
        total = total / (2 * len(pairs))
    flat = [factor for pair in pairs for factor in pair]
    return total.detach(), dict(zip(flat, torch.autograd.grad(total, flat), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_closed_form_is_autograds_gradient(reduction):
    model = adapted(reduction=reduction, gamma=0.5)
    value, gradients = autograd_gradients(model, reduction)
    got = add_regularizer_gradients(model, max_learning_rate=0.1)
    assert torch.allclose(got, value)
    for factor, gradient in gradients.items():
        assert torch.allclose(factor.grad, 5.0 * gradient, atol=1e-5)


def test_gradients_are_added_to_those_that_are_there():
    model = adapted(gamma=0.1)
    for factor, _ in trained_factors(model):
        factor.grad = torch.ones_like(factor)
    _, gradients = autograd_gradients(model, "mean")
    add_regularizer_gradients(model, 0.1)
    for factor, gradient in gradients.items():
        assert torch.allclose(factor.grad, 1 + gradient, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 30])
def test_all_layers_take_fewer_than_twenty_operations(blocks):
    """Blocks of seven layers in four shapes; 30 have 420 factors."""
    shapes = [(12, 12), (6, 12), (6, 12), (12, 12), (20, 12), (20, 12), (12, 20)] * blocks
    net = nn.Sequential(*(nn.Linear(n, out) for out, n in shapes))
    model = get_peft_model(net, SorsaConfig(r=3, target_modules=[str(i) for i in range(len(shapes))]))
    for factor, _ in trained_factors(model):
        factor.grad = torch.ones_like(factor)
    with Operations() as counted:
        add_regularizer_gradients(model, 1e-3)
    assert counted.count == 17


def near_orthonormal(deviation, lengths=(4096, 11008), r=12):
    """fp32 factors that are off orthonormal by rounding, and by so much in every element of E."""
    torch.manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(d, r, dtype=torch.float64)).Q for d in lengths]
    return [(Q + deviation * Q @ torch.randn(r, r, dtype=torch.float64)).float() for Q in bases]


@pytest.mark.parametrize("deviation", [0.0, 1e-7, 1e-4, 1e-1])
def test_gpus_with_few_fp64_units_get_what_fp64_gives(deviation, monkeypatch):
    """By fp32 products alone, with which plainly used E would be ten times what it is where that is
    rounding."""
    factors = near_orthonormal(deviation)
    want = [penalty([M.double()]) for M in factors]
    monkeypatch.setattr("svdtune.methods.compute.gram.has_few_fp64_units", lambda device: True)
    norms, gradients = penalty(factors)
    for norm, gradient, (exact, (slope,)) in zip(norms, gradients, want, strict=True):
        assert float(norm) == pytest.approx(float(exact), rel=1e-3)
        assert float((gradient - slope).norm()) < 1e-2  # of 2
    if deviation == 0:
        plain = [torch.linalg.matrix_norm(M.mT @ M - torch.eye(M.shape[1])) for M in factors]
        assert all(p > 10 * exact for p, (exact, _) in zip(plain, want, strict=True))


@pytest.mark.parametrize(
    ("capability", "few"), [((7, 5), True), ((8, 0), False), ((8, 9), True), ((9, 0), False), ((10, 3), True)]
)
def test_which_gpus_have_few_fp64_units(capability, few, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert has_few_fp64_units.__wrapped__(torch.device("cuda")) is few
    assert not has_few_fp64_units(torch.device("cpu"))


def test_split_products_do_not_depend_on_how_rows_are_shared_out(monkeypatch):
    """As fp64's: the Gram matrix of sharded factors is a sum over processes."""
    (M,) = near_orthonormal(0.0, lengths=(4096,))
    monkeypatch.setattr("svdtune.methods.compute.gram.has_few_fp64_units", lambda device: True)
    whole = gram(M, [4096])
    parts = sum(gram(rows, [len(rows)]) for rows in M.split((1500, 96, 2500)))
    assert float((whole - parts).abs().max()) < 1e-2 * float(gram_error(M, [4096]).abs().max())


def test_large_groups_are_treated_in_chunks(monkeypatch):
    model, whole = adapted(), adapted()
    add_regularizer_gradients(whole, 0.1)
    monkeypatch.setattr("svdtune.methods.sorsa.sharded.CHUNK_ELEMENTS", 1)
    add_regularizer_gradients(model, 0.1)
    for (one, _), (other, _) in zip(trained_factors(model), trained_factors(whole), strict=True):
        assert torch.allclose(one.grad, other.grad)


def test_exact_orthonormality_gives_zero_and_no_nan():
    norms, (gradient,) = penalty([torch.eye(6, 3)])
    assert float(norms) == 0
    assert not gradient.any()


def test_the_gradient_has_a_constant_norm_near_orthonormality():
    """Theorem 5.2 bounds L_reg, not its gradient: that stays near 2 however close E is to 0, and
    flips its sign there."""
    direction = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64)).Q
    for size in (1e-2, 1e-4, 1e-6):
        for sign in (1, -1):
            _, (gradient,) = penalty([direction * (1 + sign * size)])
            assert float(gradient.norm()) == pytest.approx(2, rel=2e-2)
            assert float((gradient * direction).sum()) * sign > 0
    _, (smooth,) = penalty([direction * (1 + 1e-6)], smooth_eps=1e-3)
    assert float(smooth.norm()) < 0.01


class TestHook:
    def step(self, model, optimizer, micro_batches=1, clip=None):
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
        for part in inputs.chunk(micro_batches):
            (model(part).square().mean() / micro_batches).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()

    def trained(self, model):
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def optimizer(self, model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def test_counts_once_under_accumulation(self):
        whole, parts = adapted(gamma=0.5), adapted(gamma=0.5)
        for model, count in ((whole, 1), (parts, 4)):
            optimizer = self.optimizer(model)
            regularize(optimizer, model)
            self.step(model, optimizer, count)
        for one, other in zip(self.trained(whole), self.trained(parts), strict=True):
            assert torch.allclose(one, other, atol=1e-6)

    def test_acts_after_clipping(self):
        """With the training gradient clipped to almost nothing, the step is the regularizer's
        alone."""
        model = adapted(gamma=0.5)
        before = self.trained(model)
        _, gradients = autograd_gradients(model, "mean")
        optimizer = self.optimizer(model)
        regularize(optimizer, model)
        self.step(model, optimizer, clip=1e-12)
        names = [p for p in model.parameters() if p.requires_grad]
        for parameter, old in zip(names, before, strict=True):
            expected = 0.5 * gradients[parameter] if parameter in gradients else torch.zeros_like(old)
            assert torch.allclose(old - parameter.detach(), expected, atol=1e-5)

    def test_uses_the_peak_of_a_schedule_that_warms_up(self):
        model = adapted(gamma=0.5)
        optimizer = self.optimizer(model)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.01)
        assert regularize(optimizer, model).max_learning_rate == 0.1

    def test_reports_and_can_be_removed(self):
        model = adapted(gamma=0.5)
        value, _ = autograd_gradients(model, "mean")
        optimizer = self.optimizer(model)
        hook = regularize(optimizer, model)
        self.step(model, optimizer)
        assert torch.allclose(hook.last, value, atol=1e-6)
        hook.remove()
        hook.last = None
        self.step(model, optimizer)
        assert hook.last is None

    @pytest.mark.parametrize("unscale", [False, True])
    def test_a_grad_scaler_changes_nothing(self, unscale):
        """Whether the loop unscales for clipping or leaves it to the scaler's step, the hook sees
        plain gradients."""
        plain, scaled = adapted(gamma=0.5), adapted(gamma=0.5)
        optimizer = self.optimizer(plain)
        regularize(optimizer, plain)
        self.step(plain, optimizer)
        optimizer = self.optimizer(scaled)
        regularize(optimizer, scaled)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
        scaler.scale(scaled(inputs).square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        for one, other in zip(self.trained(plain), self.trained(scaled), strict=True):
            assert torch.allclose(one, other, atol=1e-6)

    def test_a_fused_optimizer_unscales_in_its_own_kernel(self):
        plain, scaled = adapted(gamma=0.5), adapted(gamma=0.5)
        for model, scale in ((plain, None), (scaled, 1024.0)):
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.1, fused=True)
            regularize(optimizer, model)
            inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
            loss = model(inputs).square().mean()
            if scale is None:
                loss.backward()
                optimizer.step()
            else:
                scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
        for one, other in zip(self.trained(plain), self.trained(scaled), strict=True):
            assert torch.allclose(one, other, atol=1e-6)

    def test_an_overflowed_step_is_skipped_whole(self):
        model = adapted(gamma=0.5)
        before = self.trained(model)
        optimizer = self.optimizer(model)
        hook = regularize(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(model(torch.full((4, 12), float("inf"))).square().mean()).backward()
        scaler.step(optimizer)
        assert hook.last is None
        assert all(map(torch.equal, before, self.trained(model)))


def test_gamma_zero_reports_and_adds_nothing():
    model = adapted(gamma=0.0)
    assert float(add_regularizer_gradients(model, 0.1)) > 0
    assert all(factor.grad is None for factor, _ in trained_factors(model))


def test_bf16_factors_are_penalised_in_fp32():
    model = adapted(gamma=0.5)
    exact = adapted(gamma=0.5)
    for layer in layers(model):
        for factors in (layer.sorsa_U, layer.sorsa_V):
            factors["default"] = nn.Parameter(factors["default"].detach().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = add_regularizer_gradients(model, 0.1)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(add_regularizer_gradients(exact, 0.1)), rel=0.05)
    assert all(factor.grad.dtype == torch.bfloat16 for factor, _ in trained_factors(model))


def test_frozen_and_foreign_models_are_left_alone():
    assert add_regularizer_gradients(Net(), 0.1) is None
    model = adapted()
    model.requires_grad_(False)
    assert add_regularizer_gradients(model, 0.1) is None


def test_a_learning_rate_of_zero_is_refused():
    with pytest.raises(SvdtuneError, match=r"max_learning_rate must be positive.*got 0"):
        add_regularizer_gradients(adapted(), 0)


def schedule(kind, optimizer):
    if kind == "one cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    if kind == "cyclic":
        return torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.004, max_lr=0.1, step_size_up=4)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step)


def test_one_cycle_says_its_largest_rate():
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.004)
    schedule("one cycle", optimizer)
    assert regularize(optimizer, model).max_learning_rate == 0.1


@pytest.mark.parametrize("kind", ["cyclic", "rising"])
def test_a_rate_that_rises_above_its_start_is_refused(kind):
    """It was silently too strong, by as much as the rate rose."""
    for given, refused in ((None, True), (0.1, False)):
        model = adapted()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.004)
        scheduler = schedule(kind, optimizer)
        regularize(optimizer, model, given)
        for tensor in optimizer.param_groups[0]["params"]:  # a factor without one is warned of
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        scheduler.step()
        if refused:
            with pytest.raises(
                SvdtuneError, match=r"SORSA's regularizer took 0\.004 for the largest.*max_learning_rate="
            ):
                optimizer.step()
        else:
            optimizer.step()
