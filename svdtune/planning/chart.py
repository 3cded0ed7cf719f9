"""The chart of a plan: rank by depth, one line a kind of module."""

import io
from itertools import groupby
from pathlib import Path
from statistics import fmean

from svdtune.errors import SvdtuneError
from svdtune.names import depth_of
from svdtune.planning.plan import Plan
from svdtune.system import explain_write_errors, needs, replace_bytes


def by_depth(plan: Plan) -> dict[str, dict[int, list[int]]]:
    """Kind of module ("q_proj") → depth → its ranks there: several for the experts of one
    parameter.

    The depth is the first number in a module's name, or 0. If a kind occurs twice at one depth,
    more parts of the names tell its modules apart.
    """
    found: dict[str, dict[int, list[int]]] = {}
    for name, sites in groupby(plan.sites, lambda site: site.module if site.expert else site.name):
        depth, parts = depth_of(name), name.split(".")
        for size in range(1, len(parts) + 1):
            kind = ".".join(parts[-size:])
            if depth not in found.setdefault(kind, {}):
                found[kind][depth] = [site.rank or 0 for site in sites]
                break
    return {kind: ranks for kind, ranks in found.items() if ranks}


def draw_chart(plan: Plan, file: Path) -> None:
    """Write the chart as SVG, PNG or PDF, by the file's suffix.

    Raises:
        SvdtuneError: another suffix, or matplotlib is not installed.
    """
    if file.suffix not in (".svg", ".png", ".pdf"):
        raise SvdtuneError(f"{file.name} is no chart; end it in .svg, .png or .pdf")
    with needs("charts need matplotlib", "plots"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, ranks in by_depth(plan).items():
        means = [fmean(each) for each in ranks.values()]
        axes.plot(list(ranks), means, marker="o", markersize=3, linewidth=1.2, label=kind)
    axes.set(xlabel="layer", ylabel="rank k", ylim=(0, None))
    at = f" at θ = {plan.threshold:g}" if plan.threshold is not None else ""
    axes.set_title(f"{plan.method}{at}: {plan.trained:,} trained, {plan.share:.4%}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    drawn = io.BytesIO()  # first in memory: a full disk leaves no half chart
    figure.savefig(drawn, dpi=150, format=file.suffix[1:])
    with explain_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(file, drawn.getvalue())
