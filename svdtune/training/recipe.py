"""The recipe: everything that decides a training run, as one strict YAML file.

Strict means: no unknown key, no wrong type, no duplicate key, no two settings that exclude each
other. All problems are reported at once. The file is YAML 1.2 (`1e-3` is a number, `no` is a word).
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator

from svdtune.errors import SvdtuneError
from svdtune.training.collection import find_file, override, read_extended
from svdtune.training.exclusions import exclusions
from svdtune.training.problems import Problem, from_pydantic, refuse
from svdtune.training.sections import DataSource, EvaluationSection, Section, TrainSource, check_template
from svdtune.training.yaml_files import read_yaml, write_yaml


class Model(Section):
    """The base model; see `svdtune.models.load`."""

    name: str = Field(min_length=1, description="Hub name, local folder, .gguf file, or smollm2-135m.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Dtype of the base weights.")
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2, ...")
    revision: str | None = Field(None, description="Revision on the hub.")
    trust_remote_code: bool = Field(False, description="Allow code from the model's repository.")
    chat_template: str | None = Field(None, description="A Jinja file in place of the tokenizer's chat template.")
    end_token: str | None = Field(None, description="Make this the end token everywhere, where they disagree.")

    @property
    def origin(self) -> dict[str, Any]:
        """What goes with the name wherever a part of the model is opened."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class MethodSection(BaseModel):
    """The method and its own settings: those of its PEFT configuration class."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(description="sara, mosara, sorsa, any PEFT method (lora, ...), or full.")

    @property
    def options(self) -> dict[str, Any]:
        """The settings besides the name."""
        return dict(self.model_extra or {})


class Data(Section):
    """Data, and how rows become prompts and completions."""

    train: list[TrainSource] = Field(min_length=1, description="A source, or a list of several with weights.")
    eval: dict[str, DataSource] = Field(
        default_factory=dict,
        description="Held-out rows, for losses during training: a source, several by name, or a share such as 5%.",
    )
    prompt: str = Field("prompt", description="Field of the prompt, or a text with fields in braces.")
    completion: str | None = Field("completion", description="Likewise; null if prompts are messages with an answer.")
    answer: str | None = Field(None, description="Field of the reference answer, for evaluation.")
    template: str = Field("plain", description="plain, chat, a paper's prompt, or a text with {prompt}.")
    max_length: int = Field(1024, ge=2, description="Longest sequence in tokens.")
    loss_on: Literal["response", "all"] = Field("response", description="What is trained on.")
    overlong: Literal["error", "drop", "cut"] = Field(
        "error", description="What to do with rows longer than max_length; cut ends them without an end token."
    )
    allow_leaks: list[str] = Field(
        default_factory=list, description="Test sets whose questions may be trained on, by name, to repeat a result."
    )

    @field_validator("template")
    @classmethod
    def _has_prompt(cls, template: str) -> str:
        return check_template(template)

    @model_validator(mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """`eval: 5%` holds out that share of the training rows."""
        share = _percent(value.get("eval")) if isinstance(value, dict) else None
        if share is None:
            return value
        given = value.get("train")
        train = [one if isinstance(one, dict) else {"source": one} for one in _listed(given)]
        held_out = [{**{k: v for k, v in one.items() if k != "weight"}, "only": share} for one in train]
        named = {f"{at}-{Path(str(one.get('source'))).name}": one for at, one in enumerate(held_out, 1)}
        several = {re.sub(r"[^\w-]+", "_", name): one for name, one in named.items()}
        return {
            **value,
            "train": [{**one, "without": share} for one in train],
            "eval": several if len(train) > 1 else held_out[0],
        }

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return _listed(value)

    @field_serializer("train")
    def _train_as_written(self, value: list[TrainSource]) -> Any:
        """One source without a weight as a source, as before there were several."""
        plain = len(value) == 1 and value[0].weight == 1
        return value[0].plain.model_dump(mode="json") if plain else [one.model_dump(mode="json") for one in value]

    @field_validator("eval", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """One source has the empty name."""
        if isinstance(value, str) or (isinstance(value, dict) and "source" in value):
            return {"": value}
        for name in value or {} if isinstance(value, dict) else ():
            if not re.fullmatch(r"[\w-]+", str(name)):
                raise ValueError(f"expected names of letters, digits, - and _, which the log can carry; got {name!r}")
        return {} if value is None else value

    @field_serializer("eval")
    def _as_written(self, value: dict[str, DataSource]) -> Any:
        sources = {name: source.model_dump(mode="json") for name, source in value.items()}
        return sources.get("", sources) or None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | dict | DataSource) else value


def _percent(value: Any) -> float | None:
    """5% as 0.05, None where it is no such text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value) if isinstance(value, str) else None
    return float(found[1]) / 100 if found else None


class Training(Section):
    """The optimization. Batch sizes are per process; one optimizer step sees batch_size ×
    gradient_accumulation rows."""

    task: Literal["sft", "dpo", "kto", "reward", "grpo"] = Field(
        "sft", description="What is learned, and so which of TRL's trainers is used."
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the data; excludes max_steps. 1 by default.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; excludes epochs.")
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(gt=0, le=1e6, description="The largest of the schedule.")
    learning_rate_ratios: dict[str, float] = Field(
        default_factory=dict, description="By a part of parameters' names, what their learning_rate is multiplied by."
    )
    schedule: str = Field("cosine", description="cosine, linear, constant or any other that Transformers knows.")
    warmup: float = Field(0.0, ge=0, description="Share of all steps if below 1, else a number of steps.")
    optimizer: str = Field("adamw_torch", description="Name in transformers.training_args.OptimizerNames.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 does not clip.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all tokens.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Autocast; adapters stay as they are.")
    tf32: bool = Field(False, description="TF32 in float32 matrix products, where the GPU has it.")
    gradient_checkpointing: bool = False
    compile: bool | Literal["auto", "graph"] = Field(
        "auto", description="torch.compile the blocks; auto: where it pays; graph: and record them in CUDA graphs."
    )
    padding_free: bool | None = Field(
        None, description="Rows of a batch side by side; null: wherever the model keeps them apart."
    )
    packing: bool = Field(False, description="Sequences of data.max_length tokens made of several rows, as TRL packs.")
    liger: bool | None = Field(None, description="Liger's kernels; null: on a GPU, where they are installed.")
    group_by_length: bool = Field(False, description="Batches of similar length: less padding, other data order.")
    seed: int = Field(42, ge=0, lt=2**32)
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1, description="Loss on data.eval every so many steps; null: at the end.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after so many evaluations in a row that were not the best."
    )
    load_best_model_at_end: bool = Field(False, description="The result is the best checkpoint, not the last.")
    metric_for_best_model: str | None = Field(
        None, description="What is best: loss, or another that evaluation measures; NAME_loss of a named set."
    )
    save_steps: int | None = Field(500, ge=1, description="Checkpoint every so many steps; null: only on Ctrl-C.")
    keep_checkpoints: int = Field(1, ge=1, description="Older ones are deleted.")
    report_to: list[str] = Field(default_factory=list, description="Trackers, one or several: wandb, tensorboard, ...")
    rewards: list[str] = Field(
        default_factory=list, description="Of grpo: graders by name (number), or functions (package.module:function)."
    )
    trl: dict[str, Any] = Field(default_factory=dict, description="Any other setting of TRL's configuration.")

    @field_validator("report_to", "rewards", mode="before")
    @classmethod
    def _one_or_several(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, schedule: str) -> str:
        from transformers import SchedulerType

        names = [known.value for known in SchedulerType]
        if schedule not in names:
            raise ValueError(f"expected one of {', '.join(names)}; got {schedule!r}")
        return schedule

    @field_validator("compile", mode="before")
    @classmethod
    def _known_choice(cls, choice: Any) -> Any:
        if not isinstance(choice, bool) and choice not in ("auto", "graph"):
            raise ValueError(f"expected true, false, auto or graph; got {choice!r}")
        return choice

    @field_validator("learning_rate_ratios")
    @classmethod
    def _positive(cls, ratios: dict[str, float]) -> dict[str, float]:
        if wrong := {name: ratio for name, ratio in ratios.items() if not ratio > 0}:
            raise ValueError(f"expected numbers above 0; got {wrong}")
        return ratios

    @field_validator("warmup")
    @classmethod
    def _share_or_steps(cls, warmup: float) -> float:
        if warmup >= 1 and warmup != int(warmup):
            raise ValueError(f"expected a share below 1 or a whole number of steps; got {warmup}")
        return warmup


class Analysis(Section):
    """Samples of how far the weights have moved, taken while the run trains; see
    `svdtune.training.movement`."""

    samples: int = Field(20, ge=2, description="How many, spread evenly, the start and the end among them.")
    modules: list[str] | None = Field(None, description="Names or patterns of the layers; null: all adapted ones.")
    k: int | None = Field(
        None, ge=1, description="A sample of so many leading singular triplets; null: all, as the paper has it."
    )
    max_share: float | None = Field(0.1, gt=0, description="Of the run's time, beyond which samples are left out.")


class Output(Section):
    """The run folder."""

    dir: str = Field(min_length=1, description="In a recipe file, runs/ and the file's name by default.")


class Recipe(Section):
    """A whole recipe."""

    model: Model
    method: MethodSection
    data: Data
    training: Training
    evaluation: EvaluationSection | None = None
    analysis: Analysis | None = None
    output: Output

    @model_validator(mode="before")
    @classmethod
    def _bare_model(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            return {**value, "model": {"name": value["model"]}}
        return value


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, begun: bool = False) -> Recipe:
    """Read a recipe file, apply command-line overrides, check everything.

    Args:
        path: the YAML file, or the name of one that comes with svdtune, such as "small". `extends`
            in it names another, or several, whose settings it changes (see
            `svdtune.training.collection`).
        overrides: command-line words, "--method.r", "64" or "--method.r=64"; values are YAML.
            "--method" replaces a whole section: `--method '{name: sara, threshold: 0.02}'`.
        begun: whether it is that of a run to resume, as for `check_recipe`.

    Raises:
        SvdtuneError: if the file cannot be read, or with all of the recipe's problems.
    """
    path = find_file(path, "recipe")
    settings = read_extended(path)
    settings.setdefault("output", {"dir": f"runs/{path.stem}"})
    changes = dict(parse_overrides(overrides))
    override(settings, changes)
    return check_recipe(settings, str(path), begun=begun, typed=changes)


def check_recipe(
    settings: dict[str, Any], source: str = "the recipe", *, begun: bool = False, typed: Collection[str] = ()
) -> Recipe:
    """Make a `Recipe` of plain settings.

    Args:
        settings: by section.
        source: what to call it in an error.
        begun: whether it is that of a run that was begun, perhaps with svdtune 0.1, so that
            settings which are refused now are taken as what they have become; a warning says so.
        typed: the dotted paths that the command line set, whose problems are its own.

    A number in quotes is read as the number where no text would do; a warning says so.

    Raises:
        SvdtuneError: with all problems, the method's own settings included.
    """
    from svdtune.training.method import FULL, class_of_method, method_problems, section_as_stored, start_problems
    from svdtune.training.problems import without_quotes
    from svdtune.training.trl_settings import trl_problems

    problems: list[Problem] = []
    recipe = None
    method = settings.get("method")
    if begun and isinstance(method, dict):
        method = section_as_stored(str(method.get("name")), method)
        settings = {**settings, "method": method}
    named = str(method.get("name")) if isinstance(method, dict) else FULL
    settings = without_quotes(settings, Recipe, None if named == FULL else class_of_method(named))
    method = settings.get("method")
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        problems += from_pydantic(error, Recipe)
    if isinstance(method, dict) and isinstance(method.get("name"), str):
        problems += method_problems(method["name"], {key: v for key, v in method.items() if key != "name"})
        problems += () if begun else start_problems(method)
    problems += exclusions(settings, begun=begun)
    if recipe is not None:
        problems += trl_problems(recipe.training.task, recipe.training.trl, begun=begun)
    refuse(problems, source, typed)
    assert recipe is not None
    return recipe


def recipe_of(given: Any, overrides: Mapping[str, Any] | None = None, *, begun: bool = False) -> Recipe:
    """A checked recipe.

    Args:
        given: a YAML file or the name of one that comes with svdtune, its sections, or one that was
            read.
        overrides: by dotted path, as in {"method.r": 64}.
        begun: whether it is that of a run to resume, as for `check_recipe`.

    Raises:
        SvdtuneError: it is no recipe, or with all of its problems.
    """
    changes = _plain(overrides or {})
    if isinstance(given, str | Path):
        return load_recipe(given, [f"--{name}={json.dumps(value)}" for name, value in changes.items()], begun=begun)
    if isinstance(given, Recipe):
        if not changes:
            return given
        given = given.model_dump(mode="json", exclude_unset=True)
    if not isinstance(given, Mapping):
        raise SvdtuneError(
            f"a recipe is a YAML file, its sections as a dict, or what load_recipe read; got a {type(given).__name__}"
        )
    settings = _plain(given)
    override(settings, changes)
    return check_recipe(settings, begun=begun)


def _plain(value: Any) -> Any:
    """A copy of some settings in the types of a YAML file: paths as text, tuples and sets as
    lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(inner) for inner in value)
    return str(value) if isinstance(value, Path) else value


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    return write_yaml(recipe.model_dump(mode="json"))


_OPTION = re.compile(r"--[a-zA-Z][\w.-]*(=.*)?", re.DOTALL)


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of each override on a command line.

    Raises:
        SvdtuneError: if a word is no option, or an option has no value.
    """
    queue = list(words)
    while queue:
        option = queue.pop(0)
        if not option.startswith("--") or len(option) < 3:
            raise SvdtuneError(
                f"{option!r} is not an override: expected --SECTION.SETTING VALUE, such as --method.r 64"
            )
        dotted, given, value = option[2:].partition("=")
        if not given:
            if not queue or _OPTION.fullmatch(queue[0]):
                known = dotted.partition(".")[0] in Recipe.model_fields
                other = "" if known else f", where {', '.join(Recipe.model_fields)} are a recipe's sections"
                raise SvdtuneError(
                    f"--{dotted} has no value: expected --{dotted if known else 'SECTION.SETTING'} VALUE{other}; a value "
                    "that looks like an option goes behind ="
                )
            value = queue.pop(0)
        yield dotted, read_yaml(value, f"--{dotted}")
