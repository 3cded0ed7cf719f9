"""One run of a study, in a process of its own: train, score, and write the record that says that it
is done.

`python -m svdtune.lab.study.worker JOB.json`. The process ends itself when its standard input
closes: a runner that is killed leaves no run behind that a second runner would meet.
"""

import errno
import gc
import json
import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from transformers import TrainerCallback

from svdtune.data import read_rows, to_examples
from svdtune.data.examples import COMPLETION, PROMPT
from svdtune.data.leaks import Questions, leaks, questions
from svdtune.errors import SvdtuneError
from svdtune.evaluation import Evaluation, TransformersEngine
from svdtune.evaluation.questions import BatchedEngine, ask, decoding_of, output_folder, prepare, sets_to_ask
from svdtune.export.source import Source, find_source, open_source
from svdtune.lab.study.measurement import MeasurementCallback
from svdtune.lab.study.records import NO_ROOM, Place, record_of, scores_of, write_record
from svdtune.lab.study.spec import Measure
from svdtune.models import LoadedModel
from svdtune.system import errno_of, is_out_of_memory, open_console, replace_text
from svdtune.training import Interrupted, Recipe, check_recipe, train
from svdtune.training.checkpoints import latest_checkpoint
from svdtune.training.folder import ADAPTER, FULL_MODEL, RECIPE, SUMMARY, from_anywhere, read_run
from svdtune.training.preparation import load_base
from svdtune.training.sections import DataSource


class LeaveMemory(TrainerCallback):
    """Hands memory that batches of long rows took back to the GPU, for the runs beside this one.

    PyTorch keeps what it has taken once, and rows grouped by length come longest first. It waits
    for the device, so not at every step.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available() and (state.global_step < 4 or state.global_step % 16 == 0):
            torch.cuda.empty_cache()


def main(path: Path) -> int:
    """Make the run of a job file; the exit status is 0 where a record was written, of a failed run
    too, and NO_ROOM where the disk is full: then there is none, and the next start goes on."""
    job = json.loads(path.read_text(encoding="utf-8"))
    place = Place(**{name: Path(folder) for name, folder in job.pop("place").items()})
    threading.Thread(target=_end_with_runner, daemon=True).start()
    try:
        place.run.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.run.parent / f".{place.run.name}.lock"):  # until a process of a killed runner is gone
            return _run(job, place)
    except Exception as error:
        if not lacks_room(error):
            raise
        traceback.print_exc()
        return NO_ROOM


def _run(job: dict[str, Any], place: Place) -> int:
    started = time.monotonic()
    try:
        recipe = check_recipe({**_with_heldout(job, place), "output": {"dir": str(place.run)}}, job["name"])
        measure = job["measure"] and Measure.model_validate(job["measure"])
        if not job["untrained"]:
            watching: list[TrainerCallback] = [LeaveMemory()] if job["shared"] else []
            _train(
                recipe, place.run, [*watching, *([MeasurementCallback(recipe, measure, place.run)] if measure else [])]
            )
        elif measure:
            _measure_base(recipe, measure, place.run)
        record = record_of(job, place.run, {})
        # Weights that are no numbers answer nothing.
        if record["status"] == "finished" and recipe.evaluation is not None and job["generate"]:
            record["scores"] = _score(recipe, place.run, job)
    except (KeyboardInterrupt, Interrupted):
        return 130  # no record: the next start goes on
    except Exception as error:
        if lacks_room(error):
            raise
        traceback.print_exc()
        name = "out of memory" if is_out_of_memory(error) else type(error).__name__
        sentence = str(error) if isinstance(error, SvdtuneError) else f"{name}: {error}"
        record = record_of(job, place.run, {}, sentence[:500])
    write_record(place.record, record | {"seconds": round(time.monotonic() - started, 1)})
    # Not those of a failed run: it may be made again, and perhaps only its scores are missing.
    if job["drop_weights"] and record["status"] != "failed":
        for folder in (*place.run.glob("checkpoint-*"), place.run / ADAPTER, place.run / FULL_MODEL):
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def lacks_room(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind an error; of a write by `torch.save` only that it did
    not end is known."""
    while isinstance(error, Exception):
        if errno_of(error) in (errno.ENOSPC, errno.EDQUOT) or "writing stopped half-way" in str(error):
            return True
        error = error.__cause__
    return False


def _train(recipe: Recipe, run: Path, callbacks: list[TrainerCallback]) -> None:
    """Train, or go on training, or find that it was done and the weights are still there."""
    finished = (run / SUMMARY).is_file()
    if finished and any((run / weights).is_dir() for weights in (ADAPTER, FULL_MODEL)):
        return
    shutil.rmtree(run / "evaluations", ignore_errors=True)  # of weights that were dropped
    # Only a checkpoint of this very recipe: held-out rows may have come to lie elsewhere since.
    resume = not finished and latest_checkpoint(run)[0] is not None and read_run(run) == from_anywhere(recipe)
    overwrite = not resume and (run / RECIPE).is_file()
    train(recipe, resume=resume, overwrite=overwrite, console=open_console(stderr=True), callbacks=callbacks)


def _measure_base(recipe: Recipe, measure: Measure, run: Path) -> None:
    """Measure the base model as it is."""
    loaded = load_base(recipe, chat=False)
    callback = MeasurementCallback(recipe, measure, run)
    callback.prepare(loaded.tokenizer)
    model: Any = loaded.model
    callback.take(model.to("cuda" if torch.cuda.is_available() else "cpu"), 0)


def _score(recipe: Recipe, run: Path, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of every set of the recipe's evaluation section, as a record has them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the training
    found = Source(recipe.model.name, None, run, recipe) if job["untrained"] else find_source(run)
    loaded = open_source(found, **({"device": "cuda"} if torch.cuda.is_available() else {}))
    sets = [prepare(recipe, name) for name in sets_to_ask(recipe, None, None)]
    engine = BatchedEngine(TransformersEngine(to_answer(loaded, recipe)), sets, job["eval_batch_size"])
    scores: dict[str, Evaluation] = {}
    for asked in sets:
        folder = output_folder(run, found.base, asked.rows.source, asked.form.task)
        scores[asked.rows.source] = ask(engine, asked, folder, job["eval_batch_size"], decoding_of(recipe))
    return {name: scores_of(score) for name, score in scores.items()}


def to_answer(loaded: LoadedModel, recipe: Recipe) -> LoadedModel:
    """The model in the dtype of the recipe's evaluation section, float32 where it names none, its
    adapter merged into the weights where its method can be: as exact, and faster.

    The weights become float32 first, so nothing that was trained is rounded before it is merged.
    """
    model = loaded.model.float()
    if isinstance(model, PeftModel) and not model.active_peft_config.is_prompt_learning:
        # Methods that cannot be merged say so before they change a weight.
        with suppress(NotImplementedError, SvdtuneError):
            model = model.merge_and_unload()
    dtype = recipe.evaluation.dtype if recipe.evaluation is not None else None
    return LoadedModel(model.to(getattr(torch, dtype or "float32")), loaded.tokenizer, loaded.name)


def _with_heldout(job: dict[str, Any], place: Place) -> dict[str, Any]:
    """The recipe's settings, with a share of its training rows as data.eval where the search needs
    one.

    A held-out row whose question is among the others too, in whatever spelling, is left out of
    both.
    """
    recipe = job["recipe"]
    if job["heldout"] is None:
        return recipe
    share, seed = job["heldout"]
    data = recipe["data"]
    if isinstance(data["train"], list):
        raise SvdtuneError(
            "data.train has several sources, and the search for learning rates holds rows out of one: name rows of their "
            "own in data.eval"
        )
    source = DataSource.model_validate(data["train"])
    sft = recipe["training"].get("task", "sft") == "sft"
    rows = read_rows(**source.model_dump())
    form = (data.get("prompt", PROMPT), data.get("completion", COMPLETION) if sft else None)
    asked = [questions(one.prompt, one.completion)[0] for one in to_examples(rows, *form, source=source.source)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(share * len(rows)))
    places = sorted(order[:count]), sorted(order[count:])
    held, others = (Questions.of([asked[i] for i in part]) for part in places)
    leaked = {at for at, _ in leaks(held, others)}
    out = [rows[i] for at, i in enumerate(places[0]) if at not in leaked]
    kept = [rows[i] for i in places[1]]
    if not out or not kept:
        raise SvdtuneError(
            f"{source.source} has {len(rows)} rows, too few to hold a share of {share:g} out (tune.share)"
        )
    files = {}
    for name, called, part in (("train", "train", kept), ("eval", "heldout", out)):
        path = place.data.with_name(f"{place.data.name}-{called}.jsonl")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "".join(json.dumps(row) + "\n" for row in part))
        files[name] = {"source": str(path)}
    return {**recipe, "data": {**data, **files}}


def _end_with_runner() -> None:
    while os.read(0, 1):  # of sys.stdin Python would want the lock back at the end, and abort
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
