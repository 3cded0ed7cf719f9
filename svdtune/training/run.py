"""One run: recipe → model → adapter → data → Trainer → run folder.

Everything that can be refused is refused before the first step: the recipe, the folder, the end
token, the data.
"""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils.logging import disable_progress_bar

from svdtune import processes
from svdtune._version import __version__
from svdtune.data import Collator
from svdtune.data.preferences import token_counts
from svdtune.methods.files.card import add_section
from svdtune.methods.sites import sites
from svdtune.methods.sorsa.regularizer import SorsaRegularizer
from svdtune.models import LoadedModel
from svdtune.system import explain_write_errors, open_console
from svdtune.training.adalora import AllocateRanks
from svdtune.training.arguments import own_precision, total_steps
from svdtune.training.callbacks import JsonlLog, ShowProgress, StopOnInterrupt, StopWithoutProgress
from svdtune.training.collators import FilledRows, make_collator
from svdtune.training.compilation import compiled_blocks, compiles, launch_bound
from svdtune.training.cuda_graph import recorded_body
from svdtune.training.folder import (
    ADAPTER,
    FULL_MODEL,
    LOG,
    check_room,
    check_run,
    digest_of,
    start_run,
    take_up,
    write_summary,
)
from svdtune.training.health import WatchNumbers
from svdtune.training.lock import held
from svdtune.training.memory import explain_out_of_memory
from svdtune.training.method import FULL, adapt, with_steps
from svdtune.training.movement import SampleMovement
from svdtune.training.packing import PackingCollator
from svdtune.training.preparation import Prepared, prepare
from svdtune.training.preview import show_adapted, show_example, show_judged
from svdtune.training.provenance import training_section
from svdtune.training.recipe import Recipe, recipe_of
from svdtune.training.sharded_state import is_spread, saved_state
from svdtune.training.trl_settings import explained

if TYPE_CHECKING:
    from svdtune.training.trainer import RunTrainer

_GO_ON = "Start the run again with --resume: it goes on from its latest checkpoint"
# How long a process waits for another, which may be decomposing weights or writing a checkpoint.
_PATIENCE = datetime.timedelta(minutes=30)
_WRITING = "free or name another place (output.dir); what has a checkpoint goes on with --resume"


class Interrupted(KeyboardInterrupt):
    """The user stopped a run after a checkpoint was written; the message says how to go on."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: the run folder.
        adapter: the adapter's folder (the whole model's after full fine-tuning).
        summary: what `training.json` holds.
    """

    folder: Path
    adapter: Path
    summary: dict[str, Any]


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    final_loss: bool = True,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Train as a recipe says: a base model and data become a run folder with an adapter.

    Args:
        recipe: a YAML file, its sections as a dict, or one that was read. Paths in it may be
            `Path`s.
        overrides: settings by their dotted paths that go before the recipe's, as in
            {"method.r": 64, "output.dir": "runs/r64"}.
        resume: go on from the run folder's latest checkpoint; the losses continue as if it had not
            stopped.
        overwrite: delete an earlier run in the folder.
        final_loss: take the loss on `data.eval`, where there is one, when training has ended.
        console: where to print; standard error by default.
        callbacks: more callbacks for the Trainer.

    Returns:
        `folder`, the run; `adapter`, its folder (the whole model's after full fine-tuning);
        `summary`, what `training.json` holds: steps, mean loss in nats a token, parameters,
        seconds.

    Raises:
        SvdtuneError: the recipe, with all of its problems; the model, the data or the folder.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
    """
    recipe = recipe_of(recipe, overrides, begun=resume)
    main = processes.is_main()
    console = console or open_console(stderr=True, quiet=not main)
    if not main:
        disable_progress_bar()
    joined = processes.start(not torch.accelerator.is_available(), _PATIENCE)
    with explain_out_of_memory(recipe), processes.explain_loss(_GO_ON), own_precision(), ExitStack() as kept:

        def begin() -> Path | None:
            check_run(recipe, resume=resume, overwrite=overwrite)
            kept.enter_context(held(Path(recipe.output.dir), "train"))
            # another process may have ended there meanwhile
            return check_run(recipe, resume=resume, overwrite=overwrite)

        checkpoint = processes.from_main(processes.jointly(lambda: begin() if main else None))
        result = _train(recipe, checkpoint, console, callbacks, final_loss)
    if joined:
        processes.stop()
    return result


def _check_agreement(recipe: Recipe, prepared: Prepared) -> None:
    parameters = prepared.loaded.model.named_parameters()
    facts = {
        "the recipe": recipe.model_dump(mode="json"),
        "the training data": [prepared.train_rows[0], token_counts(prepared.train_rows)],
        "the base model": {name: [*p.shape, str(p.dtype)] for name, p in parameters},
    }
    processes.agree(facts, "Start every process with the same command, on the same files")


def _train(
    recipe: Recipe,
    checkpoint: Path | None,
    console: Console,
    callbacks: Sequence[TrainerCallback],
    final_loss: bool,
) -> RunResult:
    folder = Path(recipe.output.dir)
    prepared = processes.jointly(lambda: prepare(recipe, console))
    _check_agreement(recipe, prepared)
    loaded, train_rows = prepared.loaded, prepared.train_rows
    set_seed(recipe.training.seed)
    started = time.monotonic()
    _place(loaded.model, prepared.args)
    name, options = recipe.method.name, recipe.method.options
    steps = total_steps(recipe, len(train_rows))
    options = with_steps(name, options, steps)
    task = recipe.training.task
    model = processes.jointly(lambda: adapt(loaded.model, name, options, task, loaded.commit))
    init_seconds = time.monotonic() - started
    model.config.use_cache = False
    found = sites(model)
    show_adapted(console, found)
    (show_example if task == "sft" else show_judged)(console, prepared.example, loaded.tokenizer)
    attending = ExitStack()
    collator = None
    if task == "sft":
        collator = processes.jointly(lambda: make_collator(model, prepared, recipe, console, attending))
    watching = [*callbacks]
    compiled, recorded = compiles(recipe, steps), None
    if compiled:
        resumed = checkpoint is not None
        blocks = compiled_blocks(model, one_shape=recipe.training.packing, resumed=resumed)
        watching.append(attending.enter_context(blocks))
        if recipe.training.compile == "graph":
            recorded = attending.enter_context(recorded_body(model, resumed=resumed))
        how = "the model's blocks, and its body is recorded in two CUDA graphs" if recorded else "the model's blocks"
        console.print(f"compile   {how}, which the first steps wait for", highlight=False)
    if torch.cuda.is_available() and not compiled and task != "grpo":
        tokens = sum(token_counts(train_rows)) / len(train_rows)
        if advice := launch_bound(model, recipe.training.batch_size, tokens):
            console.print(f"advice    {advice}", highlight=False)
    if recipe.analysis is not None and processes.is_main():
        watching.append(SampleMovement(model, folder, **recipe.analysis.model_dump()))
    processes.jointly(lambda: check_room(recipe, model, found.count, steps) if processes.is_main() else None)
    _by_main(lambda: start_run(recipe) if checkpoint is None else take_up(checkpoint, console), folder)
    with attending, explain_write_errors(folder, _WRITING):
        trainer, outcome = _fit(model, checkpoint, prepared, collator, watching, console, recipe)
        if final_loss and prepared.eval_rows:
            with explained(recipe.training.trl):
                trainer.evaluate()
    if recorded is not None and recorded.aside:
        console.print(
            f"compile   {recorded.aside} passes differed from the recorded one, and ran as written", highlight=False
        )
    model.config.use_cache = True
    summary = {
        "svdtune": __version__,
        "method": recipe.method.name,
        "model": recipe.model.name,
        "commit": loaded.commit,
        "processes": processes.count(),
        "steps": trainer.state.global_step,
        "loss": _loss(trainer, outcome),
        "rows": len(train_rows),
        "adapted_modules": len(found),
        "trained_parameters": found.count.trained,
        "total_parameters": found.count.total,
        "init_seconds": round(init_seconds, 3),
        "train_seconds": round(outcome.metrics["train_runtime"], 3),
        "resumed_from": checkpoint.name if checkpoint else None,
    }
    result = folder / (FULL_MODEL if recipe.method.name == FULL else ADAPTER)
    state = saved_state(model) if is_spread(model) else None
    _by_main(lambda: _save(model, state, loaded, result, recipe, summary), folder)
    return RunResult(folder, result, summary)


def _by_main(write: Callable[[], None], folder: Path) -> None:
    """Have the main process write into the run folder; no process goes on before that is done, nor
    where it fails."""

    def work() -> None:
        with explain_write_errors(folder, _WRITING):
            write()

    processes.jointly(work if processes.is_main() else lambda: None)


def _place(model: Any, args: TrainingArguments) -> None:
    """Put a model that this process will hold whole where it trains, which is also where it is
    decomposed fastest."""
    whole = not processes.under_deepspeed() and not processes.under_fsdp()
    if torch.accelerator.is_available() and whole and not getattr(model, "is_quantized", False):
        model.to(args.device)


def _fit(
    model: Any,
    checkpoint: Path | None,
    prepared: Prepared,
    collator: PackingCollator | Collator | None,
    watching: list[TrainerCallback],
    console: Console,
    recipe: Recipe,
) -> tuple["RunTrainer", TrainOutput]:
    """Run the task's trainer to the end, or to where the user stops it."""
    from svdtune.training.tasks import make_trainer

    folder = Path(recipe.output.dir)
    patience = recipe.training.early_stopping_patience
    patient = [StopWithoutProgress(patience)] if patience else []
    fill = processes.count() > 1 and recipe.training.task == "sft"
    held_out = {name: FilledRows(rows) if fill else rows for name, rows in prepared.eval_rows.items()}
    with StopOnInterrupt() as stop, explained(recipe.training.trl):
        shown = ShowProgress(console)
        trainer = make_trainer(
            recipe.training.task,
            regularizer=SorsaRegularizer(),
            keep_checkpoints=recipe.training.keep_checkpoints,
            model=model,
            args=prepared.args,
            train_dataset=FilledRows(prepared.train_rows) if fill else prepared.train_rows,
            eval_dataset=held_out.get("", held_out) or None,
            learning_rate_ratios=recipe.training.learning_rate_ratios,
            data_collator=collator,
            processing_class=prepared.loaded.tokenizer,
            **prepared.more,
            callbacks=[JsonlLog(folder / LOG), AllocateRanks(), WatchNumbers(), *watching, *patient, shown, stop],
        )
        if recipe.analysis is not None and (trainer.is_fsdp2 or trainer.is_deepspeed_enabled):
            raise processes.everywhere(
                "analysis: samples of how far the weights have moved need them whole in one process; leave the section out "
                "under FSDP and DeepSpeed, and run `svdtune analyze` on the finished run"
            )
        trainer.remove_callback(PrinterCallback)
        if checkpoint is not None:
            trainer.load_before_sharding(str(checkpoint))
        try:
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            shown.progress.close()
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped after step {trainer.state.global_step}, with a checkpoint in {folder}")
    if any(callback.stopped for callback in patient):
        console.print(f"stopped   after step {trainer.state.global_step}: {patience} evaluations without a better one")
    if recipe.training.load_best_model_at_end and trainer.state.best_model_checkpoint:
        best = Path(trainer.state.best_model_checkpoint).name
        metric = trainer.args.metric_for_best_model
        console.print(f"best      {best}, with {metric} {trainer.state.best_metric:.4f}", highlight=False)
    return trainer, outcome


def _loss(trainer: "RunTrainer", outcome: TrainOutput) -> float:
    """The mean training loss; of the log where the run was resumed after its last step and took
    none."""
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    taken = trainer.state.global_step > (trainer.resumed_at or 0)
    return outcome.training_loss if taken or not logged else sum(logged) / len(logged)


def _save(
    model: Any, state: dict[str, Any] | None, loaded: LoadedModel, result: Path, recipe: Recipe, summary: dict[str, Any]
) -> None:
    """Write the result, and last the summary that says it is there. `state` holds the tensors of a
    model that is spread."""
    model.save_pretrained(result, **({} if state is None else {"state_dict": state}))
    loaded.tokenizer.save_pretrained(result)
    summary["saved_bytes"] = sum(path.stat().st_size for path in result.glob("*.safetensors"))
    summary["weights"] = digest_of(result)
    if recipe.method.name != FULL:
        add_section(result, "Training", training_section(recipe, summary))
    write_summary(result.parent, summary)
