"""Callbacks alone: a real signal stops after the step, and progress shows the time left."""

import os
import signal
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl

from svdtune import progress as shown
from svdtune.progress import counting
from svdtune.training.callbacks import ShowProgress, StopOnInterrupt


def test_the_first_interrupt_asks_for_a_checkpoint_and_the_second_interrupts() -> None:
    with StopOnInterrupt() as stop:
        control = TrainerControl()
        stop.on_step_end(None, None, control)
        assert not control.should_training_stop
        os.kill(os.getpid(), signal.SIGINT)
        stop.on_step_end(None, None, control)
        assert control.should_training_stop
        assert control.should_save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnInterrupt() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.stopped
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=10, is_world_process_zero=True)


def test_lines_with_the_time_left_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1061.0])
    monkeypatch.setattr(shown, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    text = StringIO()
    progress = ShowProgress(Console(file=text, width=80), every=0.0)
    progress.on_train_begin(None, state(0), None)
    progress.on_log(None, state(5), None, logs={"loss": 0.5})
    progress.on_log(None, state(10), None, logs={"eval_loss": 0.5})
    progress.on_train_end(None, state(10), None)
    assert text.getvalue() == "step 5/10 · loss 0.5000 · 1:01 left\n"


def test_a_quiet_console_has_no_bar() -> None:
    text = StringIO()
    with counting("evaluating", Console(file=text, force_terminal=True, quiet=True)) as on_progress:
        on_progress(0, 2)
        on_progress(2, 2)
    assert text.getvalue() == ""


def test_few_lines_of_many_items_and_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, *(1000.0 + 3 * number for number in range(1, 11))])
    monkeypatch.setattr(shown, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    text = StringIO()
    with counting("evaluating", Console(file=text, width=80)) as on_progress:
        for done in range(11):
            on_progress(done + 10, 20)
    assert text.getvalue().splitlines() == [
        "evaluating 11/20 · 0:27 left",
        "evaluating 15/20 · 0:15 left",
        "evaluating 19/20 · 0:03 left",
        "evaluating 20/20 · 0:00 left",
    ]


@pytest.mark.parametrize("place", ["terminal", "jupyter"])
def test_a_bar_on_a_terminal_and_in_a_notebook(place: str) -> None:
    text = StringIO()
    progress = ShowProgress(Console(file=text, width=100, **{f"force_{place}": True}))
    progress.on_train_begin(None, state(0), None)
    progress.on_step_end(None, state(4), None)
    progress.on_log(None, state(4), None, logs={"loss": 0.25})
    progress.on_train_end(None, state(10), None)
    assert "4/10" in text.getvalue()
    assert "loss 0.2500" in text.getvalue()
