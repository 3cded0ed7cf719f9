"""benchmarks/init_streamed.py: an 80-layer model that is never there, started within the memory
that the plan states."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "init_streamed.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's account of memory, on Linux")
def test_80_layers_are_started_in_the_memory_that_is_stated():
    command = [sys.executable, str(SCRIPT), "--hidden", "512", "--layers", "80", "--r", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout)
    assert line["weights"] == 7 * 80
    assert line["peak_gib"] <= line["stated_gib"]
    # The model would take 0.6 GiB beside what Python holds; its start takes a fraction of that.
    assert line["peak_gib"] - line["before_gib"] < line["model_gib"] / 4
