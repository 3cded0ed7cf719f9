"""Command lines that mean nothing: every option of every verb that takes a value, with one that few
options take. Each is refused in one sentence, or does what it says: `~` is a name of a file."""

import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from svdtune import cli
from svdtune.cli.values import leaves
from torture.world import Done, is_one_sentence, start_call, wait

_ODD = [
    "",
    "nan",
    "-inf",
    "1e999",
    str(2**70),
    str(-(2**70)),
    "1_0",
    "\x00x",
    "0x1",
    "١",
    "１",
    " ",
    "--",
    "[",
    "{",
    "~",
]


@dataclass
class Words:
    """How many command lines were tried, how many were refused, and what did not hold."""

    tried: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


def odd_words(work: Path, model: Path, wanted: int, chance: random.Random, deadline: float) -> Words:
    """Call verbs with odd values `wanted` times, or until the deadline.

    Args:
        work: for what is printed.
        model: that the verbs are called on.
        wanted: how many calls.
        chance: of the options and values.
        deadline: in seconds of `time.monotonic`.
    """
    found, options = Words(), list(_options())
    while found.tried < wanted and time.monotonic() < deadline:
        verb, option = chance.choice(options)
        value = chance.choice(_ODD)
        words = [*verb.split(), str(model), f"{option}={value}"]
        done = _call_in(work / "odd", words, work / "printed")
        found.tried += 1
        found.refused += done.code == 2
        if "Traceback" in done.printed or done.code not in (0, 2):
            found.wrong.append(f"{verb} {option}={value!r}: {done.code}: {done.printed[-300:]}")
        elif done.code == 2 and done.printed.startswith("svdtune: ") and not is_one_sentence(done):
            found.wrong.append(f"{verb} {option}={value!r}: more than one sentence: {done.printed[-300:]}")
    return found


def _call_in(folder: Path, words: list[str], printed: Path) -> Done:
    """Run a command in a folder of its own, which takes what it writes by a relative path."""
    folder.mkdir(exist_ok=True)

    def run() -> None:
        os.chdir(folder)
        sys.argv = ["svdtune", *words]
        cli.main()

    return wait(start_call(run, printed), printed)


def _options() -> Iterator[tuple[str, str]]:
    """(verb, option) of all that take a value."""
    app: Any = typer.main.get_command(cli.app)
    for verb in cli.verbs():
        for name, command in leaves(app.get_command(None, verb), verb):
            for option in command.params:
                written = next((text for text in option.opts if text.startswith("--")), None)
                if written and not getattr(option, "is_flag", False) and "completion" not in written[:-4]:
                    yield name, written
