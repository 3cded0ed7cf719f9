"""What training groups of layers brings, beside the rank that SARA's threshold gives their layers
(SARA, Sections 3 and 5.4, Figures 2 and 3)."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import correlation, fmean
from typing import TYPE_CHECKING, Any

from svdtune.analysis import THRESHOLDS, base
from svdtune.lab.study.arms import Arm, Table
from svdtune.lab.study.grid import model_of
from svdtune.lab.study.markdown import escape, table
from svdtune.lab.study.plots import file_of, label_of, scaled
from svdtune.lab.study.results import LayerRanks
from svdtune.lab.study.spec import Settings, Study
from svdtune.lab.study.table import NONE, number
from svdtune.names import depth_of
from svdtune.reports.figures import new_figure, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = "layers_to_transform"
_DRAWN = (0.1, 0.3, 0.5, 0.7, 0.9)
Group = tuple[int, int]


def ranks_by_layer(study: Study, tasks: Mapping[str, Settings]) -> dict[str, Any]:
    """The ranks of a task's model at thresholds, for `results.json`, where arms train groups of its
    layers; nothing where none does.

    Returns:
        {task: {"thresholds", "k"}}, k [layers][thresholds], the mean over the matrices that the
            arms adapt in a layer. The arms' own thresholds are among them.

    Raises:
        SvdtuneError: a weight cannot be read.
    """
    methods = [arm.method for arm in study.arms.values() if arm.method and arm.method.get(GROUP)]
    if not methods:
        return {}
    chosen = [given for method in methods if (given := method.get("target_modules"))]
    pattern = next((given for given in chosen if isinstance(given, str)), None)  # "all-linear", or an expression
    modules = pattern or list(dict.fromkeys(name for given in chosen for name in given)) or None
    thresholds = sorted({*THRESHOLDS, *(method["threshold"] for method in methods if "threshold" in method)})
    return {task: _ranks(recipe, modules, thresholds) for task, recipe in tasks.items()}


def _ranks(recipe: Settings, modules: str | Sequence[str] | None, thresholds: Sequence[float]) -> dict[str, Any]:
    model = model_of(recipe)
    layers = base(model.name, modules, thresholds=thresholds, **model.origin)["layers"]
    by_depth: dict[int, list[list[int]]] = {}
    for name, found in layers.items():
        by_depth.setdefault(depth_of(name), []).append(found["k"])
    k = [[fmean(column) for column in zip(*by_depth[depth], strict=True)] for depth in sorted(by_depth)]
    return {"thresholds": list(thresholds), "k": k}


def layer_sections(found: Table, ranks: LayerRanks | None) -> Iterator[tuple[str, str]]:
    """The scores of groups of layers, the mean rank of each at every threshold, and how the two go
    together."""
    scores = _scores(found)
    if ranks is None or not scores:
        return
    groups = sorted({group for by_group in scores.values() for group in by_group})
    columns = [
        [fmean(k[t] for k in ranks.k[low : high + 1]) for low, high in groups] for t in range(len(ranks.thresholds))
    ]
    unit = ", %" if found.share else ""
    head = ["layers", *(f"{escape(method)}{unit}" for method in scores), *(f"θ = {one:g}" for one in ranks.thresholds)]
    rows = [
        [f"{group[0]}–{group[1]}"]
        + [_number(by_group[group], found.share) if group in by_group else "" for by_group in scores.values()]
        + [f"{column[at]:.1f}" for column in columns]
        for at, group in enumerate(groups)
    ]
    for method, by_group in scores.items():
        own = [at for at, group in enumerate(groups) if group in by_group]
        values = [by_group[groups[at]] for at in own]
        together = [_correlation(values, [column[at] for at in own]) for column in columns]
        rows.append([f"correlation with {escape(method)}", *("" for _ in scores), *together])
    said = (
        f"Scores are {escape(found.main)}, means over seeds; a rank is the mean over a group's matrices of SARA's k at the "
        "threshold. The correlation is Pearson's over the groups: of four, chance alone gives one beyond ±0.95 in one case "
        "of twenty."
    )
    yield "Ranks of the layers", f"{table(head, rows)}\n\n{said}"


def layer_figures(found: Table, ranks: LayerRanks | None) -> Iterator[tuple[str, str, "Figure"]]:
    """As `svdtune.lab.study.plots.figures`: the scores as bars as wide as their layers, k by layer
    laid over them.

    Raises:
        SvdtuneError: matplotlib is not installed.
    """
    scores = _scores(found)
    if ranks is None or not scores:
        return
    caption = f"{found.task}: {found.main} by group of layers, and k by layer"
    figure = new_figure(label_of(caption))
    axes = figure.axes[0]
    for i, (method, by_group) in enumerate(scores.items()):
        width = [(high - low + 0.6) / len(scores) for low, high in by_group]
        left = [low - 0.3 + i * each for (low, _), each in zip(by_group, width, strict=True)]
        height = [scaled(value, found.share) for value in by_group.values()]
        style = {"color": style_of(i)["color"], "alpha": 0.45, "edgecolor": "white"}
        axes.bar(left, height, width, align="edge", label=label_of(method), **style)
    axes.set(xlabel="layer", ylabel=label_of(f"{found.main}{', %' if found.share else ''}"))
    over = axes.twinx()
    shown = [t for t, threshold in enumerate(ranks.thresholds) if threshold in _DRAWN]
    for i, t in enumerate(shown):
        style = style_of(i) | {"color": "#30343a", "markersize": 3, "linewidth": 1}
        over.plot(range(len(ranks.k)), [k[t] for k in ranks.k], label=f"k at θ = {ranks.thresholds[t]:g}", **style)
    over.set(ylabel="k", yscale="log")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    yield file_of("layers", found), caption, figure


def _scores(found: Table) -> dict[str, dict[Group, float]]:
    """By method the mean main score of each group of layers; nothing where one group is all that a
    method has."""
    scores: dict[str, dict[Group, float]] = {}
    for arm in found.arms:
        if (group := _group(arm)) is not None and found.main in arm.cells:
            method = (arm.finished[0].method or {})["name"]
            scores.setdefault(method, {})[group] = arm.cells[found.main].mean
    return {method: dict(sorted(by_group.items())) for method, by_group in scores.items() if len(by_group) > 1}


def _group(arm: Arm) -> Group | None:
    """The first and the last layer that an arm trains; None where it trains all."""
    chosen = (arm.finished[0].method or {}).get(GROUP) if arm.finished else None
    return (min(chosen), max(chosen)) if isinstance(chosen, list) and chosen else None


def _correlation(one: Sequence[float], other: Sequence[float]) -> str:
    if len(set(one)) < 2 or len(set(other)) < 2:
        return NONE
    return number(correlation(one, other), False, 2)


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.1f}" if share else f"{value:.4g}"
