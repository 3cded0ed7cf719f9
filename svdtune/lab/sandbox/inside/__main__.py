"""Inside the sandbox: `python inside ROLE SETTINGS` confines itself, then plays one of three roles.

`program` runs foreign code and answers calls of one of its functions. `tests` runs a data set's
tests, whose calls it passes on to `program` over a pipe. They are two processes, so nothing that
foreign code does to its own interpreter, be it `os._exit(0)`, can make the tests pass: only right
answers can. `probe` says which protections this system lacks.
"""

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

from confine import confine
from values import decode, encode

_LINE = 1 << 24  # bytes of a call or an answer


class ProgramEndedError(BaseException):
    """The program is gone or out of step; no `except Exception` of a test may take that for the
    program's own error."""


def _send(stream: BinaryIO, message: Any) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    line = stream.readline(_LINE)
    if not line.endswith(b"\n"):
        raise ProgramEndedError("too long an answer" if line else "the program ended before its answer")
    return json.loads(line)


def _explain(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _run_program(function: str, calls: BinaryIO, answers: BinaryIO) -> None:
    """Execute program.py as a module, then answer each call of its function with a value or an
    exception."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        with open("program.py", encoding="utf-8") as file:
            exec(compile(file.read(), "program.py", "exec"), vars(module))
        target = vars(module)[function]
    # foreign code, so anything: SystemExit is as common as SyntaxError
    except BaseException as error:
        _send(answers, ["failed", _explain(error)])
        return
    _send(answers, ["ready"])
    while line := calls.readline():
        try:
            answer = ["value", encode(target(*map(decode, json.loads(line))))]
        except BaseException as error:
            answer = ["raised", type(error).__name__, str(error)[:500]]
        _send(answers, answer)


def _proxy(calls: BinaryIO, answers: BinaryIO) -> Callable[..., Any]:
    """A function that has the other process compute its value."""

    def candidate(*arguments: Any) -> Any:
        try:
            _send(calls, [encode(argument) for argument in arguments])
        except BrokenPipeError as error:
            raise ProgramEndedError("the program ended before a call") from error
        kind, *rest = _receive(answers)
        if kind == "value":
            return decode(rest[0])
        name, message = map(str, rest)
        found = getattr(builtins, name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            raise found(message)
        raise RuntimeError(f"{name}: {message}")

    return candidate


def _run_tests(function: str, calls: BinaryIO, answers: BinaryIO, verdict: BinaryIO) -> None:
    """Execute setup.py, then tests.py, then its `check` on the proxy; the last line sent is the
    verdict."""
    candidate = _proxy(calls, answers)
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        first = _receive(answers)
        if first != ["ready"]:
            _send(verdict, ["failed", str(first[-1])])
            return
        for name in ("setup.py", "tests.py"):
            with open(name, encoding="utf-8") as file:
                exec(compile(file.read(), name, "exec"), namespace)
            namespace[function] = candidate
        namespace["check"](candidate)
    except BaseException as error:
        _send(verdict, ["failed", _explain(error)])
        return
    _send(verdict, ["passed", ""])


def main() -> None:
    """Move the pipes out of the way of foreign code's own input and output, confine, and play the
    role."""
    role, settings = sys.argv[1], json.loads(sys.argv[2])
    sys.path.pop(0)  # this folder: foreign code has no business here
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    missing = confine(settings["scratch"], settings["limits"], settings["parent"])
    if role == "probe":
        _send(outgoing, missing)
    elif missing and not settings["allow_weaker"]:
        raise SystemExit("; ".join(missing))
    elif role == "program":
        _run_program(settings["function"], incoming, outgoing)
    else:
        # The tests send calls out and take answers in; the verdict has a pipe of its own.
        with os.fdopen(settings["verdict"], "wb") as verdict:
            _run_tests(settings["function"], outgoing, incoming, verdict)
    os._exit(0)  # exit handlers and destructors of foreign code have no say


main()
