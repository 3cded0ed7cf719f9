"""What each method trains and keeps at a rank: one table over the formulas in the methods' own math.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from svdtune.errors import SvdtuneError
from svdtune.methods.mosara import math as mosara
from svdtune.methods.mosara.gates import GATES
from svdtune.methods.sara import math as sara
from svdtune.methods.sorsa import math as sorsa

Count = Callable[[int, int, int], int]  # (rank, in_features, out_features) → parameters of one layer


@dataclass(frozen=True)
class Method:
    """How many parameters a method costs in a layer, by its rank and shape.

    Attributes:
        name: as in a recipe's `method` section.
        trained: parameters that get gradients.
        frozen: parameters that the adapter adds without training them: Mo-SARA's singular vectors, SORSA's start.
    """

    name: str
    trained: Count
    frozen: Count


def method(name: str, *, num_heads: int = 5, gate: str = "softmax") -> Method:
    """A method by name: sara, mosara, sorsa or lora.

    Args:
        name: the method.
        num_heads: Mo-SARA's heads m.
        gate: Mo-SARA's gate; without one there is no router to train.

    Raises:
        SvdtuneError: an unknown name, or gate.
    """
    if gate not in GATES:
        raise SvdtuneError(f"unknown gate {gate!r}; expected one of {', '.join(GATES)}")
    none: Count = lambda *_: 0  # noqa: E731
    factors: Count = lambda r, i, o: r * (i + o)  # noqa: E731
    known = {
        "sara": Method("sara", sara.trainable_parameters, none),
        "mosara": Method("mosara", partial(mosara.trainable_parameters, num_heads=num_heads, gate=gate), factors),
        "sorsa": Method("sorsa", sorsa.trainable_parameters, factors),
        "lora": Method("lora", factors, none),
    }
    key = name.lower().replace("-", "").replace("_", "")
    if key not in known:
        raise SvdtuneError(f"unknown method {name!r}; expected one of {', '.join(known)}")
    return known[key]
