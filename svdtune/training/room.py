"""Whether the disk has room for a run, before it trains: its files' sizes are known by then."""

from pathlib import Path

from torch import nn

from svdtune.methods.sites import Count
from svdtune.planning.memory import MOMENTS
from svdtune.system import check_free
from svdtune.training.recipe import Recipe


def check_room(recipe: Recipe, model: nn.Module, count: Count, steps: int) -> None:
    """Refuse a run whose result and checkpoints the disk has no room for.

    What is written is at least this: an optimizer's state is left out where its size is not known.

    Raises:
        SvdtuneError: saying how much is needed, and for what.
    """
    size = next((p.element_size() for p in model.parameters() if p.requires_grad), 4)
    settings = recipe.training
    taken = 0 if settings.save_steps is None else steps // settings.save_steps
    kept = min(taken, settings.keep_checkpoints + 1)  # one is written before the oldest is deleted
    saved = size * (count.trained + count.frozen)
    moments = int(MOMENTS.get(settings.optimizer, 0) * size / 4 * count.trained)
    what = "its result" if kept == 0 else f"its result and {kept} checkpoints"
    check_free(Path(recipe.output.dir), saved * (1 + kept) + moments * kept, what)
