"""Each method's fast node against its literal reference: outputs and every gradient, over shapes,
dtypes and settings."""

import pytest
import torch

from pairwise import all_pairs
from svdtune.methods.compute.lowrank import LowRankLinear, Part, Product, low_rank_linear, pair
from svdtune.methods.mosara import math as mosara
from svdtune.methods.mosara import reference as mosara_reference
from svdtune.methods.sara import math as sara
from svdtune.methods.sara import reference as sara_reference
from svdtune.methods.sorsa import math as sorsa
from svdtune.methods.sorsa import reference as sorsa_reference

SHAPES = {"square": (12, 12, 3), "wide": (5, 17, 4), "tall": (17, 5, 5), "odd": (7, 9, 1), "full": (6, 6, 6)}
WEIGHTS = ("random", "rank-deficient", "zero")
# heads, whether there is a v, whether it stands in front
MOSARA_VARIANTS = [(1, True, False), (3, True, False), (3, False, False), (3, True, True), (1, True, True)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def sara_linear(x, weight, bias, U, lam, V):
    return low_rank_linear(x, weight, bias, sara.sara_change(U, lam, V))


def sorsa_linear(x, weight, bias, U, s, V, P0, V0, x_adapter=None):
    return low_rank_linear(x, weight, bias, sorsa.sorsa_change(U, s, V, P0, V0), x_adapter)


def base_weight(kind: str, out: int, n: int) -> torch.Tensor:
    if kind == "zero":
        return torch.zeros(out, n, dtype=torch.float64)
    if kind == "rank-deficient":
        return torch.randn(out, 1, dtype=torch.float64) @ torch.randn(1, n, dtype=torch.float64)
    return torch.randn(out, n, dtype=torch.float64)


def run(function, inputs, frozen, dtype, upstream, autocast=False):
    """Output and gradients of one function, with copies of its inputs; factors stay fp32 where
    `dtype` is bf16."""
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in inputs.items()}
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = function(**leaves, **frozen)
    assert y.dtype == dtype
    y.backward(upstream.to(dtype))
    got = {"y": y.detach()} | {name: t.grad for name, t in leaves.items() if t is not None}
    assert all(torch.isfinite(t).all() for t in got.values())
    return got


def compare(fast, literal, x, frozen, trained, dtype, autocast=False):
    """The fast function in `dtype` against the literal one in float64, on the same values.

    Allowed is TOLERANCE of each result's norm; in bf16 also three times the error that the literal
    form makes in bf16, since a gradient that nearly cancels has no small relative error in either.
    """
    factor_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    x_dtype = torch.float32 if autocast else dtype

    def cast(tensors, to):
        return {name: None if t is None else t.to(to) for name, t in tensors.items()}

    layer = cast({name: frozen[name] for name in ("weight", "bias")}, dtype)
    ours = cast({"x": x}, x_dtype) | cast(trained, factor_dtype)
    ours_frozen = cast(frozen, factor_dtype) | layer
    upstream = torch.randn(len(x), len(frozen["weight"])).to(dtype)
    got = run(fast, ours, ours_frozen, dtype, upstream, autocast)
    want = run(literal, cast(ours, torch.float64), cast(ours_frozen, torch.float64), torch.float64, upstream)
    rough = {}
    if dtype == torch.bfloat16:
        rough = run(literal, cast(ours, dtype), cast(ours_frozen, dtype), dtype, upstream)
    assert got.keys() == want.keys()
    for name, truth in want.items():
        allowed = TOLERANCE[dtype] * max(float(truth.norm()), 1e-3)
        if name in rough:
            allowed = max(allowed, 3 * float((rough[name].double() - truth).norm()))
        assert float((got[name].double() - truth).norm()) <= allowed, name


def sara_case(shape, kind, use_lambda):
    out, n, k = shape
    U, lam, V = (t.double() for t in sara.kaiming_factors(out, n, k))
    trained = {"U": U, "lam": lam if use_lambda else None, "V": V}
    return {"weight": base_weight(kind, out, n), "bias": torch.randn(out).double()}, trained


def sorsa_case(shape, kind, layout, moved):
    out, n, r = shape
    weight = base_weight(kind, out, n)
    U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    U, s, V = U[:, :r], s[:r], Vh[:r].mT
    P0, V0 = U * s, V.clone()
    trained = {name: t + moved * torch.randn_like(t) for name, t in {"U": U, "s": s, "V": V}.items()}
    if layout == "delta":
        return {"weight": weight, "bias": None, "P0": P0, "V0": V0}, trained
    return {"weight": weight - P0 @ V0.mT, "bias": None, "P0": None, "V0": None}, trained


def mosara_case(shape, kind, num_heads, use_v, front):
    out, n, k = shape
    weight = base_weight(kind, out, n)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    lam, w1, w2 = (None if t is None else t.double() for t in mosara.random_start(k, num_heads))
    v = torch.randn(n if front else out).double() if use_v else None
    frozen = {"weight": weight, "bias": torch.randn(out).double(), "U": U[:, :k], "V": Vh[:k].mT}
    return frozen, {"lam": lam, "v": v, "w1": w1, "w2": w2}


class TestAgainstReference:
    @pytest.mark.parametrize(
        ("shape", "kind", "dtype", "use_lambda"), all_pairs(SHAPES.values(), WEIGHTS, TOLERANCE, [True, False]), ids=str
    )
    def test_sara(self, shape, kind, dtype, use_lambda):
        frozen, trained = sara_case(shape, kind, use_lambda)
        compare(sara_linear, sara_reference.sara_linear, torch.randn(11, shape[1]).double(), frozen, trained, dtype)

    @pytest.mark.parametrize(
        ("shape", "kind", "dtype", "layout", "moved"),
        all_pairs(SHAPES.values(), WEIGHTS, TOLERANCE, ["delta", "split"], [0.0, 0.3]),
        ids=str,
    )
    def test_sorsa(self, shape, kind, dtype, layout, moved):
        frozen, trained = sorsa_case(shape, kind, layout, moved)
        compare(sorsa_linear, sorsa_reference.sorsa_linear, torch.randn(11, shape[1]).double(), frozen, trained, dtype)

    @pytest.mark.parametrize(
        ("shape", "kind", "dtype", "variant"), all_pairs(SHAPES.values(), WEIGHTS, TOLERANCE, MOSARA_VARIANTS), ids=str
    )
    def test_mosara(self, shape, kind, dtype, variant):
        num_heads, use_v, front = variant
        frozen, trained = mosara_case(shape, kind, num_heads, use_v, front)

        def fast(x, weight, bias, x_adapter=None, **tensors):
            return mosara.mosara_linear(x, weight, bias, mosara.Terms(**tensors, front=front), x_adapter)

        def literal(**tensors):
            return mosara_reference.mosara_linear(**tensors, front=front)

        compare(fast, literal, torch.randn(11, shape[1]).double(), frozen, trained, dtype)


@pytest.mark.parametrize("case", ["sara", "delta", "split", "mosara", "front"])
def test_autocast_computes_as_linear_layers_do(case):
    """Under bf16 autocast an fp32 input gives a bf16 output, and fp32 gradients near the truth."""
    shape = (12, 16, 4)
    x = torch.randn(9, 16).double()
    if case == "sara":
        fast, literal, made = sara_linear, sara_reference.sara_linear, sara_case(shape, "random", True)
    elif case in ("delta", "split"):
        fast, literal, made = sorsa_linear, sorsa_reference.sorsa_linear, sorsa_case(shape, "random", case, 0.1)
    else:
        front = case == "front"
        made = mosara_case(shape, "random", 3, True, front)

        def fast(x, weight, bias, x_adapter=None, **tensors):
            return mosara.mosara_linear(x, weight, bias, mosara.Terms(**tensors, front=front), x_adapter)

        def literal(**tensors):
            return mosara_reference.mosara_linear(**tensors, front=front)

    compare(fast, literal, x, *made, torch.bfloat16, autocast=True)


class TestGradcheck:
    """Numerical derivatives in float64, through every input, leading dimensions and the separate
    adapter input too."""

    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def check(self, function, *inputs):
        inputs = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
        assert torch.autograd.gradcheck(function, inputs)

    def test_low_rank(self):
        frozen, trained = sorsa_case((5, 6, 3), "random", "delta", 0.2)
        bias = torch.randn(5).double()

        def function(x, bias, U, s, V, x_adapter):
            return sorsa_linear(x, frozen["weight"], bias, U, s, V, frozen["P0"], frozen["V0"], x_adapter)

        self.check(function, self.x, bias, *trained.values(), None)
        self.check(function, self.x, bias, *trained.values(), self.x * 2)

    @pytest.mark.parametrize("front", [False, True])
    def test_mosara(self, front):
        frozen, trained = mosara_case((5, 6, 3), "random", 2, True, front)

        def function(x, bias, lam, v, w1, w2, x_adapter):
            terms = mosara.Terms(frozen["U"], frozen["V"], lam, v, w1, w2, front)
            return mosara.mosara_linear(x, frozen["weight"], bias, terms, x_adapter)

        self.check(function, self.x, frozen["bias"], *trained.values(), None)
        self.check(function, self.x, frozen["bias"], *trained.values(), self.x * 2)

    @pytest.mark.parametrize("front", [False, True])
    def test_in_place_additions(self, front):
        frozen, trained = mosara_case((5, 6, 3), "random", 2, True, front)

        def add_to_linear(x, y, *parameters):
            return mosara.mosara_linear(x, None, y * 1, mosara.Terms(frozen["U"], frozen["V"], *parameters, front))

        self.check(add_to_linear, self.x, torch.randn(2, 3, 5).double(), *trained.values())
        frozen, trained = sorsa_case((5, 6, 3), "random", "delta", 0.2)

        def add_sorsa(x, y, *parameters):
            return low_rank_linear(x, None, y * 1, sorsa.sorsa_change(*parameters, frozen["P0"], frozen["V0"]))

        self.check(add_sorsa, self.x, torch.randn(2, 3, 5).double(), *trained.values())


def test_differentiating_twice_is_refused():
    frozen, trained = sara_case((5, 6, 2), "random", True)
    U = trained["U"].requires_grad_()
    y = sara_linear(torch.randn(3, 6).double(), frozen["weight"], None, U, trained["lam"], trained["V"])
    (gradient,) = torch.autograd.grad(y.square().sum(), U, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_delta_elements_are_equation_4():
    U, lam, V = sara.kaiming_factors(5, 7, 3)
    A, B = pair(sara.sara_change(U, lam, V))
    delta = B @ A.mT
    for i in range(5):
        for j in range(7):
            assert float(delta[i, j]) == pytest.approx(sara_reference.delta_element(U, lam, V, i, j), abs=1e-6)


def test_gate_is_a_distribution_over_heads():
    g = mosara_reference.gate(torch.randn(4, 6), torch.randn(6, 3), torch.randn(3), torch.randn(5))
    assert g.shape == (4, 5)
    assert torch.allclose(g.sum(1), torch.ones(4))


def test_delta_keeps_small_changes_that_bf16_products_would_lose():
    """A change of the factors far below bf16's resolution still reaches a bf16 output."""
    weight = torch.randn(64, 64, dtype=torch.float64)
    U, s, Vh = (t.float() for t in torch.linalg.svd(weight))
    P0, V0 = (U * s)[:, :8], Vh[:8].mT.contiguous()
    moved = s[:8] * (1 + 1e-5)
    x = torch.randn(16, 64).bfloat16()
    zero = torch.zeros(64, 64).bfloat16()
    got = sorsa_linear(x, zero, None, U[:, :8], moved, V0, P0, V0).double()
    A, B = pair(sorsa.sorsa_change(U[:, :8], moved, V0, P0, V0))
    truth = x.double() @ (B @ A.mT).double().mT
    assert float((got - truth).norm() / truth.norm()) < 0.01
    together = (x @ V0.bfloat16()) @ (U[:, :8] * moved).bfloat16().mT - (x @ V0.bfloat16()) @ P0.bfloat16().mT
    assert float((together.double() - truth).norm() / truth.norm()) > 0.5


@pytest.mark.parametrize("layout", ["delta", "split"])
def test_zero_columns_change_nothing(layout, monkeypatch):
    """Odd ranks are filled up for tensor cores: the same outputs and gradients."""
    monkeypatch.setattr("svdtune.methods.compute.lowrank.alignment", lambda dtype, device: 8)
    for shape in SHAPES.values():
        frozen, trained = sorsa_case(shape, "random", layout, 0.3)
        compare(
            sorsa_linear,
            sorsa_reference.sorsa_linear,
            torch.randn(11, shape[1]).double(),
            frozen,
            trained,
            torch.float64,
        )


@pytest.mark.parametrize("makes", [(True, False), (False, True), (False, False, True), (True, True)])
@pytest.mark.parametrize("second", [torch.float64, torch.float32])
def test_adapters_of_different_make_in_one_node(makes, second):
    """One with P₀ and V₀ beside one without: whichever comes first, in one dtype or two."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = random(7, 6).requires_grad_()
    parts, expected = [], []
    for i, frozen in enumerate(makes):
        dtype = second if i else torch.float64
        W, U, s, V = (
            random(5, 6),
            random(5, 2 + i, dtype=dtype),
            random(2 + i, dtype=dtype),
            random(6, 2 + i, dtype=dtype),
        )
        P0, V0 = (random(5, 2 + i, dtype=dtype), random(6, 2 + i, dtype=dtype)) if frozen else (None, None)
        for tensor in (U, s, V):
            tensor.requires_grad_()
        parts.append(Part(W, None, Product(U, s, V, P0, V0)))
        change = (U * s) @ V.mT - (P0 @ V0.mT if frozen else 0)
        expected.append(x @ (W + change.double()).mT)
    outputs = LowRankLinear.apply(x, None, 0.0, *[tensor for part in parts for tensor in (*part[:2], *part.product)])
    trained = [x, *(tensor for part in parts for tensor in part.product[:3])]
    sums = [sum((y * torch.linspace(0, 1, 5).to(y)).square().sum() for y in ys) for ys in (outputs, expected)]
    found, wanted = (torch.autograd.grad(total, trained) for total in sums)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
