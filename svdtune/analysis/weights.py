"""Open a finished run with both of its weights: the one each layer has now and the base model's
own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from svdtune.checkpoint import Checkpoint, open_checkpoint
from svdtune.errors import SvdtuneError
from svdtune.export.source import Source, base_folder, find_source, is_reward, open_source
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.matrices import Observed, observed_layers, trained_layers
from svdtune.models import LoadedModel
from svdtune.training.movement import is_sampled


@dataclass(frozen=True)
class Opened:
    """A finished run.

    Attributes:
        source: which base, adapter and recipe.
        loaded: the trained model.
        wanted: names or patterns of the layers to look at; None for all.
    """

    source: Source
    loaded: LoadedModel
    wanted: Sequence[str] | None = None

    @cached_property
    def layers(self) -> list[Observed]:
        """The layers that were trained.

        Raises:
            SvdtuneError: none is wanted.
        """
        found = trained_layers(self.loaded.model)
        chosen = [layer for layer in found if self.wanted is None or is_sampled(layer.name, self.wanted)]
        if not chosen:
            there = ", ".join(dict.fromkeys(layer.name.rpartition(".")[2] for layer in found))
            raise SvdtuneError(
                f"{list(self.wanted or [])} matches no trained layer of {self.source.run}; there are {there}"
            )
        return chosen

    @property
    def matrices(self) -> list[Observed]:
        """Those of the layers whose change is a matrix: not Mo-SARA with several heads."""
        known = {layer.name for layer in observed_layers(self.loaded.model)}
        return [layer for layer in self.layers if layer.name in known]

    def start(self, layer: Observed) -> Tensor:
        """The base model's own weight [out, in] of a layer.

        Ours give it back exactly. Other methods may have changed it (PiSSA), so it is read from the
        base checkpoint again.
        """
        if isinstance(layer.module, SvdLayer):
            return layer.start()
        return self._checkpoint.weight(layer.name).to(layer.weight().dtype)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        assert self.source.recipe is not None
        base = replace(self.source, base=self.source.recipe.model.name)
        return open_checkpoint(base_folder(base), **base.origin)


def open_run(run: str | Path, wanted: Sequence[str] | None = None) -> Opened:
    """Load a finished run on the CPU.

    Args:
        run: a run folder.
        wanted: names or patterns of the layers to look at ("q_proj", "*.3.*"); all trained ones by
            default.

    Raises:
        SvdtuneError: there is no finished run, or a part of it is missing.
    """
    source = find_source(run)
    if source.run is None:
        raise SvdtuneError(f"{run} is not a run of svdtune: analysis needs the folder that `svdtune train` left")
    return Opened(source, open_source(source, reward=is_reward(source)), wanted)
