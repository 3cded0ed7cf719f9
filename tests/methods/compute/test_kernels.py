"""The Triton kernels against their plain PyTorch forms in float64: on a GPU, and on the CPU in
Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import numpy
import pytest
import torch

import new_process
from pairwise import all_pairs
from svdtune.methods.compute import kernels
from svdtune.methods.compute.kernels.mask import mixed
from svdtune.methods.compute.lowrank import Product, stacked

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter reads loop bounds in a way that NumPy 2.4 no longer allows and older ones
# warn of.
INTERPRETER_WORKS = HAS_TRITON and tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# Triton's interpreter truncates to bf16 instead of rounding, and cannot multiply bf16 matrices:
# NumPy has no such type.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def on_a_gpu(test):
    """A test of a kernel: needs Triton and either a GPU or the interpreter."""
    missing = not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available())
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs Triton and a GPU, or TRITON_INTERPRET=1")(test))


def close(got, want, tolerance):
    assert got.shape == want.shape
    want = want.detach()
    assert float((got.double() - want.double()).norm()) <= tolerance * float(want.double().norm()) + 1e-12


def factors(out, n, r, device=DEVICE):
    def random(*shape):
        return torch.randn(*shape, device=device)

    return random(out, r), random(r), random(n, r), random(out, r), random(n, r)


@pytest.mark.slow
@pytest.mark.skipif(
    not INTERPRETER_WORKS or INTERPRETED or torch.cuda.is_available(), reason="needs Triton, NumPy < 2.4 and no GPU"
)
def test_every_kernel_in_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_importing_the_kernels_loads_nothing_of_tritons():
    package = "svdtune.methods.compute.kernels"
    loaded = new_process.start(new_process.loaded_by, package).result()
    assert package in loaded
    assert not {f"{package}.{module}" for module in ("factors", "dropout", "router")} & loaded


def test_tensors_that_the_kernels_cannot_take_are_told_apart():
    assert not kernels.available(torch.randn(2, 2))


@on_a_gpu
@pytest.mark.parametrize(
    ("shape", "form", "dtype", "pad"),
    all_pairs([(70, 33, 9), (16, 48, 128), (5, 3, 200), (1, 1, 1)], ["sorsa", "sara", "without s"], DTYPES, [1, 8]),
    ids=str,
)
def test_stacked_factors_are_bit_for_bit_the_plain_ones(shape, form, dtype, pad):
    out, n, r = shape
    U, s, V, P0, V0 = factors(out, n, r)
    if form != "sorsa":
        P0 = V0 = None
    if form == "without s":
        s = None
    got = kernels.stack_factors(U, s, V, P0, V0, dtype, pad)
    for mine, plain in zip(got, stacked(Product(U, s, V, P0, V0), dtype), strict=True):
        width = plain.shape[1]
        assert mine.dtype == dtype
        assert mine.shape == (plain.shape[0], -(-width // pad) * pad)
        assert torch.equal(mine[:, :width], plain)
        assert not mine[:, width:].any()


@on_a_gpu
def test_the_change_is_exactly_zero_before_the_first_step():
    U, s, V, _, _ = factors(300, 200, 40)
    A, B = kernels.stack_factors(U, s, V, U * s, V.clone(), torch.float32, 8)
    assert not A[:, 40:].any()
    assert not B[:, :40].any()


def plain_mix(z, w1, w2, lam):
    """Eq. 5 and 6 in float64, by autograd."""
    gate = torch.softmax(torch.outer(z @ w1, w2), 1)
    return z * (gate @ lam), gate


@on_a_gpu
@pytest.mark.parametrize(
    ("T", "k", "m", "extra"), [(37, 91, 5, 0), (8, 16, 1, 0), (130, 70, 3, 10), (5, 1030, 10, 2), (1, 1, 2, 7)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mo_sara_rows_and_all_their_gradients(T, k, m, extra, dtype):
    z, dt = (torch.randn(T, k + extra, device=DEVICE).to(dtype) for _ in range(2))
    w1, w2, lam = (torch.randn(*shape, device=DEVICE) for shape in ((k,), (m,), (m, k)))
    w1 /= k**0.5
    leaves = [t.double().requires_grad_() for t in (z[:, :k], w1, w2, lam)]
    want, want_gate = plain_mix(*leaves)
    want.backward(dt[:, :k].double())

    t, gate, a = kernels.mix(z, w1, w2, lam)
    dz, dlam, dw1, dw2 = kernels.mix_backward(dt, z, gate, a, lam, w1, w2)
    assert t.dtype == dz.dtype == dtype
    assert gate.dtype == a.dtype == dlam.dtype == dw1.dtype == dw2.dtype == torch.float32
    close(t[:, :k], want, TOLERANCE[dtype])
    close(gate, want_gate, 1e-5)
    close(a, leaves[0] @ leaves[1], 1e-5)
    close(dz[:, :k], leaves[0].grad, TOLERANCE[dtype])
    assert not t[:, k:].any()
    assert not dz[:, k:].any()
    for got, leaf in zip((dw1, dw2, dlam), leaves[1:], strict=True):
        assert float((got.double() - leaf.grad).norm()) <= 1e-5 * float(leaf.grad.norm()) + 1e-5 * T**0.5


@on_a_gpu
def test_mo_sara_rows_that_are_views_of_wider_ones():
    wide = torch.randn(20, 40, device=DEVICE)
    w1, w2, lam = (torch.randn(*shape, device=DEVICE) for shape in ((30,), (2,), (2, 30)))
    for mine, plain in zip(
        kernels.mix(wide[:, :30], w1, w2, lam), kernels.mix(wide[:, :30].clone(), w1, w2, lam), strict=True
    ):
        assert torch.equal(mine, plain)


def test_mixing_is_a_bijection_on_a_sample_and_spreads_each_bit():
    x = torch.randint(2**32, (4096,))
    assert len(mixed(x).unique()) == len(x.unique())
    for bit in range(32):
        flipped = mixed(x) ^ mixed(x ^ (1 << bit))
        changed = torch.stack([(flipped >> i) & 1 for i in range(32)]).double().mean(1)
        assert (changed - 0.5).abs().max() < 0.06


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_keeps_at_the_rate_asked_for_without_correlation(p):
    rows, columns = 2048, 1536
    keep = kernels.dropout_mask((rows, columns), p, torch.tensor(1234567890123456789), "cpu")
    # mean 0, variance 1 where all is independent
    deviation = (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    count = keep.numel()
    assert abs(float(deviation.mean())) < 5 / count**0.5
    assert abs(float(deviation.mean(0).var()) * rows - 1) < 0.2  # of columns
    assert abs(float(deviation.mean(1).var()) * columns - 1) < 0.2  # of rows
    for gap in (1, 2, 3, 8, 64, 128, 1024):
        assert abs(float((deviation[gap:] * deviation[:-gap]).mean())) < 5 / (count / 2) ** 0.5
        assert abs(float((deviation[:, gap:] * deviation[:, :-gap]).mean())) < 5 / (count / 3) ** 0.5
        corners = deviation[gap:, gap:] * deviation[:-gap, gap:] * deviation[gap:, :-gap] * deviation[:-gap, :-gap]
        assert abs(float(corners.mean())) < 5 / (count / 6) ** 0.5
    between_rows = deviation[:512] @ deviation[:512].mT / columns**0.5
    off_diagonal = between_rows[~torch.eye(512, dtype=torch.bool)]
    assert abs(float(off_diagonal.var()) - 1) < 0.02
    assert float(off_diagonal.abs().max()) < 8


def test_each_seed_has_a_mask_of_its_own():
    shape, p = (256, 256), 0.5
    masks = [kernels.dropout_mask(shape, p, torch.tensor(seed), "cpu") for seed in (0, 1, 2, 2**32, 2**40 + 1)]
    for i, one in enumerate(masks):
        assert torch.equal(one, kernels.dropout_mask(shape, p, torch.tensor((0, 1, 2, 2**32, 2**40 + 1)[i]), "cpu"))
        for other in masks[:i]:
            assert abs(float((one == other).double().mean()) - 0.5) < 0.02
    corner = kernels.dropout_mask((10, 20), p, torch.tensor(1), "cpu")
    assert torch.equal(corner, masks[1][:10, :20])


def test_seeds_come_from_the_generator():
    torch.manual_seed(3)
    first = kernels.dropout_seed("cpu")
    assert kernels.dropout_seed("cpu") != first
    torch.manual_seed(3)
    assert kernels.dropout_seed("cpu") == first


@on_a_gpu
@pytest.mark.parametrize(
    ("shape", "p", "dtype"),
    all_pairs([(70, 90, 24), (128, 256, 128), (3, 200, 300), (200, 17, 1)], [0.1, 0.3], DTYPES),
    ids=str,
)
def test_products_with_dropout_share_one_mask(shape, p, dtype):
    T, d, w = shape

    def random(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    x, A, Q, dx = random(T, d), random(d, w), random(T, w), random(T, d)
    seed = torch.tensor(987654321987654321, device=DEVICE)
    keep = kernels.dropout_mask((T, d), p, seed, DEVICE).double() / (1 - p)

    z = kernels.dropout_mm(x, A, p, seed)
    assert z.dtype == dtype
    close(z, (keep * x.double()) @ A.double(), TOLERANCE[dtype])

    M = kernels.dropout_mm_transposed(x, Q, p, seed)
    assert M.dtype == torch.float32
    close(M, (keep * x.double()).mT @ Q.double(), 1e-5)
    assert torch.equal(M, kernels.dropout_mm_transposed(x, Q, p, seed))

    want = dx.double() + keep * (Q.double() @ A.double().mT)
    returned = kernels.add_dropout_mm_(dx, Q, A, p, seed)
    assert returned is dx
    close(dx, want, TOLERANCE[dtype])


@on_a_gpu
def test_the_mask_is_bit_for_bit_pytorchs():
    seed = kernels.dropout_seed(DEVICE)
    dx = torch.zeros(150, 170, device=DEVICE)
    ones = torch.ones(170, 16, device=DEVICE)
    kernels.add_dropout_mm_(dx, torch.ones(150, 16, device=DEVICE), ones, 0.4, seed)
    assert torch.equal(dx != 0, kernels.dropout_mask((150, 170), 0.4, seed, DEVICE))
