"""What a function or a verb is given, made into what the rooms take."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, TaskType
from pydantic import BaseModel
from torch import nn

from svdtune.checkpoint import SHAPES, Checkpoint, open_checkpoint, open_shape
from svdtune.errors import SvdtuneError
from svdtune.methods.injection import check_targets
from svdtune.methods.sites import Model

if TYPE_CHECKING:
    from svdtune.export import Source
    from svdtune.models import LoadedModel
    from svdtune.training.recipe import Recipe

_WRITING = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
ModelLike = str | Path | Checkpoint | nn.Module


@dataclass(frozen=True)
class WantedAdapter:
    """An adapter that was asked for.

    Attributes:
        model: as it was given: a name, a path, or opened.
        config: the adapter's configuration; None for what is on the model.
        recipe: that both come from; None where a model was given.
        origin: `revision` and `trust_remote_code` of a model that is named.
        saved: whether the configuration is of a saved adapter, which names its layers one by one.
        labels: outputs of the classifier that the adapter is for; None for the model's own number.
    """

    model: ModelLike
    config: PeftConfig | None
    recipe: "Recipe | None" = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    saved: bool = False
    labels: int | None = None

    def open(self, *, weights: bool = True) -> Model:
        """The model, with its weights where they are asked for, and the target names looked up in
        it.

        Raises:
            SvdtuneError: there is no such model, or a target name that it does not have.
        """
        opened = self.model if isinstance(self.model, Checkpoint | nn.Module) else self._open(str(self.model), weights)
        if self.config is not None:
            bare = opened.model if isinstance(opened, Checkpoint) else opened
            if self.config.task_type in _WRITING and not getattr(bare, "can_generate", bool)():
                # PEFT would ask the model for what only causal models have
                self.config.task_type = None
            if not self.saved:
                check_targets(bare, self.config)
        return opened

    def _open(self, name: str, weights: bool) -> Checkpoint:
        from svdtune.methods.files.adapter import architecture_of
        from svdtune.models.loader import locate

        if name in SHAPES and not Path(name).exists():
            return open_shape(name)
        # a configuration is enough
        alone = not weights and Path(name, "config.json").is_file()
        place = name if alone else locate(cast(str | Path, self.model))  # what is no loaded model is a name
        cls = None if self.config is None else architecture_of(self.config)
        return open_checkpoint(place, weights=weights, architecture=cls, labels=self.labels, **self.origin)


def asked(who: str, model: Any, config: Any) -> WantedAdapter:
    """The adapter that a function was asked for.

    Args:
        who: the function, for messages.
        model: a recipe as `is_recipe` knows it, a model, or a run or adapter folder.
        config: a PEFT configuration, or a recipe's `method` section; None with a recipe, and for
            what is on the model or in the folder.

    Raises:
        SvdtuneError: it is neither, both say which adapter, or a setting is wrong.
    """
    if is_recipe(model):
        if config is not None:
            raise SvdtuneError(
                f"{who} was given a recipe and a configuration, and each says which adapter; give the recipe's model with "
                "the configuration, or the recipe alone"
            )
        from svdtune.training.recipe import recipe_of

        return of_recipe(who, recipe_of(model))
    if not isinstance(model, ModelLike):
        raise SvdtuneError(
            f"{who} takes a model folder, a hub name, a loaded model or a recipe; got a {type(model).__name__}"
        )
    if config is None and isinstance(model, str | Path):
        return _of_folder(model)
    if config is None or isinstance(config, PeftConfig):
        saved = bool(config and (config.inference_mode or getattr(config, "initialized", False)))
        return WantedAdapter(model, copy.copy(config), saved=saved)  # what is done to it here stays here
    if not isinstance(config, Mapping):
        raise SvdtuneError(
            f"{who} takes a PEFT configuration, or a recipe's method section such as {{'name': 'sorsa', 'r': 64}}; got a "
            f"{type(config).__name__}"
        )
    return of_section(who, model, config)


def _of_folder(folder: str | Path) -> WantedAdapter:
    """The adapter in a run or adapter folder; none where it is a model's."""
    from svdtune.export import find_source
    from svdtune.methods.files.adapter import labels_of, read_config

    source = find_source(folder)
    if source.adapter is None:
        return WantedAdapter(source.base, None, origin=source.origin)
    config = read_config(source.adapter)
    config.inference_mode = False  # saved adapters are marked so, and would count as not trained
    labels = labels_of(source.adapter)
    return WantedAdapter(source.base, config, source.recipe, source.origin, saved=True, labels=labels)


def of_recipe(who: str, recipe: "Recipe") -> WantedAdapter:
    """A recipe's adapter.

    Raises:
        SvdtuneError: it has none.
    """
    task = recipe.training.task
    config = _built(who, recipe.method.name, recipe.method.options, task)
    return WantedAdapter(recipe.model.name, config, recipe, recipe.model.origin, labels=1 if task == "reward" else None)


def of_section(who: str, model: ModelLike, section: Mapping[str, Any], **origin: Any) -> WantedAdapter:
    """The adapter of a recipe's `method` section, for a model; `origin` as in `WantedAdapter`.

    Raises:
        SvdtuneError: with all problems of the section.
    """
    from svdtune.training.method import method_problems
    from svdtune.training.problems import refuse

    name, options = str(section.get("name")), {key: value for key, value in section.items() if key != "name"}
    refuse(list(method_problems(name, options)), who)
    return WantedAdapter(model, _built(who, name, options), origin=origin)


def _built(who: str, name: str, options: dict[str, Any], task: str = "sft") -> PeftConfig:
    from svdtune.training.method import FULL, build_config

    if name == FULL:
        raise SvdtuneError(f"{who} is for adapters, and full fine-tuning has none")
    return build_config(name, options, task)


def is_recipe(given: Any) -> bool:
    """Whether something is a recipe: a YAML file, the name of one that comes with svdtune, its
    sections, or one that was read."""
    if isinstance(given, str | Path):
        from svdtune.training.collection import shipped

        is_file = Path(given).suffix in (".yaml", ".yml")
        return is_file or (str(given) in shipped("recipe") and not Path(given).exists())
    return isinstance(given, Mapping | BaseModel)


def source_of(who: str, given: Any, adapter: str | Path | None = None, *, instead: str) -> "Source":
    """The run, adapter or model that a path names.

    Args:
        who: the function, for messages.
        given: a path or a hub name.
        adapter: a folder for a model.
        instead: what to do with a loaded model.

    Raises:
        SvdtuneError: there is none, or it is no path.
    """
    from svdtune.export import find_source

    if not isinstance(given, str | Path):
        raise SvdtuneError(f"{who} takes a run, adapter or model folder; got a {type(given).__name__}. {instead}")
    return find_source(given, adapter)


def answering(who: str, given: Any, adapter: str | Path | None, tokenizer: Any) -> "tuple[Source | LoadedModel, str]":
    """What is asked questions, and its name.

    Args:
        who: the function, for messages.
        given: a path, a hub name, or a loaded model.
        adapter: a folder for a model that a path names.
        tokenizer: of a loaded model.

    Raises:
        SvdtuneError: there is none, or a loaded model has an adapter beside it or no tokenizer.
    """
    from svdtune.models import LoadedModel

    if not isinstance(given, nn.Module | LoadedModel):
        return source_of(who, given, adapter, instead="Give a loaded model with tokenizer="), str(given)
    if adapter is not None:
        raise SvdtuneError("adapter is for a model that a path names; put it on this one: PeftModel.from_pretrained")
    if isinstance(given, LoadedModel):
        return given, given.name
    if tokenizer is None:
        raise SvdtuneError("a loaded model needs its tokenizer to be asked anything: give tokenizer=")
    model: Any = given  # a PeftModel stands for the model that it wraps
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return LoadedModel(model, tokenizer, name), name
