"""Trainer callbacks of a run: the local log, progress with the time left, a stop that can be
resumed, and early stopping."""

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svdtune import processes
from svdtune.progress import Progress
from svdtune.training.checkpoints import keep_steps

# What a line of the log holds first, where known; behind it, what a task's trainer measures.
LOGGED = ("loss", "eval_loss", "grad_norm", "learning_rate", "l_reg", "tokens_per_second")
# Of Trainer's logs: what the log says otherwise, and times, which no two runs share.
_NOT_LOGGED = re.compile(r"(eval_)?(epoch|step|step_time|num_.*|total_flos|(.*_)?runtime|.*_per_second|.*_flos)")


class JsonlLog(TrainerCallback):
    """Appends a line to `train_log.jsonl` for each of Trainer's logs: step, epoch, `LOGGED`, and
    what the task's trainer measures (rewards, accuracy).

    On a resumed run, lines after the checkpoint are dropped first: those steps are taken again.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            keep_steps(self.path, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        logs = logs or {}
        measured = [key for key in logs if key not in LOGGED and is_measured(key)]
        record = {key: logs[key] for key in (*LOGGED, *measured) if key in logs}
        if state.is_world_process_zero and any(key == "loss" or key.startswith("eval_") for key in record):
            line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **record}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def is_measured(name: str) -> bool:
    """Whether what Trainer logs by a name is a measurement of the run, and no time or count."""
    return not _NOT_LOGGED.fullmatch(name)


class ShowProgress(TrainerCallback):
    """Steps and the loss as `Progress` shows them."""

    def __init__(self, console: Console, every: float = 10.0):
        self.progress = Progress("step", console, every)
        self.note = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress.bar is not None:
            self._show(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" in (logs or {}):
            self.note = f"loss {float(logs['loss']):.4f}"
            self._show(state)

    def _show(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.progress.show(state.global_step, state.max_steps, self.note)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.close()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the current step, with a checkpoint; a second one ends
    it at once.

    SIGTERM, which schedulers send some time before they kill, counts as Ctrl-C. Of several
    processes, which hear of it at different moments, all stop after the same step: each tells the
    others at the end of every step, and reads what it was told at the end of the next, so that
    nobody waits.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}
        self._asked: processes.Question | None = None

    def __enter__(self) -> "StopOnInterrupt":
        if threading.current_thread() is threading.main_thread():
            # What the process was started to ignore, as under nohup or in a script's background, it
            # goes on ignoring.
            heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _on_signal(self, *_: Any) -> None:
        self.stopped = True
        self._restore()
        if processes.is_main():
            # print is not safe in a handler
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stop = self.stopped
        if processes.count() > 1:
            asked, self._asked = self._asked, processes.Question(self.stopped)
            stop = asked is not None and asked.answer()
            self.stopped |= stop
        if stop:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._asked is not None:
            self._asked.answer()
            self._asked = None


def without_progress(state: TrainerState, metric: str, greater_is_better: bool) -> int:
    """How many evaluations there were since the one with the best value of a metric.

    Args:
        state: whose log is looked at.
        metric: as evaluations log it, such as eval_loss.
        greater_is_better: whether the best value is the largest. NaN is never best.
    """
    values = [line[metric] if greater_is_better else -line[metric] for line in state.log_history if metric in line]
    best, since = float("-inf"), 0
    for value in values:
        best, since = (value, 0) if value > best else (best, since + 1)
    return since


class StopWithoutProgress(TrainerCallback):
    """Ends training after `patience` evaluations in a row that were no better than the best before
    them.

    It counts in the log, which checkpoints hold; Transformers' own counts in itself, and so forgets
    on resuming.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.stopped = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._look(args, state, control)  # it may have been killed while it was stopping

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._look(args, state, control)

    def _look(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        name = "eval_" + str(args.metric_for_best_model).removeprefix("eval_")
        if without_progress(state, name, bool(args.greater_is_better)) >= self.patience:
            self.stopped = control.should_training_stop = True
