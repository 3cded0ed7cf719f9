"""Score a model on held-out items: batched decoding, graders in two modes, and scores with their
intervals."""

from svdtune.evaluation.engines import Engine, TransformersEngine
from svdtune.evaluation.generation import GREEDY, Decoding
from svdtune.evaluation.interval import Interval, Metric, pass_at_k, wilson_interval
from svdtune.evaluation.items import Item, to_items
from svdtune.evaluation.scores import Evaluation, Score, evaluate
from svdtune.evaluation.tasks import Grade, Grades, Reference, Task, get_task

__all__ = [
    "GREEDY",
    "Decoding",
    "Engine",
    "Evaluation",
    "Grade",
    "Grades",
    "Interval",
    "Item",
    "Metric",
    "Reference",
    "Score",
    "Task",
    "TransformersEngine",
    "evaluate",
    "get_task",
    "pass_at_k",
    "to_items",
    "wilson_interval",
]
