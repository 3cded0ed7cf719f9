"""Comparing formulas in a process of its own, which is killed where it takes too long.

A model can write 9^{9^{9^9}}: computing that ends neither by itself nor by an exception, for it is
one operation in C, and it can take all memory. The process has limits of CPU time, which is the
same on a busy machine, and of memory; it is started again when it died, and the formula then is not
equal.
"""

import atexit
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from svdtune.errors import SvdtuneError

_WORKER = Path(__file__).with_name("symbolic_worker.py")
_SECONDS, _START_SECONDS = 5.0, 1800.0
_WAIT = 100  # seconds of waiting for one of CPU time: longer only for a process that waits, too


class Comparer:
    """Compares formulas, one at a time; the process behind it starts with the first.

    Args:
        seconds: how much CPU time one comparison may take.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def __call__(self, kind: str, answer: str, expected: str) -> bool:
        """Whether both formulas are equal; False where that cannot be told in time.

        Args:
            kind: "math_verify" for LaTeX, "sympy" for expressions as SORSA's code compares them.
            answer: One formula.
            expected: The other.

        Raises:
            SvdtuneError: If math-verify is not installed.
        """
        with self._lock:
            if self._process is None:
                self._start()
            asked = {"kind": kind, "answer": answer, "expected": expected, "seconds": self.seconds}
            reply = self._ask(json.dumps(asked), _WAIT * self.seconds)
            if reply is None:
                self.close()
                return False
            return bool(reply["equal"])

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # -P: the script's folder stays off the path, where its neighbours would hide modules of the
        # same name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        reply = self._ask("", _START_SECONDS)
        if reply is None or "missing" in reply:
            self.close()
            reason = reply["missing"] if reply else "its process did not start"
            raise SvdtuneError(f"grading formulas needs math-verify ({reason}): pip install 'svdtune[eval]'")

    def _ask(self, line: str, seconds: float) -> dict[str, Any] | None:
        """Write a line, unless empty, and read the reply; None where the process was killed or died
        of itself."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            if line:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        finally:
            timer.cancel()
        return json.loads(reply) if reply else None


same_formula = Comparer()
