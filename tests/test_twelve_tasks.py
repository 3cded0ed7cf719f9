"""What twelve users type and see: own data, at most three commands each, and no file of theirs but
the data.

The eighth goes the whole way and takes seven.
"""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.training import run as run_module
from svdtune.training.callbacks import StopOnInterrupt

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHORT = "--training.epochs 0.1 --training.batch_size 2 --method.r 2"
COUNT = 40  # from so many rows on, a recipe holds some out


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model of the user's, which has a chat template."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for file in tiny_folder.iterdir():
        Path("model", file.name).symlink_to(file)
    Path("model/chat_template.jinja").write_text(TEMPLATE)


def types(*commands: str, ends: int = 0, said: str | None = None) -> str:
    """What a user sees who types these commands; the last ends with the status."""
    shown = ""
    for place, command in enumerate(commands, 1):
        result = CliRunner().invoke(app, shlex.split(command)[1:], input=said)
        assert result.exit_code == (ends if place == len(commands) else 0), (command, result.output)
        assert "Traceback" not in result.output
        shown += result.output
    return shown


def rows(name: str, make: Any) -> None:
    Path(name).write_text("".join(json.dumps(make(n)) + "\n" for n in range(COUNT)))


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_1_chats_of_several_turns() -> None:
    turns = ("user", "Hi, {}."), ("assistant", "Hello."), ("user", "{} plus 1?"), ("assistant", "One more.")
    rows("chats.jsonl", lambda n: {"messages": [said(role, text.format(n)) for role, text in turns]})
    shown = types("svdtune new model chats.jsonl", f"svdtune train recipe.yaml {SHORT}")
    assert "chats (messages); the assistant's turns are trained on" in shown
    assert "trained 2 steps" in shown
    shown = types("svdtune chat runs/recipe --max-new-tokens 2", said="Hi.\nAgain?\n")
    assert "each answer sees the conversation" in shown


def test_2_sharegpt() -> None:
    parts = ("human", "What is {}?"), ("gpt", "A number.")
    rows("talk.json", lambda n: {"conversations": [{"from": who, "value": text.format(n)} for who, text in parts]})
    Path("talk.json").write_text(json.dumps([json.loads(line) for line in Path("talk.json").read_text().splitlines()]))
    shown = types("svdtune new model talk.json --method sara", f"svdtune train recipe.yaml {SHORT}")
    assert "chats (ShareGPT's conversations)" in shown
    assert "saved runs/recipe/adapter" in shown


def test_3_alpaca() -> None:
    rows("alpaca.jsonl", lambda n: {"instruction": f"Add 1 to {n}.", "input": "", "output": str(n + 1)})
    train = f"svdtune train recipe.yaml {SHORT}"
    shown = types(
        "svdtune new model alpaca.jsonl", train, "svdtune evaluate runs/recipe --task number --max-new-tokens 2"
    )
    assert "Alpaca's instruction, input and output" in shown
    assert "accuracy (strict)" in shown
    assert "of 2 correct" in shown, "the rows that were held out"


def test_4_a_corpus() -> None:
    rows("corpus.jsonl", lambda n: {"text": f"Chapter {n} of a long story."})
    generate = "svdtune generate runs/recipe Chapter --max-new-tokens 4"
    shown = types("svdtune new model corpus.jsonl", f"svdtune train recipe.yaml {SHORT}", generate)
    assert "plain text, all of which is trained on" in shown


def test_5_a_csv_with_columns_of_its_own() -> None:
    with Path("faq.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["question", "reply"], *([f"How many is {n}?", f"{n}, of course."] for n in range(COUNT))]
        )
    shown = types("svdtune new model faq.csv", ends=2)
    assert "Say which hold what is asked and answered: --prompt question --completion answer" in shown
    shown = types(
        "svdtune new model faq.csv --prompt question --completion reply",
        f"svdtune train recipe.yaml {SHORT}",
        "svdtune generate runs/recipe --data faq.csv --output answers.jsonl --max-new-tokens 2",
    )
    assert f"{COUNT} answers in answers.jsonl" in shown


def test_6_preferences() -> None:
    rows("pairs.jsonl", lambda n: {"prompt": f"{n}?", "chosen": "Yes, indeed.", "rejected": "No."})
    shown = types("svdtune new model pairs.jsonl --method sorsa", f"svdtune train recipe.yaml {SHORT}")
    assert "preferences: the answer that is chosen, and the one that is rejected" in shown
    assert "trained 2 steps" in shown


SCRIPT = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from svdtune import SorsaConfig, SorsaRegularizer

rows = Dataset.from_list([{"text": f"{n} and {n}"} for n in range(8)])
args = SFTConfig("out", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained("model"), args, train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained("model"),
    peft_config=SorsaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), callbacks=[SorsaRegularizer()],
)
trainer.train()
trainer.save_model("mine")
"""


def test_7_a_script_of_their_own_with_trl() -> None:
    exec(compile(SCRIPT, "script.py", "exec"), {})
    shown = types("svdtune generate mine hi --max-new-tokens 2", "svdtune export mine --output lora --base model")
    assert "no loss: every layer adds what it added before" in shown


def test_8_the_whole_way_to_stock_peft() -> None:
    rows("sums.jsonl", lambda n: {"prompt": f"{n} + 1", "completion": str(n + 1)})
    shown = types(
        "svdtune new model sums.jsonl",
        "svdtune plan recipe.yaml --method.r 2",
        f"svdtune train recipe.yaml {SHORT}",
        "svdtune evaluate runs/recipe --max-new-tokens 2",
        "svdtune report runs/recipe",
        "svdtune merge runs/recipe --output merged",
        "svdtune export runs/recipe --output lora",
    )
    for part in (
        "trained parameters in ",
        "trained 2 steps",
        "accuracy (strict)",
        "page: ",
        "merged into ",
        "LoRA of rank 4",
    ):
        assert part in shown
    ids = torch.tensor([[3, 4, 5]])
    merged = AutoModelForCausalLM.from_pretrained("merged")(ids).logits
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "lora")(ids).logits
    torch.testing.assert_close(merged, stock, atol=1e-4, rtol=1e-4)


def test_9_a_study_of_their_own_data() -> None:
    rows("sums.jsonl", lambda n: {"prompt": f"{n} + 1", "completion": str(n + 1)})
    shown = types("svdtune study new model sums.jsonl --budget 3k", "svdtune study study.yaml --dry-run")
    assert "written   study.yaml and study-recipe.yaml: 19 runs" in shown
    assert "sums · sorsa at 3,000 parameters" in shown


def test_10_a_run_that_is_stopped_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class StopAtOnce(StopOnInterrupt):
        def __init__(self) -> None:
            super().__init__()
            self.stopped = True

    rows("sums.jsonl", lambda n: {"prompt": f"{n} + 1", "completion": str(n + 1)})
    train = f"svdtune train recipe.yaml {SHORT} --training.epochs 0.2"
    types("svdtune new model sums.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopOnInterrupt", StopAtOnce)
        shown = types(train, ends=130)
    assert f"go on with: {train} --resume" in shown
    assert "trained " in types(f"{train} --resume")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("svdtune new modle rows.jsonl", "did you mean model?"),
        ("svdtune new rows.jsonl model", "svdtune: "),
        ("svdtune generate rows hi", "the model folder rows has no config.json"),
    ],
)
def test_11_a_wrong_model(command: str, says: str) -> None:
    rows("rows.jsonl", lambda n: {"text": "a"})
    Path("rows").mkdir()
    shown = types(command, ends=2)
    assert says in shown
    assert shown.startswith("svdtune: ")
    assert len(shown.strip().splitlines()) == 1, "one sentence"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("svdtune train recipe.yaml --output.dir /proc/run", "/proc/run"),
        ("svdtune new model rows.jsonl --output /proc/recipe.yaml", "cannot write /proc/recipe.yaml: "),
        ("svdtune init model --r 2 --output /proc/start", "/proc/start"),
        ("svdtune generate model --data rows.jsonl --field text --output /proc/answers.jsonl", "name another output"),
    ],
)
def test_12_a_wrong_disk(command: str, says: str) -> None:
    rows("rows.jsonl", lambda n: {"text": "a"})
    types("svdtune new model rows.jsonl")
    shown = types(command, ends=2)
    assert says in shown
    assert "svdtune: " in shown
