"""Training: a recipe becomes a run folder with an adapter, a log and everything needed to go on or
to repeat it."""

from svdtune.training.recipe import Recipe, check_recipe, load_recipe
from svdtune.training.run import Interrupted, RunResult, train

__all__ = ["Interrupted", "Recipe", "RunResult", "check_recipe", "load_recipe", "train"]
