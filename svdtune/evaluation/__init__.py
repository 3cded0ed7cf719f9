"""Score a model on held-out items: greedy decoding, a grader, and an accuracy with its interval."""

from svdtune.evaluation.interval import Interval, wilson_interval
from svdtune.evaluation.items import Item, to_items
from svdtune.evaluation.scoring import Evaluation, Score, evaluate
from svdtune.evaluation.tasks import Grade, Grades, Reference, Task, get_task, task_names

__all__ = [
    "Evaluation",
    "Grade",
    "Grades",
    "Interval",
    "Item",
    "Reference",
    "Score",
    "Task",
    "evaluate",
    "get_task",
    "task_names",
    "to_items",
    "wilson_interval",
]
