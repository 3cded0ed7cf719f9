"""What ranks cost: the parameters of an adapter as a function of the rank of every site."""

from collections.abc import Sequence
from typing import Any

from peft import PeftConfig

from svdtune import spectra
from svdtune.errors import SvdtuneError
from svdtune.methods.injection import method_name
from svdtune.methods.ranks import rank_pattern, with_rank
from svdtune.methods.sites import Count, Model, readers, sites
from svdtune.planning.rank_table import RankTable

# Methods whose `rank_pattern` gives layers their ranks. AdaLoRA, OSF and others have a field of
# that name with another meaning.
RANKED = ("lora", "dylora", "sara", "mosara", "sorsa")


class Costs:
    """The parameters of an adapter as a function of its sites' ranks.

    They are measured with every rank at 1 and at 2: for every method in `RANKED` a site's
    parameters are affine in its rank. A rank in the configuration's own `rank_pattern` stays.

    Attributes:
        least: the sites, with rank 1 where nothing else is given.
        per_rank: by site, what each rank more trains there; 0 where the rank is given.
    """

    def __init__(self, model: Model, config: PeftConfig) -> None:
        """Measure on a checkpoint or a model, without reading a weight.

        Raises:
            SvdtuneError: layers of this method cannot each have a rank of their own, or it cannot
                be put on this model.
        """
        check_ranked(config)
        self.least = sites(model, with_rank(config, 1))
        narrow = {site.name: 1 for site in self.least if site.shape is not None and min(site.shape) < 2}
        ranked: Any = config
        pattern = ranked.rank_pattern | rank_pattern(narrow)  # a single row has no second rank
        more = sites(model, with_rank(config, 2, rank_pattern=pattern))
        pairs = list(zip(self.least, more, strict=True))
        self.per_rank = {one.name: two.trained - one.trained for one, two in pairs}
        self._frozen = [two.frozen - one.frozen for one, two in pairs]

    def at(self, ranks: Sequence[int]) -> Count:
        """The parameters at a rank for each site, in their order."""
        trained = sum(each * (rank - 1) for each, rank in zip(self.per_rank.values(), ranks, strict=True))
        frozen = sum(each * (rank - 1) for each, rank in zip(self._frozen, ranks, strict=True))
        least = self.least.count
        return Count(least.trained + trained, least.frozen + frozen, least.total + trained + frozen)

    def table(
        self, model: Model, rule: str = "sara", *, device: str | None = None, progress: bool | None = None
    ) -> RankTable:
        """The ranks of the sites by threshold. Each weight is read once.

        Raises:
            SvdtuneError: a weight is not there.
        """
        return RankTable(dict(spectra.spectra(readers(model, self.least), device=device, progress=progress)), rule)


def check_ranked(config: PeftConfig) -> None:
    """Raise `SvdtuneError` for a method whose layers cannot have ranks of their own."""
    if method_name(config) not in RANKED:
        raise SvdtuneError(f"{method_name(config)} takes no ranks by layer; those that do are {', '.join(RANKED)}")
