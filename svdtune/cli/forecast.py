"""How long a series of trainings and scorings will take on this machine, from its first steps."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdtune.models import LoadedModel
    from svdtune.training.recipe import Recipe

Clock = Callable[[], float]


class Forecast:
    """The seconds that the parts of some work are expected to take, and those that they took.

    Args:
        expected: seconds of each part, in their order.
    """

    def __init__(self, expected: Mapping[str, float]):
        self.expected = dict(expected)
        self.taken: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds of the parts that are not finished, at the pace of those that are."""
        finished = sum(self.expected[part] for part in self.taken)
        pace = sum(self.taken.values()) / finished if finished else 1.0
        return pace * sum(seconds for part, seconds in self.expected.items() if part not in self.taken)

    def finish(self, part: str, seconds: float) -> None:
        """Put down what a part took."""
        self.taken[part] = seconds


def in_minutes(seconds: float) -> str:
    """A time in whole minutes, rounded up, as a sentence takes it."""
    minutes = max(1, math.ceil(seconds / 60))
    return "1 minute" if minutes == 1 else f"{minutes} minutes"


def step_seconds(loaded: "LoadedModel", recipe: "Recipe", clock: Clock = time.monotonic) -> float:
    """Seconds of one training step of a recipe on its frozen base: its first batch, there and back,
    without an adapter.

    Nearly all of a step's work is the base's. Two are taken and the second counts, for the first
    one also fetches the memory.

    Args:
        loaded: the recipe's model; left without parameters that are trained.
        recipe: whose data and batch size are taken.
        clock: gives seconds.
    """
    from svdtune.data import Collator, encode_all, read_rows, to_examples

    data = recipe.data
    first = data.train[0].plain.model_copy(update={"limit": recipe.training.batch_size})
    examples = to_examples(read_rows(**first.model_dump()), data.prompt, data.completion)
    rows, _ = encode_all(examples, loaded.tokenizer, data.max_length, data.loss_on, data.template)
    batch = Collator(loaded.tokenizer.pad_token_id)(rows)
    batch = {name: tensor.to(loaded.model.device) for name, tensor in batch.items()}
    loaded.model.requires_grad_(False)
    # As an adapter in the first layer does, this has the gradient pass through every layer.
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    seconds = 0.0
    try:
        for _ in range(2):
            started = clock()
            loaded.model(**batch).loss.backward()
            seconds = clock() - started
    finally:
        hook.remove()
    return seconds


class PassTimer:
    """A forward hook of a model that generates: it times the pass over the prompts and those for a
    new token each.

    Args:
        count: how many passes for a new token it times.
        tell: called once, with the seconds of the pass over the prompts and of one for a new token.
        clock: gives seconds; the pass over the prompts counts from now.
    """

    def __init__(self, count: int, tell: Callable[[float, float], None], clock: Clock = time.monotonic):
        self.count, self.tell, self.clock = count, tell, clock
        self.ends = [clock()]
        self.told = False

    def __call__(self, *_: Any) -> None:
        if not self.told:
            self.ends.append(self.clock())
            if len(self.ends) == self.count + 2:
                self.finish()

    def finish(self) -> None:
        """Tell, if not yet, by the passes there were: all answers may have ended before."""
        if not self.told and len(self.ends) > 1:
            self.told = True
            started, prompts, *tokens = self.ends
            self.tell(prompts - started, (tokens[-1] - prompts) / len(tokens) if tokens else 0.0)
