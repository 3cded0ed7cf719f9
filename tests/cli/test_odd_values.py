"""Every option of every verb, with values that mean nothing: one sentence and exit 2."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svdtune import SorsaConfig, SvdtuneError, cli
from svdtune.cli.values import check_words, leaves, number
from svdtune.names import number_of
from svdtune.training.yaml_files import read_yaml

NUMBERS = {
    int: ["-1", str(2**70), str(-(2**70)), "x", "nan", "1e3", "1_0"],
    float: ["nan", ".inf", "-inf", "1e999", "-1", "x", "-1e300", "1_0"],
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
            hints = get_type_hints(inspect.unwrap(command.callback))
            for option in command.params:
                hint = hints.get(option.name, str)  # --json is of all verbs
                kind = next((one for one in (hint, *get_args(hint)) if isinstance(one, type)), str)
                written = next((text for text in option.opts if text.startswith("--")), None)
                if written and not option.is_flag and "completion" not in written[:-4]:
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


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, option, _ in OPTIONS])
def test_an_option_is_no_other_options_value(name: str, option: str) -> None:
    status, said = said_of([*name.split(), *WORDS.get(name, []), option, "--quiet"])
    assert status == 2
    assert said.startswith(f"svdtune: {option} has no value: --quiet is an option")


def test_an_empty_word_is_refused_but_for_another_programs() -> None:
    status, said = said_of(["generate", "model", ""])
    assert (status, said[:51]) == (2, "svdtune: the value after model is empty; give one, ")
    check_words(["with", "--", "python", "-c", ""])


def test_every_command_with_numbers_is_tried() -> None:
    assert {name for name, _, kind in OPTIONS if kind in NUMBERS} <= WORDS.keys()


WRITTEN = ["1000", "010", "+5", "-0", "0x1f", "0o17", "1e3", "1.5e-3", ".5", "5.", "-.inf", ".nan", "1_000", "1e1_0", "0b1",
           "inf", "nan", "1:30", "٣", "1,5", "true", "~", "9" * 5000]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN, ids=lambda text: text[:8].encode("unicode_escape").decode())
def test_a_number_is_what_it_is_in_a_recipe(text: str) -> None:
    try:
        read = read_yaml(text, "it")
    except SvdtuneError:  # of more digits than Python reads
        read = None
    number = number_of(text)
    assert repr(number) == repr(read if isinstance(read, int | float) and not isinstance(read, bool) else None)


def test_options_that_take_numbers_are_read_so() -> None:
    assert [number("--n", text, True) for text in ("0x10", "010", ".5")] == [16, 10, 0.5]
    with pytest.raises(SvdtuneError, match="--n is '1_0'; expected a number as recipes have it"):
        number("--n", "1_0", True)
    with pytest.raises(SvdtuneError, match="expected a whole number"):
        number("--m", "1.0", False)


def test_numbers_in_other_words_are_read_so(stand_ins: dict[str, str], tmp_path: Path) -> None:
    status, said = said_of(["combine", f"{stand_ins['ADAPTER']}=1_0", "--output", str(tmp_path / "new")])
    assert (status, "expected ADAPTER=WEIGHT" in said) == (2, True)
    for size in ("1_000", "٣k", "1e1_0", "k", "1kk"):
        status, said = said_of(["plan", stand_ins["MODEL"], "--budget", size])
        assert (status, "is neither a share" in said) == (2, True)
    status, said = said_of(["init", stand_ins["MODEL"], "--method", "lora", "--method.init_lora_weights", "pissa", "--r", "2",
                            "--components", "²:4", "--output", str(tmp_path / "new")])  # fmt: skip
    assert (status, "components must be one of" in said) == (2, True)
