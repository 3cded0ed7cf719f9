"""A share of rows: what it holds depends on the rows alone, and no question is on both sides."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from runs import go, log_of
from svdtune.data import read_rows
from svdtune.data.shares import in_share
from svdtune.errors import SvdtuneError
from svdtune.evaluation.questions import held_out
from svdtune.training.recipe import check_recipe, dump_recipe, load_recipe

ASKED, SAID = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
MAKERS = {
    "prompt": lambda at: {"prompt": f"{at} + 1?", "completion": str(at + 1)},
    "chat": lambda at: {"messages": [ASKED, SAID, {"role": "user", "content": f"{at}?"}, SAID]},
    "alpaca": lambda at: {"instruction": "Add one.", "input": str(at), "output": str(at + 1)},
    "text": lambda at: {"text": f"line {at}"},
    "other": lambda at: {"question": f"{at}?", "result": at},
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9])
def test_both_sides_hold_all_rows_once_whatever_their_order(kind: str, share: float, tmp_path: Path) -> None:
    rows = [MAKERS[kind](at) for at in range(200)]
    drawn = in_share(rows, share, "rows")
    assert sum(drawn) == max(1, round(share * 200))
    order = random.Random(0).sample(range(200), 200)
    assert in_share([rows[at] for at in order], share, "rows") == [drawn[at] for at in order]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(path, only=share) == [row for row, one in zip(rows, drawn, strict=True) if one]
    assert read_rows(path, without=share) == [row for row, one in zip(rows, drawn, strict=True) if not one]


def test_rows_that_ask_the_same_are_together() -> None:
    rows = [
        {"prompt": f"What is {at // 4}?".upper() if at % 2 else f"what is  {at // 4}", "completion": str(at)}
        for at in range(80)
    ]
    drawn = in_share(rows, 0.3, "rows")
    assert all(drawn[at] == drawn[at - at % 4] for at in range(80))
    assert sum(drawn) == 4 * 6


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 5.0])
def test_what_is_no_share(share: float) -> None:
    with pytest.raises(SvdtuneError, match="is no share of rows; expected a number between 0 and 1"):
        in_share([{"text": "a"}, {"text": "b"}], share, "rows")


def test_a_share_that_leaves_nothing() -> None:
    with pytest.raises(SvdtuneError, match=r"is all that rows asks \(1 question\): nothing would be left"):
        in_share([{"text": "a"}] * 3, 0.1, "rows")


def settings(model: Path, data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "method": {"name": "lora", "r": 2},
        "data": {"train": str(data), "eval": "10%", "max_length": 256, **changes},
        "training": {"learning_rate": 1e-3, "max_steps": 1, "batch_size": 2, "logging_steps": 1},
        "output": {"dir": str(run)},
    }


def test_a_run_holds_a_share_out_and_is_scored_on_it(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(MAKERS["prompt"](at)) + "\n" for at in range(40)))
    recipe = check_recipe(settings(tiny_folder, path, tmp_path / "run"))
    folder, shown = go(recipe)
    assert "36 examples" in shown
    assert "4 examples" in shown
    assert "eval_loss" in log_of(folder)[-1]
    assert len(read_rows(**held_out(recipe, None, None, None, None).model_dump())) == 4
    assert "all but 10.0%" in (folder / "adapter" / "README.md").read_text()
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_chats_that_share_a_turn_are_no_leak(tiny_folder: Path, tmp_path: Path) -> None:
    path, chat = tmp_path / "rows.jsonl", tmp_path / "chat.jinja"
    path.write_text("".join(json.dumps(MAKERS["chat"](at)) + "\n" for at in range(20)))
    chat.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    recipe = settings(tiny_folder, path, tmp_path / "run", template="chat")
    recipe["model"] = {"name": str(tiny_folder), "chat_template": str(chat)}
    assert "2 examples" in go(check_recipe(recipe))[1]


@pytest.mark.parametrize("share", ["0%", "100%", "250%"])
def test_a_percentage_that_is_no_share(share: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match=r"data\.eval"):
        check_recipe(settings(tiny_folder, tmp_path / "rows.jsonl", tmp_path / "run", eval=share))
