"""What is trained is used: answers to a file of prompts, a chat, a push to the hub."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from svdtune import SorsaConfig
from svdtune.cli import app
from svdtune.evaluation import TransformersEngine
from svdtune.export import find_source
from svdtune.models import load
from tiny import with_template

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{{ '[assistant]' }}"
ROWS = [{"ask": "ab" * n, "id": n} for n in (3, 1, 2, 5, 4)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def svdtune(*words: str | Path, said: str | None = None) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], input=said)


def answer_file(model: Path, *words: str) -> Result:
    common = ["--field", "ask", "--output", "answers.jsonl", "--max-new-tokens", "3", "--batch-size", "2"]
    return svdtune("generate", model, "--data", "prompts.jsonl", *common, *words)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_every_row_is_answered_in_its_order_as_alone(tiny_folder: Path) -> None:
    made = answer_file(tiny_folder)
    assert made.exit_code == 0, made.output
    assert "5 answers in answers.jsonl, " in made.stdout
    found = rows("answers.jsonl")
    assert [{name: row[name] for name in ("ask", "id")} for row in found] == ROWS
    for row in found[:2]:
        alone = svdtune("generate", tiny_folder, row["ask"], "--max-new-tokens", "3")
        assert alone.stdout == row["generated"] + "\n"
    again = answer_file(tiny_folder)
    assert again.exit_code == 2
    assert "answers.jsonl is there already; name another --output" in again.stderr


def test_an_interrupted_file_goes_on(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_file(tiny_folder).exit_code == 0
    whole = Path("answers.jsonl").read_text()
    Path("answers.jsonl").unlink()
    asked: list[int] = []
    complete = TransformersEngine.complete

    def stopping(engine: Any, prompts: Any, *rest: Any) -> Any:
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return complete(engine, prompts, *rest)

    monkeypatch.setattr(TransformersEngine, "complete", stopping)
    stopped = answer_file(tiny_folder)
    assert stopped.exit_code == 130
    assert "answers.jsonl.part keeps what is done, the same command goes on" in stopped.stderr
    other = answer_file(tiny_folder, "--template", "{prompt}!")
    assert other.exit_code == 2
    assert "predictions made with other settings" in other.stderr
    assert "--restart" in other.stderr
    Path("model").symlink_to(tiny_folder)
    assert answer_file(Path("model")).exit_code == 0, "it is the same model, however its path is spelt"
    assert asked[2:] == [2, 1], "the first two are not asked again"
    assert Path("answers.jsonl").read_text() == whole
    assert sorted(path.name for path in Path().iterdir()) == ["answers.jsonl", "model", "prompts.jsonl"]


def test_two_do_not_write_one_file(tiny_folder: Path) -> None:
    with FileLock("answers.jsonl.part/.svdtune.lock"):
        second = answer_file(tiny_folder)
    assert second.exit_code == 2
    assert "answers.jsonl.part is in use by another process. Wait until that has ended" in second.stderr
    assert answer_file(tiny_folder).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [[], ["hi", "--data", "prompts.jsonl", "--output", "x"], ["--data", "prompts.jsonl"], ["hi", "--output", "x"]],
)
def test_a_prompt_or_a_file(words: list[str], tiny_folder: Path) -> None:
    found = svdtune("generate", tiny_folder, *words)
    assert found.exit_code == 2
    assert "give a prompt, or --data with --output" in found.stderr


def test_what_is_for_rows_is_refused_with_one_prompt(tiny_folder: Path) -> None:
    found = svdtune("generate", tiny_folder, "hi", "--field", "ask", "--batch-size", "16", "--restart")
    assert found.exit_code == 2
    assert "--field, --batch-size, --restart: for the rows of --data alone; leave that out" in found.stderr


def test_an_answer_may_hold_any_line_separator(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\ni"
    monkeypatch.setattr(PreTrainedTokenizerFast, "batch_decode", lambda self, ids, **_: [answer for _ in ids])
    assert answer_file(tiny_folder).exit_code == 0
    lines = Path("answers.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["generated"] for line in lines] == [answer] * len(ROWS)


def test_a_home_is_a_folder_in_every_path(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("home").mkdir()
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    made = answer_file(tiny_folder, "--output", "~/answers.jsonl", "--json", "~/found.json")
    assert made.exit_code == 0, made.output
    assert svdtune("recipes", "write", "small", "--output", "~/mine.yaml").exit_code == 0
    assert svdtune("data", "check", "~/answers.jsonl").exit_code == 0
    assert {path.name for path in Path("home").iterdir()} == {"answers.jsonl", "found.json", "mine.yaml"}
    assert not Path("~").exists()
    refused = answer_file(tiny_folder, "--output", "~nobody-here/answers.jsonl")
    assert refused.exit_code == 2
    assert "~nobody-here/answers.jsonl begins with the home of a user who is not here; write ./~" in refused.stderr


def test_a_row_that_json_cannot_hold_is_refused_before_any_answer(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "complete", None)
    pq.write_table(pa.table({"ask": ["ab", "cd"], "when": pa.array([None, 0], pa.timestamp("s"))}), "dated.parquet")
    found = answer_file(tiny_folder, "--data", "dated.parquet")
    assert found.exit_code == 2
    assert "dated.parquet row 2 cannot be written as JSON: its column 'when' holds datetime" in found.stderr
    assert "make that a text in the data, or leave the column out" in found.stderr
    assert not list(Path().glob("answers*"))


@pytest.fixture
def chatting(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    return with_template(tmp_path / "chatting", tiny_folder, TEMPLATE)


def test_a_chat_sees_what_was_said_until_an_empty_line(chatting: Path) -> None:
    words = ["--max-new-tokens", "2", "--system", "Be short.", "--json", "kept.json"]
    found = svdtune("chat", chatting, *words, said="one\n\ntwo\nthree\n")
    assert found.exit_code == 0, found.output
    assert "each answer sees the conversation" in found.stderr
    assert "a new conversation" in found.stderr
    turns = json.loads(Path("kept.json").read_text())["messages"]
    assert [turn["content"] for turn in turns if turn["role"] != "assistant"] == ["Be short.", "two", "three"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]


def test_without_a_chat_template_each_line_is_asked_alone(tiny_folder: Path) -> None:
    found = svdtune("chat", tiny_folder, "--max-new-tokens", "3", said="abab\nab\n")
    assert found.exit_code == 0, found.output
    assert "each line is asked alone" in found.stderr
    alone = svdtune("generate", tiny_folder, "ab", "--max-new-tokens", "3").stdout
    assert found.stdout.endswith(f"> {alone}> ")
    refused = svdtune("chat", tiny_folder, "--system", "Be short.")
    assert refused.exit_code == 2
    assert "--system is for the chat template; the template here is 'plain'" in refused.stderr


class Hub:
    """What would be uploaded."""

    files: dict[str, str]
    refusal: Exception | None = None

    def create_repo(self, name: str, **settings: Any) -> None:
        if Hub.refusal is not None:
            raise Hub.refusal

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        Hub.files = {path.name: path.read_text(errors="replace") for path in folder_path.iterdir()}
        return f"https://hub/{repo_id}"


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.refusal = None
    model = get_peft_model(load(tiny_folder).model, SorsaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "checkpoint-1").mkdir()
    return tmp_path / "adapter"


def test_an_adapter_is_pushed_with_a_base_that_others_have(adapter: Path, tiny_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    refused = svdtune("push", adapter, "me/mine")
    assert refused.exit_code == 2
    assert f"the adapter's base model is {tiny_folder}, which others do not have" in refused.stderr
    pushed = svdtune("push", adapter, "me/mine", "--base", "owner/base")
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout == "pushed to https://hub/me/mine\n"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == Hub.files.keys()
    assert json.loads(Hub.files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    assert str(tiny_folder) not in Hub.files["README.md"]
    assert {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()} == before
    assert find_source(adapter).base == str(tiny_folder)


def test_what_cannot_be_pushed(adapter: Path) -> None:
    Hub.refusal = OSError("no login")
    found = svdtune("push", adapter, "me/mine", "--base", "owner/base")
    assert found.exit_code == 2
    assert "cannot be pushed to me/mine: no login; expected owner/name, and a login" in found.stderr
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "optimizer.pt")
    found = svdtune("push", adapter, "me/mine", "--base", "owner/base")
    assert "holds no weights (.safetensors, .bin), so there is nothing to push" in found.stderr
    found = svdtune("push", "adaptor", "me/mine")
    assert found.exit_code == 2
    assert "is neither a finished run, nor an adapter, nor a model folder (looked in " in found.stderr
    assert "did you mean adapter?" in found.stderr
