"""Every option of every verb, with values that mean nothing: one sentence and exit 2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svdtune import SorsaConfig, cli
from svdtune.cli.values import check_words, leaves

NUMBERS = {
    int: ["-1", str(2**70), str(-(2**70)), "x", "nan", "1e3"],
    float: ["nan", "inf", "-inf", "1e999", "-1", "x", "-1e300"],
}
# The least of each verb that runs, with what stands for the tiny model, an adapter and a file.
WORDS = {
    "new": ["MODEL", "ROWS", "--output", "NEW"],
    "plan": ["MODEL"],
    "init": ["MODEL", "--output", "NEW"],
    "data check": ["ROWS"],
    "evaluate": ["MODEL", "--data", "arithmetic", "--max-new-tokens", "1", "--limit", "1", "--output", "NEW"],
    "generate": ["MODEL", "hi", "--max-new-tokens", "1"],
    "chat": ["MODEL"],
    "analyze": ["MODEL"],
    "merge": ["ADAPTER", "--output", "NEW"],
    "export": ["ADAPTER", "--output", "NEW"],
    "combine": ["ADAPTER", "--output", "NEW"],
    "study run": ["ROWS", "--dry-run"],
}


def options() -> Iterator[tuple[str, str, type]]:
    """(command, option, type) of all that take a value."""
    app: Any = typer.main.get_command(cli.app)
    for verb in cli.verbs():
        for name, command in leaves(app.get_command(None, verb), verb):
            for option in command.params:
                kind = option.type_descriptor.annotation
                written = next((text for text in option.opts if text.startswith("--")), None)
                if written and kind is not bool and "completion" not in written[:-4]:
                    yield name, written, kind


OPTIONS = list(options())


@pytest.fixture(scope="module")
def stand_ins(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("odd")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(model, SorsaConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return {
        "MODEL": str(tiny_folder),
        "ADAPTER": str(folder / "adapter"),
        "ROWS": str(folder / "rows.jsonl"),
        "NEW": str(folder / "new"),
    }


def said_of(words: list[str]) -> tuple[int, str]:
    """Exit status and what was said; a traceback fails the test."""
    result = CliRunner().invoke(cli.app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, value) for name, option, kind in OPTIONS for value in NUMBERS.get(kind, ())],
)
def test_numbers_that_no_option_takes(name: str, option: str, value: str, stand_ins: dict[str, str]) -> None:
    words = [stand_ins.get(word, word) for word in WORDS[name]]
    status, said = said_of([*name.split(), *words, f"{option}={value}"])
    assert status == 2
    assert option.removeprefix("--").replace("-", "_") in said.replace("-", "_")


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, option, _ in OPTIONS])
@pytest.mark.parametrize("form", ["apart", "=", "blank"])
def test_empty_values(name: str, option: str, form: str) -> None:
    words = {"apart": [option, ""], "=": [f"{option}="], "blank": [option, " "]}[form]
    status, said = said_of([*name.split(), *words])
    assert status == 2
    assert said.startswith(f"svdtune: the value of {option} is empty; give one")


def test_an_empty_word_is_refused_but_for_another_programs() -> None:
    status, said = said_of(["generate", "model", ""])
    assert (status, said[:51]) == (2, "svdtune: the value after model is empty; give one, ")
    check_words(["with", "--", "python", "-c", ""])


def test_every_command_with_numbers_is_tried() -> None:
    assert {name for name, _, kind in OPTIONS if kind in NUMBERS} <= WORDS.keys()
