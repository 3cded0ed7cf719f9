"""The run folder: what lies in it, and when a run may start, go on or replace another.

RUN/recipe.yaml      the resolved recipe, every default written out
RUN/train_log.jsonl  one line a logging step
RUN/checkpoint-N/    to resume from
RUN/adapter/         the result (RUN/model/ for full fine-tuning)
RUN/training.json    the run in numbers; its presence says that the run is finished
RUN/analysis/        samples of the weights' movement, and what `svdtune analyze` finds
RUN/evaluations/     predictions and results of `svdtune evaluate`
RUN/report.html      the page of `svdtune report`
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from torch import nn

from svdtune import processes
from svdtune.data.catalogue import CATALOGUE, GROUPS
from svdtune.data.readers import GENERATORS
from svdtune.errors import SvdtuneError
from svdtune.methods.files.integrity import file_digest
from svdtune.methods.sites import Count
from svdtune.models import SMOLLM2
from svdtune.planning.memory import MOMENTS
from svdtune.system import check_free, read_json, replace_text
from svdtune.training.checkpoints import WrittenBy, keep_up_to, latest_checkpoint, step_of, written_by
from svdtune.training.lock import is_empty
from svdtune.training.recipe import Recipe, check_recipe, dump_recipe
from svdtune.training.sections import DataSource
from svdtune.training.yaml_files import read_text, read_yaml

RECIPE, LOG, SUMMARY, REPORT = "recipe.yaml", "train_log.jsonl", "training.json", "report.html"
ADAPTER, FULL_MODEL, ANALYSIS, EVALUATIONS = "adapter", "model", "analysis", "evaluations"
# Settings that do not change what is computed, and may differ when a run goes on.
_FREE = {"logging_steps", "save_steps", "keep_checkpoints", "report_to", "eval_steps"}
# Settings whose product with the number of processes must stay.
_BATCH = {"batch_size", "gradient_accumulation"}


def check_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path | None:
    """Check that a run may start in its folder, touching nothing; return the checkpoint to go on
    from, if any.

    Raises:
        SvdtuneError: if the folder holds another run and neither flag says what to do, if there is
            nothing to resume, if the recipe to resume is another one, or if the folder is not a
            run's.
    """
    folder = Path(recipe.output.dir)
    if resume and overwrite:
        raise SvdtuneError("--resume continues the run and --overwrite deletes it; give one of them")
    if folder.exists() and not folder.is_dir():
        raise SvdtuneError(f"{folder} exists and is not a folder; set output.dir to another one")
    checkpoint, skipped = latest_checkpoint(folder)
    finished = (folder / SUMMARY).is_file()
    if resume:
        if finished:
            raise SvdtuneError(f"the run {folder} is finished; there is nothing to resume")
        if checkpoint is None:
            why = "".join(f" ({reason})" for reason in skipped)
            anew = "with --overwrite instead of --resume" if (folder / RECIPE).is_file() else "without --resume"
            raise SvdtuneError(f"there is no checkpoint in {folder} to resume from{why}; start {anew}")
        _check_same(folder, recipe)
        by = written_by(checkpoint) or WrittenBy(1, _rows_a_step(read_run(folder), 1))
        _check_same_rows(recipe, by)
        _check_same_engine(checkpoint, by)
        return checkpoint
    if folder.is_dir() and not is_empty(folder):
        if not (folder / RECIPE).is_file():
            raise SvdtuneError(f"{folder} is not empty and not a run of svdtune; set output.dir to another folder")
        if not overwrite:
            state = "a finished run" if finished else "an unfinished run"
            go_on = "--resume to continue it, " if checkpoint and not finished else ""
            raise SvdtuneError(f"{folder} holds {state}: give {go_on}--overwrite to delete it, or another output.dir")
    return None


def start_run(recipe: Recipe) -> None:
    """Make the folder of a checked, fresh run: delete an earlier run's files, write the resolved
    recipe."""
    folder = Path(recipe.output.dir)
    for path in [*folder.glob("checkpoint-*"), folder / ADAPTER, folder / FULL_MODEL]:
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder / ANALYSIS, folder / EVALUATIONS):  # of weights that are going
        shutil.rmtree(path, ignore_errors=True)
    for name in (SUMMARY, LOG, REPORT):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / RECIPE, dump_recipe(from_anywhere(recipe)))


def take_up(checkpoint: Path, console: Console) -> None:
    """Say which later checkpoints cannot be used, and delete them."""
    _, skipped = latest_checkpoint(checkpoint.parent)
    for reason in skipped:
        console.print(f"resume    {reason}; going on from {checkpoint.name}", highlight=False)
    keep_up_to(checkpoint.parent, step_of(checkpoint))


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `training.json` in one step: it says that everything else is there."""
    replace_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def digest_of(result: Path) -> str:
    """64 hex digits that name the weights of a run's result."""
    files = sorted(result.glob("*.safetensors"))
    return hashlib.sha256("".join(file_digest(path) for path in files).encode()).hexdigest()


def trained_weights(folder: Path) -> str | None:
    """`digest_of` a finished run's result, as its summary has it; None of one that says nothing."""
    path = folder / SUMMARY
    found = read_json(path).get("weights") if path.is_file() else None
    return found if isinstance(found, str) else None


def read_run(folder: Path) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        SvdtuneError: if the folder is no run.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise SvdtuneError(f"{folder} is not a run of svdtune: it has no {RECIPE}")
    settings = read_yaml(read_text(path), str(path))
    with warnings.catch_warnings():
        # the adapter's own configuration says it
        warnings.filterwarnings("ignore", "SORSA's layout='residual'")
        return check_recipe(settings, str(path), begun=True)


def _check_same(folder: Path, recipe: Recipe) -> None:
    before, now = (_flat(from_anywhere(r).model_dump(mode="json")) for r in (read_run(folder), recipe))
    choosing = recipe.training.early_stopping_patience or recipe.training.load_best_model_at_end
    free = _BATCH | _FREE - ({"eval_steps", "save_steps"} if choosing else set())
    changed = [
        f"{path} was {before.get(path)!r}, is {now.get(path)!r}"
        for path in sorted(before | now)
        if before.get(path) != now.get(path)
        and path.rpartition(".")[2] not in free
        and path != "output.dir"
        and not path.startswith("analysis")
    ]
    if changed:
        raise SvdtuneError(
            f"the run {folder} was started with another recipe ({'; '.join(changed)}); resume with the same settings"
        )


def _check_same_rows(recipe: Recipe, by: WrittenBy) -> None:
    """Other processes may go on, each with other rows, if together they take the rows that a step
    had."""
    t, there = recipe.training, processes.count()
    if by.rows != (rows := _rows_a_step(recipe, there)):
        raise SvdtuneError(
            f"the run {recipe.output.dir} took {by.rows} rows of data a step, and would take {rows}: {t.batch_size} a batch × "
            f"{t.gradient_accumulation} accumulated × {there} processes. Set training.batch_size and "
            f"training.gradient_accumulation so that it is {by.rows}"
        )


def _rows_a_step(recipe: Recipe, count: int) -> int:
    return recipe.training.batch_size * recipe.training.gradient_accumulation * count


def _check_same_engine(checkpoint: Path, by: WrittenBy) -> None:
    """DeepSpeed writes the optimizer's state in files of its own, one for each process."""
    by_deepspeed, now = any(checkpoint.glob("global_step*")), processes.under_deepspeed()
    there = processes.count()
    if by_deepspeed != now or (now and by.processes != there):
        how = f"under DeepSpeed by {by.processes} processes" if by_deepspeed else "without DeepSpeed"
        raise SvdtuneError(
            f"{checkpoint} was written {how}, and {there} processes {'under' if now else 'without'} DeepSpeed are to go on, "
            "who cannot read the optimizer's state in it. Start the run as it was started before"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


Source = TypeVar("Source", bound=DataSource)


def from_anywhere(recipe: Recipe) -> Recipe:
    """The recipe that works from anywhere, with absolute paths to its model, chat template and
    rows, where they are there; all other names stay."""
    model = recipe.model.model_copy(
        update={
            "name": _absolute(recipe.model.name),
            "chat_template": recipe.model.chat_template and _absolute(recipe.model.chat_template),
        }
    )
    data = recipe.data.model_copy(
        update={
            "train": [_settled(source) for source in recipe.data.train],
            "eval": {name: _settled(source) for name, source in recipe.data.eval.items()},
            "allow_leaks": [_absolute(name) for name in recipe.data.allow_leaks],
        }
    )
    evaluation = recipe.evaluation and recipe.evaluation.model_copy(
        update={"data": [_settled(source) for source in recipe.evaluation.data]}
    )
    return recipe.model_copy(update={"model": model, "data": data, "evaluation": evaluation})


def _settled(source: Source) -> Source:
    return source.model_copy(update={"source": _absolute(source.source)})


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    # a generator, a data set or the embedded model goes before a path of its name
    own = name in GENERATORS or name in CATALOGUE or name in GROUPS or name == SMOLLM2
    return str(path.absolute()) if path.exists() and not own else name


def check_room(recipe: Recipe, model: nn.Module, count: Count, steps: int) -> None:
    """Refuse a run whose result and checkpoints the disk has no room for, before it trains: their
    sizes are known by then.

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
