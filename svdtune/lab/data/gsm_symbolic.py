"""GSM-Symbolic problems made offline by `reasoning-gym`: grade-school word problems with a worked
answer.

The splits hold disjoint templates: of the 85 that the package calls sound, every fifth is held out.
Drawing both splits from all templates would let a model learn the wording of the test in training.
"""

from svdtune.errors import SvdtuneError
from svdtune.system import needs


def rows(split: str, size: int, seed: int = 0) -> list[dict[str, str]]:
    """Make `size` different problems of one split: dicts of question, solution (worked, ending
    "#### N") and answer.

    Raises:
        SvdtuneError: if the split is unknown, the package is missing, or there are not that many
            different problems.
    """
    if split not in ("train", "test"):
        raise SvdtuneError(f"the task 'gsm_symbolic' has no split {split!r}: expected train or test")
    with needs("the task 'gsm_symbolic' needs reasoning-gym", "demo"):
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic as source
    held_out = source.tasks_ok[::5]
    templates = held_out if split == "test" else [index for index in source.tasks_ok if index not in held_out]
    budget = 4 * size + 100  # a template has few variables, so some problems come up twice
    problems = source.GSMSymbolicDataset(source.GSMSymbolicDatasetConfig(seed=seed, size=budget))
    problems.task_indices = [templates[i % len(templates)] for i in range(budget)]
    made: dict[str, dict[str, str]] = {}
    for i in range(budget):
        if len(made) == size:
            break
        problem = problems[i]
        row = {
            "question": problem["question"],
            "solution": problem["metadata"]["answer_cot"],
            "answer": problem["answer"],
        }
        made.setdefault(row["question"], row)
    if len(made) < size:
        raise SvdtuneError(f"gsm_symbolic {split} gave only {len(made)} different problems of {size}; ask for fewer")
    return list(made.values())
