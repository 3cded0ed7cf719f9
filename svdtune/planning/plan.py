"""A plan: the rank of every layer of a model for one method, and what it costs, before anything is built or trained."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from svdtune import spectra
from svdtune.checkpoint.model import Checkpoint
from svdtune.errors import SvdtuneError
from svdtune.planning.methods import Method
from svdtune.planning.methods import method as find_method
from svdtune.planning.rank_table import RankTable, parse_budget
from svdtune.planning.targets import Target, layers_of, resolve_targets


@dataclass(frozen=True)
class Layer:
    """One adapted module: its name, its shape, its rank and the parameters trained there."""

    name: str
    in_features: int
    out_features: int
    rank: int
    trained: int


@dataclass(frozen=True)
class Plan:
    """Ranks and costs of an adapter.

    Attributes:
        model: what was planned for.
        method: the method's costs.
        options: settings of the method that the costs depend on (`num_heads`, `gate`).
        threshold: θ that gave the ranks; None where one rank was given.
        layers: the adapted modules in the model's order.
        target_modules, exclude_modules: as a configuration should state them.
        base_parameters: parameters of the model itself.
        fused_slices: as the configuration should state it.
        modules: by slice, the module that it is a part of.
    """

    model: str
    method: Method
    options: dict[str, Any]
    threshold: float | None
    layers: tuple[Layer, ...]
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None
    base_parameters: int
    fused_slices: Mapping[str, Sequence[str]] | str | None = None
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(layer.trained for layer in self.layers)

    @property
    def frozen(self) -> int:
        """Parameters that the adapter adds without training them: Mo-SARA's U_k and V_k, SORSA's starting factors."""
        return sum(self.method.frozen(layer.rank, layer.in_features, layer.out_features) for layer in self.layers)

    @property
    def share(self) -> float:
        """Trained parameters over all of the adapted model's, as the papers and `print_trainable_parameters` count."""
        return self.trained / (self.base_parameters + self.trained + self.frozen)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """PEFT's `rank_pattern`: an anchored expression for each module's whole name → its rank.

        The anchor keeps a name from also matching a longer one that ends in it (`layers.0.q` and `vision.layers.0.q`).
        """
        return {f"^{re.escape(layer.name)}": layer.rank for layer in self.layers}

    def method_section(self) -> dict[str, Any]:
        """The `method` section of a recipe."""
        section: dict[str, Any] = {"name": self.method.name, "target_modules": self.target_modules, **self.options}
        if self.exclude_modules:
            section["exclude_modules"] = self.exclude_modules
        if self.fused_slices is not None:
            section["fused_slices"] = self.fused_slices
        return section | {"r": self._common_rank(), "rank_pattern": self.rank_pattern}

    def lora_section(self) -> dict[str, Any]:
        """Arguments for `peft.LoraConfig` with the same ranks; α = r in every layer, so the scaling is 1 throughout.

        LoRA knows no slices: a module that is adapted by slice gets the sum of their ranks.
        """
        ranks: Counter[str] = Counter()
        for layer in self.layers:
            ranks[self.modules.get(layer.name, layer.name)] += layer.rank
        r = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
        section: dict[str, Any] = {"target_modules": self.target_modules, "r": r, "lora_alpha": r}
        if self.exclude_modules:
            section["exclude_modules"] = self.exclude_modules
        return section | {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}

    def to_json(self) -> dict[str, Any]:
        """Everything, as `svdtune plan --json` writes it."""
        return {
            "model": self.model,
            "method": self.method_section(),
            "lora": self.lora_section(),
            "threshold": self.threshold,
            "base_parameters": self.base_parameters,
            "trained_parameters": self.trained,
            "frozen_parameters": self.frozen,
            "share": self.share,
            "layers": [vars(layer) for layer in self.layers],
        }

    def _common_rank(self) -> int:
        return Counter(layer.rank for layer in self.layers).most_common(1)[0][0]


def make_plan(
    checkpoint: Checkpoint,
    method: str = "sara",
    *,
    threshold: float | None = None,
    budget: str | None = None,
    match_lora: int | None = None,
    r: int | None = None,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    fused_slices: Mapping[str, Sequence[str]] | str | None = None,
    num_heads: int = 5,
    gate: str = "softmax",
    device: str = "cpu",
    progress: bool | None = None,
) -> Plan:
    """Plan an adapter; give exactly one of `threshold`, `budget`, `match_lora` and `r`.

    Args:
        checkpoint: from `open_checkpoint`.
        method: sara, mosara, sorsa or lora.
        threshold: θ in (0, 1].
        budget: parameters to train at most: a count ("500k") or a share of all parameters ("0.1%").
        match_lora: train at most as many as a LoRA of this rank on the same modules.
        r: one rank for all modules; nothing is decomposed.
        target_modules, exclude_modules: as in LoRA.
        fused_slices: as in the methods' configurations: slices of fused projections, each with a rank of its own.
        num_heads: Mo-SARA's heads.
        gate: Mo-SARA's gate: softmax, top1 or none.
        device: where weights are decomposed.
        progress: show a bar; by default where stderr is a terminal.

    Raises:
        SvdtuneError: not exactly one of the four, a value outside its range, or a budget below rank 1 everywhere.
    """
    given = {"threshold": threshold, "budget": budget, "match_lora": match_lora, "r": r}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise SvdtuneError(
            f"give exactly one of threshold, budget, match_lora and r; got {', '.join(chosen) or 'none'}"
        )
    if r is None and not checkpoint.readers:
        raise SvdtuneError(f"{checkpoint.name} is a shape without weights, and {chosen[0]} takes them; give r instead")
    if match_lora is not None and match_lora < 1:
        raise SvdtuneError(f"match_lora must be a rank >= 1; got {match_lora}")
    costs = find_method(method, num_heads=num_heads, gate=gate)
    options: dict[str, Any] = {"num_heads": num_heads} if costs.name == "mosara" else {}
    if options and gate != "softmax":
        options["gate"] = gate
    modules, stated = resolve_targets(checkpoint.model, target_modules, exclude_modules)
    targets = layers_of(checkpoint.model, modules, costs.name, fused_slices)
    exclude = exclude_modules if isinstance(exclude_modules, str) else list(exclude_modules or [])
    blank = Plan(
        model=checkpoint.name,
        method=costs,
        options=options,
        threshold=None,
        layers=(),
        target_modules=stated,
        exclude_modules=exclude or None,
        base_parameters=sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        fused_slices=fused_slices,
        modules={name: target.module for name, target in targets.items() if target.rows is not None},
    )
    frame = _Frame(checkpoint, blank, targets)
    if r is not None:
        return frame.with_rank(r)
    weights = frame.weights(device)
    if threshold is not None:
        return frame.plan(spectra.ranks(weights, threshold, progress=progress), threshold)
    if budget is not None:
        share, count = parse_budget(budget)
    else:
        assert match_lora is not None
        sizes = (spectra.matrix_shape(checkpoint.model.get_submodule(name)) for name in modules)
        share, count = None, sum(match_lora * sum(shape) for shape in sizes)
    return frame.within(RankTable(dict(spectra.spectra(weights, progress=progress))), share, count)


@dataclass(frozen=True)
class _Frame:
    """All of a plan but its ranks: a `Plan` without layers, and the layers to adapt by name."""

    checkpoint: Checkpoint
    blank: Plan
    targets: Mapping[str, Target]

    def plan(self, ranks: Mapping[str, int], threshold: float | None = None) -> Plan:
        """The plan with these ranks by layer."""
        layers = []
        for name, target in self.targets.items():
            i, o, k = target.in_features, target.out_features, ranks[name]
            layers.append(Layer(name, i, o, k, self.blank.method.trained(k, i, o)))
        return replace(self.blank, threshold=threshold, layers=tuple(layers))

    def with_rank(self, r: int) -> Plan:
        """The plan with one rank for all layers."""
        for name, target in self.targets.items():
            i, o = target.in_features, target.out_features
            if not 1 <= r <= min(i, o):
                raise SvdtuneError(f"r = {r} is outside 1 … {min(i, o)}, the ranks that {name} [{o}, {i}] can have")
        return self.plan(dict.fromkeys(self.targets, r))

    def within(self, table: RankTable, share: float | None, count: int | None) -> Plan:
        """The plan at the largest threshold that trains at most this share of all parameters, or this many: one of the two."""
        assert (share is None) != (count is None)

        def fits(ranks: Sequence[int]) -> bool:
            candidate = self.plan(dict(zip(self.targets, ranks, strict=True)))
            return candidate.share <= share if share is not None else candidate.trained <= count

        threshold = table.largest_threshold(fits)
        if threshold is None:
            least = self.plan(dict.fromkeys(self.targets, 1))
            budget = f"{share:.4%}" if share is not None else f"{count:,}"
            raise SvdtuneError(
                f"{least.method.name} trains at least {least.trained:,} parameters here ({least.share:.4%}), rank 1 "
                f"everywhere, which is more than the budget of {budget}; adapt fewer modules"
            )
        return self.plan(dict(zip(self.targets, table.at(threshold), strict=True)), threshold)

    def weights(self, device: str) -> dict[str, Callable[[], Tensor]]:
        """For each layer what reads its matrix [out, in] onto a device."""

        def weight(target: Target) -> Tensor:
            whole = self.checkpoint.weight(target.module)
            return (whole if target.rows is None else target.rows.matrix(whole)).to(device)

        return {name: partial(weight, target) for name, target in self.targets.items()}
