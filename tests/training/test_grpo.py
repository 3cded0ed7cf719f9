"""GRPO on a tiny model: rewards by name and by path, resume, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from runs import go, log_of, timeless
from svdtune.errors import SvdtuneError
from svdtune.training import Interrupted, check_recipe
from svdtune.training import run as run_module
from svdtune.training.callbacks import StopOnInterrupt
from svdtune.training.preparation import load_rewards

ASKED: list[str] = []


def short(completions: list[str], **columns: Any) -> list[float]:
    """A reward that tells any two answers apart."""
    assert len(columns["prompts"]) == len(columns["total"]) == len(completions)
    ASKED.append(columns["total"][0])
    return [float(sum(map(ord, text)) % 7) for text in completions]


SHORT = f"{__name__}:short"


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Add {i} and 1.\n", "total": str(i + 1)} for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": {"name": str(tiny_folder)},
        "method": {"name": "sorsa", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": str(data), "answer": "total", "max_length": 64},
        "training": {
            "task": "grpo",
            "rewards": [SHORT, "number"],
            "max_steps": 2,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": None,
            "trl": {"num_generations": 4, "max_completion_length": 6, "beta": 0.1},
        },
        "output": {"dir": str(tmp_path / "run")},
    }


@pytest.mark.parametrize("method", ["sorsa", "sara", "mosara"])
def test_every_method_learns_from_rewards(recipe: dict[str, Any], method: str, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "?", "total": "3"}))
    recipe["method"]["name"] = method
    recipe["data"]["eval"] = str(held_out)
    folder, shown = go(recipe)
    log = log_of(folder)
    assert [line["step"] for line in log if "loss" in line] == [1, 2]
    assert log[0]["rewards/short/mean"] > 0
    assert "rewards/number/mean" in log[0]
    assert log[0]["grad_norm"] > 0
    assert ("l_reg" in log[0]) == (method == "sorsa")
    assert "eval_reward" in log[-1]
    assert "6 prompts" in shown
    assert "decoded; the model answers)\n        · Add 0 and 1.\n" in shown
    assert ("SARA changes the model at step 0" in shown) == (method == "sara")


class StopAtStep7(StopOnInterrupt):
    """Ctrl-C during the seventh step, the first of the second pass."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            self._on_signal()
        super().on_step_end(args, state, control, **kwargs)


@pytest.mark.slow
def test_resume_gives_the_same_answers(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["training"]["max_steps"] = 12
    ASKED.clear()
    whole, _ = go(recipe)
    first, second = ASKED[:6], ASKED[6:]
    assert sorted(first) == sorted(second)
    assert first != second
    recipe["output"]["dir"] = str(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtStep7)
        with pytest.raises(Interrupted, match="stopped after step 7"):
            go(recipe)
    stopped, _ = go(recipe, resume=True)
    assert timeless(log_of(stopped)) == timeless(log_of(whole))
    one, other = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (whole, stopped))
    assert one == other


def test_a_function_is_found_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_rewards.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    [reward] = load_rewards(["my_own_rewards:one"], None, [])
    assert reward(completions=["a", "b"]) == [1.0, 1.0]


def test_graders_grade_text_and_messages() -> None:
    [reward] = load_rewards(["number"], "total", [{"total": "3"}])
    completions = ["so it is 3", "4", [{"role": "assistant", "content": "#### 3"}]]
    assert reward(completions=completions, total=["3"] * 3) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("no_such_module:f", None, r"'no_such_module:f' cannot be imported.*expected package.module:function"),
        ("json:no_such", None, r"json has no function 'no_such'"),
        ("number", None, "grades against reference answers; name their column with data.answer"),
        ("number", "sum", r"training row 1 has no field 'sum' \(data.answer\), which number grades against"),
        ("numbr", "total", "there is no task 'numbr'"),
        ("number", "prompt", "needs a number in every reference"),
        ("e2e_bleu", "total", "scores all answers together, so that it is no reward"),
    ],
)
def test_rewards_that_cannot_be_had_are_refused(name: str, answer: str | None, message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        load_rewards([name], answer, [{"prompt": "what", "total": "3"}])


@pytest.mark.parametrize(
    ("section", "setting", "value", "message"),
    [
        ("training", "rewards", [], r"training.rewards: is required: grpo learns from what its answers are worth"),
        ("training", "task", "dpo", r"training.rewards: is for training.task: grpo"),
        ("data", "overlong", "cut", r"a prompt that is cut asks something else"),
        ("training", "trl", {"use_vllm": True}, r"training.trl.use_vllm: is not the recipe's to change"),
    ],
)
def test_what_grpo_cannot_do_is_refused(
    recipe: dict[str, Any], section: str, setting: str, value: Any, message: str
) -> None:
    recipe[section][setting] = value
    with pytest.raises(SvdtuneError, match=message):
        check_recipe(recipe)


def test_tools_that_no_answer_is_sampled_with_are_refused(recipe: dict[str, Any]) -> None:
    row = {"prompt": "Add 1 and 1.", "total": "2", "tools": [{"name": "add"}]}
    Path(recipe["data"]["train"]).write_text(json.dumps(row))
    with pytest.raises(SvdtuneError, match=r"row 1: the row has tools, which training\.task: grpo does not offer"):
        go(recipe)


SEEN: list[Any] = []


def seen(prompts: list[Any], **_: Any) -> list[float]:
    """A reward that keeps what was asked."""
    SEEN.extend(prompts)
    return [float(at) for at in range(len(prompts))]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_what_a_prompt_follows_is_sampled_with_it(recipe: dict[str, Any], template: str, tmp_path: Path) -> None:
    form = tmp_path / "chat.jinja"
    form.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    recipe["model"]["chat_template"] = str(form)
    rows = [{"instruction": "2 + 2?", "output": "4", "system": system, "total": "4"} for system in ("Be brief.", "")]
    Path(recipe["data"]["train"]).write_text("\n".join(map(json.dumps, rows)))
    recipe["data"] |= {"template": template, "max_length": 200}
    recipe["training"]["rewards"] = [f"{__name__}:seen"]
    SEEN.clear()
    go(recipe)
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}
    wanted = [[system, asked], [asked]] if template == "chat" else ["Be brief.\n\n2 + 2?", "2 + 2?"]
    assert all(one in SEEN for one in wanted)
    assert all(one in wanted for one in SEEN)


def test_prompts_that_are_too_long_are_refused_or_left_out(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["data"]["max_length"] = 10
    with pytest.raises(SvdtuneError, match=r"row 1: the prompt is 13 tokens long, and max_length is 10; raise it"):
        go(recipe)
    recipe["data"]["overlong"] = "drop"
    with pytest.raises(SvdtuneError, match="no row is left: all prompts are longer"):
        go(recipe)


def broken(completions: list[str], **_: Any) -> list[float]:
    """A reward that reads a number where there is none."""
    return [float("x") for _ in completions]


def test_what_a_reward_raises_is_its_own(recipe: dict[str, Any]) -> None:
    """It was said to come from a value in training.trl."""
    recipe["training"]["rewards"] = [f"{__name__}:broken"]
    with pytest.raises(ValueError, match=r"^could not convert string to float") as raised:
        go(recipe)
    assert not isinstance(raised.value, SvdtuneError)
    assert any(entry.name == "broken" for entry in raised.traceback)
