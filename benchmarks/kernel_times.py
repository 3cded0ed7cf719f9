"""Each Triton kernel beside its plain PyTorch form and beside the floor that bytes and arithmetic
set; CUDA only.

    python benchmarks/kernel_times.py                    # all groups, at LLaMA-7B shapes
    python benchmarks/kernel_times.py dropout products  # two of the groups

JSON lines, times in microseconds, medians with a cold L2 cache. `floor` is the larger of the bytes
that must move over the bandwidth of a large copy and of the operations over the rate of a large
bf16 product, both measured at the start of the run. `products` and `transposed` time PyTorch's own
skinny products, to show which are far from their floor.
"""

import argparse
import json
import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.testing import do_bench

from svdtune.methods.compute import kernels
from svdtune.methods.compute.lowrank import stacked

T, R, K, HEADS, P = 8192, 128, 914, 5, 0.05
WIDTHS = (4096, 11008)


def time(run: Callable[[], object]) -> float:
    """Median microseconds of one call."""
    return 1000 * do_bench(run, warmup=10, rep=40, return_mode="median")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values on the GPU, scaled as activations of a product over the last dimension would
    be."""
    return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)


class Report:
    """Prints a line a timing, with the floor of the work it did."""

    def __init__(self) -> None:
        copied = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
        self.bandwidth = 2 * copied.nbytes / time(lambda: copied.clone())  # bytes a microsecond
        square = random(8192, 8192)
        self.rate = 2 * 8192**3 / time(lambda: square @ square)
        print(
            json.dumps(
                {
                    "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "triton": triton.__version__,
                    "gigabytes_per_second": round(self.bandwidth / 1e3),
                    "teraflops": round(self.rate / 1e6),
                }
            )
        )

    def line(self, what: str, shape: str, bytes_moved: float, operations: float, **forms: Callable[[], object]) -> None:
        """Time each form of one piece of work."""
        times = {}
        for name, run in forms.items():
            try:
                times[name] = round(time(run), 1)
            except (RuntimeError, TypeError) as error:  # a form that this PyTorch does not have
                times[name] = str(error).splitlines()[0][:80]
        floor = max(bytes_moved / self.bandwidth, operations / self.rate)
        print(json.dumps({"what": what, "shape": shape, "floor": round(floor, 1)} | times), flush=True)


def factors(report: Report) -> None:
    """The stacked factors."""
    fp32 = torch.float32
    for out, n in ((4096, 4096), (11008, 4096), (4096, 11008)):
        U, s, V = random(out, R, dtype=fp32), random(R, dtype=fp32), random(n, R, dtype=fp32)
        P0, V0 = U * s, V.clone()
        size = (out + n) * R
        report.line(
            "stack_factors", f"out={out} in={n} r={R}", size * (8 + 4), 0,
            plain=lambda U=U, s=s, V=V, P0=P0, V0=V0: stacked(U, s, V, P0, V0, torch.bfloat16),
            ours=lambda U=U, s=s, V=V, P0=P0, V0=V0: kernels.stack_factors(U, s, V, P0, V0, torch.bfloat16),
        )  # fmt: skip


def dropout(report: Report) -> None:
    """The three products with a hashed mask, beside PyTorch's dropout and a product, and the
    product alone."""
    seed = kernels.dropout_seed("cuda")
    report.line("dropout_seed", "", 0, 0, ours=lambda: kernels.dropout_seed("cuda"))
    for d in WIDTHS:
        x, dx = random(T, d), random(T, d)
        for w in (R, 2 * R):
            A, Q = random(d, w), random(T, w)
            work = 2 * T * d * w
            report.line(
                "dropout_mm", f"d={d} w={w}", 2 * (T * d + T * w + d * w), work,
                without_dropout=lambda x=x, A=A: x @ A,
                plain=lambda x=x, A=A: F.dropout(x, P) @ A,
                ours=lambda x=x, A=A: kernels.dropout_mm(x, A, P, seed),
                ours_p_0=lambda x=x, A=A: kernels.dropout_mm(x, A, 0.0, seed),
            )  # fmt: skip
            report.line(
                "add_dropout_mm_", f"d={d} w={w}", 2 * (2 * T * d + T * w + d * w), work,
                without_dropout=lambda dx=dx, Q=Q, A=A: dx.addmm_(Q, A.mT),
                plain=lambda dx=dx, Q=Q, A=A: dx.add_(F.dropout(Q @ A.mT, P)),
                ours=lambda dx=dx, Q=Q, A=A: kernels.add_dropout_mm_(dx, Q, A, P, seed),
                ours_p_0=lambda dx=dx, Q=Q, A=A: kernels.add_dropout_mm_(dx, Q, A, 0.0, seed),
            )  # fmt: skip
            dx.zero_()
        Q = random(T, R)
        report.line(
            "dropout_mm_transposed", f"d={d} w={R}", 2 * (T * d + T * R) + 4 * d * R, 2 * T * d * R,
            without_dropout=lambda x=x, Q=Q: x.mT @ Q,
            plain=lambda x=x, Q=Q: F.dropout(x, P).mT @ Q,
            ours=lambda x=x, Q=Q: kernels.dropout_mm_transposed(x, Q, P, seed),
            ours_p_0=lambda x=x, Q=Q: kernels.dropout_mm_transposed(x, Q, 0.0, seed),
        )  # fmt: skip


def plain_mix(z: Tensor, w1: Tensor, w2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `mosara.math` computes it."""
    a = z @ w1.to(z.dtype)
    gate = torch.softmax(torch.outer(a.to(w2.dtype), w2), 1)
    return z * (gate @ lam).to(z.dtype), gate, a


def plain_mix_backward(
    dt: Tensor, z: Tensor, gate: Tensor, a: Tensor, lam: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, ...]:
    """As `mosara.math` computes it."""
    dz = dt * (gate @ lam).to(dt.dtype)
    dvalues = (dt * z).to(lam.dtype)
    dgate = dvalues @ lam.mT
    dlogits = gate * (dgate - (gate * dgate).sum(1, keepdim=True))
    da = dlogits @ w2
    return dz.addr_(da.to(dz.dtype), w1.to(dz.dtype)), gate.mT @ dvalues, da @ z.to(da.dtype), a.to(w2.dtype) @ dlogits


def router(report: Report) -> None:
    """Mo-SARA's rows, forward and backward."""
    fp32 = torch.float32
    for k, width in ((K, K), (K, 960), (2500, 2560)):
        z, dt = random(T, width), random(T, width)
        w1, w2, lam = random(k, dtype=fp32), random(HEADS, dtype=fp32), random(HEADS, k, dtype=fp32)
        _, gate, a = kernels.mix(z, w1, w2, lam)
        report.line(
            "mix", f"k={k} width={width} m={HEADS}", 4 * T * width, 0,
            plain=lambda z=z[:, :k], w=(w1, w2, lam): plain_mix(z, *w),
            ours=lambda z=z, w=(w1, w2, lam): kernels.mix(z, *w),
        )  # fmt: skip
        report.line(
            "mix_backward", f"k={k} width={width} m={HEADS}", 6 * T * width, 0,
            plain=lambda dt=dt[:, :k], z=z[:, :k], w=(gate, a, lam, w1, w2): plain_mix_backward(dt, z, *w),
            ours=lambda dt=dt, z=z, w=(gate, a, lam, w1, w2): kernels.mix_backward(dt, z, *w),
        )  # fmt: skip


def products(report: Report) -> None:
    """PyTorch's products with a skinny matrix."""
    for d in WIDTHS:
        x, y = random(T, d), random(T, d)
        for w in (R, 2 * R, K, 920, 960):
            A, z = random(d, w), random(T, w)
            work, move = 2 * T * d * w, 2 * (T * d + T * w + d * w)
            report.line("z = x A", f"d={d} w={w}", move, work, mm=lambda x=x, A=A: x @ A)
            report.line(
                "y += z Bᵀ", f"d={d} w={w}", move + 2 * T * d, work,
                addmm_=lambda y=y, z=z, B=A: y.addmm_(z, B.mT),
                mm_and_add_=lambda y=y, z=z, B=A: y.add_(z @ B.mT),
                ours=lambda y=y, z=z, B=A: kernels.add_dropout_mm_(y, z, B, 0.0, None),
            )  # fmt: skip
            y.zero_()


def transposed(report: Report) -> None:
    """Xᵀ Q in fp32: PyTorch's, split by hand, and ours."""
    for d in WIDTHS:
        x = random(T, d)
        for w in (R, K, 960):
            Q = random(T, w)

            def split(parts: int, x: Tensor = x, Q: Tensor = Q) -> Callable[[], Tensor]:
                def run() -> Tensor:
                    xs, qs = x.view(parts, -1, x.shape[1]), Q.view(parts, -1, Q.shape[1])
                    return torch.bmm(xs.mT, qs, out_dtype=torch.float32).sum(0)

                return run

            report.line(
                "Xᵀ Q", f"d={d} w={w}", 2 * (T * d + T * w) + 4 * d * w, 2 * T * d * w,
                mm=lambda x=x, Q=Q: x.mT @ Q,
                mm_fp32=lambda x=x, Q=Q: torch.mm(x.mT, Q, out_dtype=torch.float32),
                bmm_2=split(2), bmm_4=split(4), bmm_8=split(8),
                ours=lambda x=x, Q=Q: kernels.dropout_mm_transposed(x, Q, 0.0, None),
            )  # fmt: skip


GROUPS = {f.__name__: f for f in (factors, dropout, router, products, transposed)}


def main() -> None:
    """Time the groups asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default: all")
    names = parser.parse_args().groups or list(GROUPS)
    if unknown := set(names) - set(GROUPS):
        sys.exit(f"unknown groups: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    report = Report()
    for name in names:
        GROUPS[name](report)


if __name__ == "__main__":
    main()
