"""The command line's help loads no library that takes seconds, and importing svdtune registers its
methods with PEFT."""

import importlib
import subprocess
import sys

import pytest

from new_process import start

HEAVY = {"torch", "transformers", "peft", "datasets", "trl", "scipy"}
COUNTED = """
import sys
sys.argv = ["svdtune", *sys.argv[1:]]
from svdtune.cli import main
try:
    main()
except SystemExit:
    pass
print(len(sys.modules), *(name for name in sys.modules if "." not in name), file=sys.stderr)
"""
KNOWN = """
import svdtune
from transformers.utils import is_peft_available
assert is_peft_available()
from peft import PeftType
print(PeftType.SORSA, PeftType.SARA, PeftType.MOSARA)
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)


LIGHT = [["--version"], ["--help"], ["train", "--help"], ["plan", "--help"], ["cache", "list"]]


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_what_needs_no_model_loads_nothing_heavy(words: list[str]) -> None:
    count, *names = run(COUNTED, *words).stderr.splitlines()[-1].split()
    assert not HEAVY & {*names}
    assert int(count) < 1000


def test_peft_knows_the_methods_once_svdtune_is_imported() -> None:
    """Also where somebody looked for PEFT before, as Transformers does."""
    assert "SORSA" in run(KNOWN).stdout


def first_of_the_command(room: str) -> bool:
    """Import a room as a verb of the command line does, and whether PEFT knows the methods then."""
    sys.argv = ["svdtune"]
    importlib.import_module(f"svdtune.{room}")
    import peft

    return "SORSA" in peft.PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("room", ["spectra", "checkpoint", "models", "planning", "training", "export", "api.runs"])
def test_every_room_can_be_the_first(room: str) -> None:
    assert start(first_of_the_command, room).result() or room in ("spectra", "checkpoint", "models")
