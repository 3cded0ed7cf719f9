"""Run foreign code and its tests in two confined processes, watch over both, and say whether the
tests passed."""

import contextlib
import errno
import functools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.lab.sandbox.disk import LOOK, TOO_MUCH, has_room, over, sees_open_files, wait_for_room

_INSIDE = Path(__file__).parent / "inside"
_PASSED = b'["passed", ""]\n'
_ATTEMPTS = 3  # of a program beside which the disk was full


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_seconds: From its start to the last test.
        cpu_seconds: Of the program, and as much again of its tests.
        memory_bytes: Address space.
        output_bytes: Of what it prints.
        scratch_bytes: Of all its files together.
    """

    wall_seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 16
    scratch_bytes: int = 1 << 24


@dataclass(frozen=True)
class Verdict:
    """Whether the tests passed; if not, why not."""

    passed: bool
    reason: str


@functools.cache
def missing_protections() -> tuple[str, ...]:
    """What this system lacks for a whole sandbox, in words; empty where nothing is missing."""
    with tempfile.TemporaryDirectory(prefix="svdtune-") as scratch:
        settings = _settings(scratch, Limits())
        done = subprocess.run(_command("probe", settings), cwd=scratch, env=_environment(scratch), capture_output=True)
    if done.returncode:
        raise SvdtuneError(f"the sandbox does not start: {done.stderr.decode(errors='replace').strip()[-300:]}")
    missing = json.loads(done.stdout)
    if not sees_open_files(os.getpid()):
        missing.append("/proc: files that a program hides are not counted")
    return tuple(missing)


def require_protections() -> None:
    """Refuse to run foreign code in less than a whole sandbox, unless SVDTUNE_SANDBOX says
    `weaker`.

    Raises:
        SvdtuneError: If a protection is missing.
    """
    missing = missing_protections()
    if missing and os.environ.get("SVDTUNE_SANDBOX") == "weaker":
        without = f"programs that a model wrote run without {'; '.join(missing)}"
        warnings.warn(without, SvdtuneWarning, stacklevel=2)
    elif missing:
        raise SvdtuneError(
            f"this system cannot confine programs that a model wrote; it lacks {'; '.join(missing)}. Score on Linux "
            "5.13 or later, x86-64 or ARM64; or, on a machine that you can lose, set SVDTUNE_SANDBOX=weaker"
        )


def check_function(
    program: str,
    function: str,
    tests: str,
    setup: str = "",
    limits: Limits | None = None,
) -> Verdict:
    """Execute a program and say whether a function of it passes the tests.

    The program and the tests run in two processes that exchange plain data alone, each confined: no
    network, no new process or thread, no file outside its scratch folder but the interpreter's and
    the system's libraries, and `limits`.

    Args:
        program: Source of the foreign code.
        function: The name in it to test.
        tests: Source that defines `check(candidate)`, as HumanEval has it.
        setup: Source that the tests need; not the program's.
        limits: None for the defaults.

    Raises:
        SvdtuneError: If the system lacks a protection (see `require_protections`).
    """
    require_protections()
    limits = limits or Limits()
    place, needed = Path(tempfile.gettempdir()), 2 * limits.scratch_bytes  # of the program and of its tests
    for _ in range(_ATTEMPTS):
        wait_for_room(place, needed, limits.wall_seconds)
        verdict, was_full = _check(program, function, tests, setup, limits)
        if verdict.passed or not was_full or verdict.reason.startswith(TOO_MUCH):
            return verdict
    # what others write took the room that was there before, each time
    raise SvdtuneError(
        f"{place} fills up while programs run there; make room, or name another folder in TMPDIR. The same command goes "
        "on where it stopped"
    )


def _check(program: str, function: str, tests: str, setup: str, limits: Limits) -> tuple[Verdict, bool]:
    """The verdict, and whether the disk was full meanwhile: a failure then may be another
    program's."""
    with tempfile.TemporaryDirectory(prefix="svdtune-") as folder, contextlib.ExitStack() as stack:
        scratches = Path(folder, "program"), Path(folder, "tests")
        try:
            for scratch in scratches:
                scratch.mkdir()
            _write(scratches[0] / "program.py", program)
            _write(scratches[1] / "setup.py", setup)
            _write(scratches[1] / "tests.py", tests)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return Verdict(False, "the disk is full"), True
        processes, verdict = _start(function, scratches, limits, stack)
        return _watch(processes, verdict, scratches, limits)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def _start(
    function: str, scratches: tuple[Path, Path], limits: Limits, stack: contextlib.ExitStack
) -> tuple[list[subprocess.Popen[bytes]], IO[bytes]]:
    """Start the program and its tests, each reading what the other writes; both are ended when
    `stack` closes."""
    calls_out, calls_in = os.pipe()
    answers_out, answers_in = os.pipe()
    verdict_out, verdict_in = os.pipe()
    verdict = stack.enter_context(os.fdopen(verdict_out, "rb"))
    processes = []
    try:
        for role, scratch, read, write in (
            ("program", scratches[0], calls_out, answers_in),
            ("tests", scratches[1], answers_out, calls_in),
        ):
            extra = {"function": function, "allow_weaker": bool(missing_protections())}
            keep = (verdict_in,) if role == "tests" else ()
            process = subprocess.Popen(
                _command(role, _settings(str(scratch), limits) | extra | {"verdict": verdict_in}),
                stdin=read,
                stdout=write,
                stderr=subprocess.PIPE,
                cwd=scratch,
                env=_environment(str(scratch)),
                pass_fds=keep,
                start_new_session=True,
            )
            stack.callback(_end, process)
            processes.append(process)
    finally:
        for end in (calls_out, calls_in, answers_out, answers_in, verdict_in):
            os.close(end)
    return processes, verdict


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, which has no children: it may not start any."""
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def _watch(
    processes: list[subprocess.Popen[bytes]], verdict: IO[bytes], scratches: tuple[Path, Path], limits: Limits
) -> tuple[Verdict, bool]:
    """Read along until the tests have ended or a limit is broken."""
    program, tests = processes
    printed, said, broken, was_full = bytearray(), bytearray(), "", False
    deadline = time.monotonic() + limits.wall_seconds
    with selectors.DefaultSelector() as selector:
        for stream, into in ((program.stderr, printed), (tests.stderr, bytearray()), (verdict, said)):
            assert stream is not None  # all are pipes
            selector.register(stream, selectors.EVENT_READ, into)
        while not broken and verdict in (key.fileobj for key in selector.get_map().values()):
            for key, _ in selector.select(LOOK):
                chunk = os.read(key.fd, 1 << 16)
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
            broken = _broken(len(printed), deadline, limits)
            broken = broken or over(scratches, [process.pid for process in processes], limits.scratch_bytes)
            was_full = was_full or not has_room(scratches[0], limits.scratch_bytes)
    if broken:
        return Verdict(False, broken), was_full
    if said == _PASSED and tests.wait() == 0:
        return Verdict(True, ""), was_full
    return Verdict(False, _reason(said)), was_full


def _broken(printed: int, deadline: float, limits: Limits) -> str:
    """Which of the limits that no kernel keeps for us is exceeded; empty where none is."""
    if time.monotonic() > deadline:
        return f"not done after {limits.wall_seconds:g} s"
    if printed > limits.output_bytes:
        return f"printed more than {limits.output_bytes} bytes"
    return ""


def _reason(said: bytes | bytearray) -> str:
    """The tests' own words."""
    try:
        return str(json.loads(said)[1])
    except (ValueError, IndexError):
        return "the tests ended without a verdict"


def _settings(scratch: str, limits: Limits) -> dict[str, Any]:
    return {"scratch": scratch, "limits": asdict(limits), "parent": os.getpid()}


def _command(role: str, settings: dict[str, Any]) -> list[str]:
    return [sys.executable, "-s", "-P", "-B", str(_INSIDE), role, json.dumps(settings)]


def _environment(scratch: str) -> dict[str, str]:
    """Nothing of the user's, so no token or key; sets are ordered the same in every run; one thread
    for every BLAS."""
    environment = {
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return environment | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
