"""What `stop_loops` does to grades: nothing. The answers are SmolLM2-135M's, untrained, to
questions of `arithmetic`."""

import pytest

from svdtune.evaluation import get_task
from svdtune.evaluation.generation import is_loop

# How an answer begins, what it then says over and over, and the right answer.
ANSWERS = [
    (
        "On Friday Frank found 41 stamps. On Saturday 11, on Sunday 19, and on Sunday 19.\n\n",
        "There are 3 days in a week. So there are 3 x 7 = 18 days in a week.\n\n",
        "33",
    ),
    (
        "Aisha borrowed 10 marbles from Kenji on Friday and borrowed 10 marbles from Aisha on Sunday.\n",
        "The total number of marbles Kenji had is the sum of the marbles he borrowed from Aisha and the marbles he borrowed "
        "from Aisha.\n",
        "35",
    ),
    (
        "On Friday Nils found 31 candles and on Saturday 6. On Sunday Frank borrowed 8 of them.\n\nThere are 31 - 6 = 23 "
        "candles left.\n\n",
        "There are 10 - 1 = 10 candles that stayed with Frank.\n\n",
        "29",
    ),
    ("So, the answer is 50.\n", "#### 50\nThe answer is 50.\n", "29"),
]


def cut(text: str) -> str:
    """The text up to where decoding, which looks every 16 tokens, finds a loop; a token is a
    character here."""
    return text[: next(length for length in range(16, len(text), 16) if is_loop(list(text[:length].encode())))]


@pytest.mark.parametrize(("start", "cycle", "reference"), ANSWERS)
def test_an_answer_cut_in_a_loop_is_graded_as_at_any_length_limit(start: str, cycle: str, reference: str) -> None:
    text, grade = start + 8 * cycle, get_task("number").grade
    stopped = cut(text)
    assert len(start + 2 * cycle) < len(stopped) < len(start + 5 * cycle)
    # A limit inside a number would make another number of it.
    limits = [at for at in range(len(stopped), len(text)) if not text[at - 1 : at + 1].isdigit()]
    verdicts = {tuple(one.correct for one in grade(text[:limit], reference)) for limit in limits}
    assert verdicts == {tuple(one.correct for one in grade(stopped, reference))} == {(False, False)}


def test_a_right_answer_in_a_loop_stays_right() -> None:
    start, cycle, _ = ANSWERS[-1]
    strict, paper = get_task("number").grade(cut(start + 8 * cycle), "50")
    assert strict.correct
    assert paper.correct
