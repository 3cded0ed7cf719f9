"""The papers' tasks, one file each; importing it makes them known by name."""

from svdtune.evaluation.tasks import TASKS
from svdtune.lab.tasks.e2e import E2E, E2E_BLEU
from svdtune.lab.tasks.gsm8k import GSM8K
from svdtune.lab.tasks.humaneval import HUMANEVAL
from svdtune.lab.tasks.math import MATH

for task in (GSM8K, MATH, HUMANEVAL, E2E, E2E_BLEU):
    TASKS.add(task.name, task)
