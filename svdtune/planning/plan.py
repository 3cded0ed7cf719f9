"""A plan: an adapter's ranks and what they cost, before anything is built or trained."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from peft import LoraConfig, PeftConfig

from svdtune.checkpoint.model import Checkpoint
from svdtune.errors import SvdtuneError
from svdtune.linalg.matrix import check_threshold
from svdtune.methods.injection import method_name
from svdtune.methods.ranks import common_rank, rank_pattern, with_ranks
from svdtune.methods.settings import chosen
from svdtune.methods.sites import Count, Model, Sites, at_threshold, count, sites
from svdtune.planning.costs import RANKED, Costs, check_ranked
from svdtune.planning.rank_table import check_rule, parse_budget


@dataclass(frozen=True)
class Plan:
    """Ranks and costs of an adapter.

    Attributes:
        model: what was planned for.
        config: the adapter's configuration, with every rank written out.
        sites: where the adapter goes.
        threshold: θ that gave the ranks; None where they were given.
        base_parameters: parameters of the model itself.
    """

    model: str
    config: PeftConfig
    sites: Sites
    threshold: float | None
    base_parameters: int

    @property
    def method(self) -> str:
        """The method, as a recipe names it."""
        return method_name(self.config)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.sites.count.trained

    @property
    def frozen(self) -> int:
        """Parameters that the adapter adds without training them."""
        return self.sites.count.frozen

    @property
    def share(self) -> float:
        """Trained parameters over all of the adapted model's, as the papers and PEFT count."""
        return share_of(self.sites.count)

    def method_section(self) -> dict[str, Any]:
        """The `method` section of a recipe."""
        ranked: Any = self.config
        section = {"name": self.method, **chosen(self.config)}
        if section.get("task_type") == "CAUSAL_LM":
            del section["task_type"]  # as in every recipe
        if self.sites.ranks:
            section["r"] = ranked.r
        return section

    def lora_section(self) -> dict[str, Any]:
        """Arguments for `peft.LoraConfig` with the same ranks; α = r in every layer, a scaling of
        1.

        LoRA knows no slices: a module that is adapted by slice gets the sum of their ranks. It has
        one rank for all experts of a parameter, which gets their highest.
        """
        ranks: Counter[str] = Counter()
        for site in self.sites:
            before, rank = ranks[site.module], site.rank or 0
            ranks[site.module] = max(before, rank) if site.expert else before + rank
        r, pattern = common_rank(ranks), rank_pattern(ranks)
        known = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
        targets = {name: value for name, value in chosen(self.config).items() if name in known}
        return {**targets, "r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}

    def to_json(self) -> dict[str, Any]:
        """Everything, as `svdtune plan --json` writes it."""
        return {
            "model": self.model,
            "method": self.method_section(),
            "lora": self.lora_section() if self.sites.ranks else None,
            "threshold": self.threshold,
            "base_parameters": self.base_parameters,
            "trained_parameters": self.trained,
            "frozen_parameters": self.frozen,
            "share": self.share,
            "layers": [
                {
                    "name": site.name,
                    "in_features": site.shape and site.shape[1],
                    "out_features": site.shape and site.shape[0],
                    "rank": site.rank,
                    "trained": site.trained,
                }
                for site in self.sites
            ],
        }


def plan(
    model: Model,
    config: PeftConfig,
    *,
    threshold: float | None = None,
    budget: str | int | None = None,
    match_lora: int | None = None,
    ranks: str = "sara",
    device: str | None = None,
    progress: bool | None = None,
) -> Plan:
    """Plan the adapter of a configuration: what `get_peft_model` would put on the loaded model.

    Args:
        model: from `open_checkpoint`, or a loaded model; it stays as it is.
        config: of any PEFT method.
        threshold, budget, match_lora, ranks, device, progress: as for `svdtune.plan`.

    Raises:
        SvdtuneError: several of the three sizes, a value outside its range, a budget below rank 1
            everywhere, or an adapter that cannot be put on this model.
    """
    given = {"threshold": threshold, "budget": budget, "match_lora": match_lora}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise SvdtuneError(f"give at most one of threshold, budget and match_lora; got {' and '.join(named)}")
    reading: dict[str, Any] = {"device": device, "progress": progress}
    check_rule(ranks)
    own = config
    if budget is not None or match_lora is not None:
        config, threshold = _within(model, config, budget, match_lora, ranks, reading)
    else:
        threshold = getattr(config, "threshold", None) if threshold is None else threshold
        if ranks != "sara":
            threshold = 1.0 if threshold is None else threshold
            check_threshold(threshold)
            costs = Costs(model, config)
            found_ranks = costs.table(model, ranks, **reading).at(threshold)
            config = with_ranks(config, dict(zip(costs.per_rank, found_ranks, strict=True)))
        elif threshold is not None:
            check_ranked(config)
            config = at_threshold(model, config, threshold, **reading)
    found = sites(model, config)
    base = count(model).total
    written = _written_out(config, found)
    if threshold is not None:
        written = _with_alphas(own, written, found)
    return Plan(_name(model), written, found, threshold, base)


def _name(model: Model) -> str:
    if isinstance(model, Checkpoint):
        return model.name
    return getattr(model, "name_or_path", "") or type(model).__name__


def share_of(parameters: Count) -> float:
    """Trained parameters over all of the adapted model's."""
    return parameters.trained / parameters.total


def _written_out(config: PeftConfig, found: Sites) -> PeftConfig:
    """The configuration as given, with PEFT's default targets and every rank written out."""
    if getattr(config, "target_modules", ()) is None:
        completed: Any = found.config
        targets: dict[str, Any] = {"target_modules": completed.target_modules}
        config = replace(config, **targets)
    return with_ranks(config, found.ranks) if method_name(config) in RANKED else config


def _with_alphas(own: PeftConfig, config: PeftConfig, found: Sites) -> PeftConfig:
    """The configuration with LoRA's alpha / r kept the same in every layer.

    rsLoRA's alpha / √r is made for ranks that differ, and stays.
    """
    if type(own) is not LoraConfig or type(config) is not LoraConfig or own.use_rslora or own.alpha_pattern:
        return config
    alphas = {name: own.lora_alpha * rank / own.r for name, rank in found.ranks.items()}
    whole = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    common = own.lora_alpha * config.r / own.r
    lora_alpha = int(common) if common == int(common) else own.lora_alpha
    return replace(config, lora_alpha=lora_alpha, alpha_pattern=rank_pattern(whole))


def _within(
    model: Model,
    config: PeftConfig,
    budget: str | int | None,
    match_lora: int | None,
    rule: str,
    reading: dict[str, Any],
) -> tuple[PeftConfig, float]:
    """The configuration at the largest threshold that a budget allows, and that threshold."""
    costs = Costs(model, config)
    if budget is not None:
        share, most = parse_budget(str(budget))
    else:
        assert match_lora is not None
        share, most = None, _lora(model, costs.least, match_lora)

    def fits(ranks: Sequence[int]) -> bool:
        parameters = costs.at(ranks)
        return share_of(parameters) <= share if share is not None else parameters.trained <= cast(int, most)

    table = costs.table(model, rule, **reading)
    threshold = table.largest_threshold(fits)
    if threshold is None:
        least = costs.least.count
        text = f"{share:.4%}" if share is not None else f"{most:,}"
        raise SvdtuneError(
            f"{method_name(config)} trains at least {least.trained:,} parameters here ({share_of(least):.4%}), rank 1 "
            f"everywhere, which is more than the budget of {text}; adapt fewer modules"
        )
    return with_ranks(config, dict(zip(costs.per_rank, table.at(threshold), strict=True))), threshold


def _lora(model: Model, found: Sites, r: int) -> int:
    """What a LoRA of rank r trains on the modules of these sites."""
    if r < 1:
        raise SvdtuneError(f"match_lora must be a rank >= 1; got {r}")
    modules = "|".join(re.escape(name) for name in dict.fromkeys(site.module for site in found if not site.expert))
    experts = list(dict.fromkeys(site.module for site in found if site.expert))
    lora = LoraConfig(r=r, target_modules=modules or [], target_parameters=experts or None)
    return count(model, lora).trained
