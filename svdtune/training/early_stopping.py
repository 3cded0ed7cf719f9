"""Early stopping that a resumed run takes up where it was: it counts in the log, which checkpoints
hold, and keeps nothing besides."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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

    Transformers' own callback counts in itself, and so forgets on resuming.
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
