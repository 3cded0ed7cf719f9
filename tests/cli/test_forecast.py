"""The forecast of a demo, with clocks that tell what the test says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svdtune.cli import demo
from svdtune.cli.forecast import Forecast, PassTimer, in_minutes, step_seconds
from svdtune.models import load


def test_what_is_left_goes_at_the_pace_of_what_is_finished() -> None:
    forecast = Forecast({"base": 40.0, "SORSA": 100.0, "SARA": 80.0})
    assert forecast.left == 220
    forecast.finish("base", 60)  # half as long again as expected
    assert forecast.left == 1.5 * 180
    forecast.finish("SORSA", 150)
    assert forecast.left == pytest.approx(1.5 * 80)
    forecast.finish("SARA", 10)
    assert forecast.left == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 minute"), (60, "1 minute"), (61, "2 minutes"), (299, "5 minutes"), (301, "6 minutes")],
)
def test_minutes_are_rounded_up(seconds: float, words: str) -> None:
    assert in_minutes(seconds) == words


def test_the_passes_of_a_generation_are_timed_and_told_once() -> None:
    clock = iter([10.0, 14.0, 14.5, 15.0, 17.0])
    told: list[tuple[float, float]] = []
    timer = PassTimer(3, lambda *seconds: told.append(seconds), clock.__next__)
    for _ in range(6):  # the clock has nothing for the last two: they are not timed
        timer()
    timer.finish()
    assert told == [(4.0, 1.0)]


@pytest.mark.parametrize(("passes", "expected"), [(0, []), (1, [(4.0, 0.0)]), (2, [(4.0, 0.5)])])
def test_answers_that_end_early_tell_what_there_was(passes: int, expected: list[tuple[float, float]]) -> None:
    clock = iter([10.0, 14.0, 14.5])
    told: list[tuple[float, float]] = []
    timer = PassTimer(8, lambda *seconds: told.append(seconds), clock.__next__)
    for _ in range(passes):
        timer()
    timer.finish()
    assert told == expected


def ticks(*seconds: float) -> Iterator[float]:
    """A clock's readings: two for each span of so many seconds."""
    now = 0.0
    for span in seconds:
        yield now
        now += span
        yield now


def test_a_training_step_is_taken_through_every_layer_and_the_second_one_counts(
    tiny_folder: Path, tmp_path: Path
) -> None:
    loaded = load(tiny_folder)
    size = demo.Size(steps=2, rows=3, items=3, max_new_tokens=4)
    recipe = demo.make_recipe(demo.METHODS[1], size, str(tiny_folder), tmp_path)
    seen: list[tuple[int, ...]] = []
    first = loaded.model.model.layers[0]
    first.register_full_backward_hook(lambda _, inputs, outputs: seen.append(tuple(outputs[0].shape)))
    assert step_seconds(loaded, recipe, ticks(7.0, 2.0).__next__) == 2
    assert len(seen) == 2
    assert seen[0][0] == 3
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert not loaded.model.get_input_embeddings()._forward_hooks
    assert torch.is_grad_enabled()


def test_the_demo_expects_what_its_first_steps_say() -> None:
    size = demo.Size(steps=10, rows=4, items=16, max_new_tokens=100)
    forecast = demo.expect(size, load=1.0, step=2.0, prompts=3.0, token=0.5, answer=20)
    assert forecast.expected["base"] == 1 + 2 * 2 + 3 + 100 * 0.5
    # ten steps, a score of twenty tokens, and five times the model
    assert forecast.expected["SORSA"] == 10 * 2 + 3 + 20 * 0.5 + 5
    assert list(forecast.expected) == ["base", "SORSA", "SARA", "Mo-SARA"]
