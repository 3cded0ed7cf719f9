"""The command line's help loads no library that takes seconds, and importing svdtune registers its
methods with PEFT whichever comes first."""

import subprocess
import sys

import pytest
from peft import PeftType

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
KNOWN = "import svdtune, peft; from peft import PeftType; print(PeftType.SORSA, PeftType.SARA, PeftType.MOSARA)"


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    count, *names = run(COUNTED, *words).stderr.splitlines()[-1].split()
    assert not HEAVY & {*names}
    assert int(count) < 1000


def test_peft_knows_the_methods_whichever_comes_first() -> None:
    """PEFT came first here, in `conftest.py`."""
    assert PeftType.SORSA == "SORSA"
    assert "SORSA" in run(KNOWN).stdout
