"""Programs that mean harm: each is denied what it tries, counts as failed, and leaves nothing
behind."""

import os
import runpy
import select
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from new_process import FORKED
from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.lab.sandbox import Limits, Verdict, check_function, missing_protections, supervise

try:
    LACKING = "; ".join(missing_protections())
except SvdtuneError as error:
    LACKING = str(error)
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"this system has no whole sandbox: {LACKING}")

DOUBLES = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate([1]) == [1, 1]\n"
RIGHT = "def f(x):\n    return x * 2\n"
HOUR = 3600
# for what ends by itself, on however busy a machine
AMPLE = Limits(wall_seconds=HOUR, cpu_seconds=HOUR)
ENDLESS = Limits(wall_seconds=HOUR, cpu_seconds=1)
ASLEEP = Limits(wall_seconds=0.5)


def run(program: str, tests: str = DOUBLES, limits: Limits = AMPLE, setup: str = "") -> Verdict:
    return check_function(program, "f", tests, setup, limits)


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert run(RIGHT) == Verdict(True, "")
    wrong = run("def f(x):\n    return 4\n")
    assert not wrong.passed
    assert wrong.reason.startswith("AssertionError")


def test_a_program_may_compute_print_import_and_use_its_scratch_folder():
    program = """
import collections, dataclasses, hashlib, heapq, itertools, json, math, random, re, string, tempfile, typing
from fractions import Fraction
def f(x):
    print("working")
    with open("notes.txt", "w") as file:
        file.write("x")
    with tempfile.NamedTemporaryFile("w+") as file:
        file.write(open("notes.txt").read())
    hashlib.md5(b"x").hexdigest()
    random.random()
    return x * 2
"""
    verdict = run(program)
    assert verdict.passed, verdict.reason


DENIED = [
    "os.fork()",
    "while True: os.fork()",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "import subprocess; subprocess.run(['/bin/true'])",
    "os.execv('/bin/true', ['true'])",
    "os.setsid()",
    "os.kill(os.getppid(), 9)",
    "os.kill(-1, 9)",
    "os.kill(os.getpid(), 9)",
    "os.killpg(os.getpgid(os.getppid()), 9)",
    "import signal; signal.pidfd_send_signal(0, 9)",
    "import fcntl; fcntl.fcntl(2, fcntl.F_SETOWN, os.getppid())",
    "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
    "os.setuid(0)",
    "os.nice(1)",
    "os.sched_setaffinity(0, {0})",
    "import socket; socket.socket()",
    "import socket; socket.create_connection(('127.0.0.1', 1))",
    "import socket; socket.socketpair()",
    "open('/etc/passwd').read()",
    "open('/proc/self/mem', 'rb').read()",
    "open(f'/proc/{os.getppid()}/environ').read()",
    "os.listdir('/')",
    "os.listdir('/proc')",
    "open('../tests/tests.py').read()",
    "open(sys.prefix + '/written', 'w')",
    "open('/tmp/written', 'w')",
    "open('../written', 'w')",
    "open('/dev/shm/written', 'w')",
    "open('/dev/full')",
    "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "os.truncate(os.__file__, 0)",
    "os.chmod(os.__file__, 0o777)",
    "os.chmod('.', 0o777)",
    "os.utime(os.__file__)",
    "os.chown('.', 1, 1)",
    "os.remove(os.__file__)",
    "os.rename(os.__file__, 'stolen')",
    "os.link(os.__file__, 'linked')",
    "os.symlink('/etc', 'etc')",
    "os.mkdir('folder')",
    "os.mkfifo('pipe')",
    "os.chroot('.')",
    "os.memfd_create('hidden')",
    "os.setxattr('.', 'user.x', b'')",
]


def test_what_is_denied():
    program = """
import os, sys
def f(statement):
    try:
        exec(statement)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""
    # setrlimit words the same refusal as a ValueError
    tests = f"""
def check(candidate):
    for statement in {DENIED!r}:
        said = candidate(statement)
        assert str(said).startswith(("PermissionError", "ValueError: not allowed to raise maximum limit")), (statement, said)
"""
    assert run(program, tests) == Verdict(True, "")


def test_threads_are_denied():
    verdict = run("import threading\ndef f(x):\n    threading.Thread(target=print).start()\n    return x * 2\n")
    assert "can't start new thread" in verdict.reason


def test_raw_system_calls_are_denied_as_well():
    # ptrace, process_vm_writev, io_uring_setup, bpf, kill, unshare, mount, clone3
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    for number in (101, 311, 425, 321, 62, 272, 165, 435, 0x40000000 + 62):
        if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
            return None
    return x * 2
"""
    verdict = run(program)
    assert verdict.passed, verdict.reason


def test_the_users_environment_is_out_of_sight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    tests = "def check(candidate):\n    assert 'HF_TOKEN' not in candidate()\n    assert 'PATH' not in candidate()\n"
    assert run("import os\ndef f():\n    return list(os.environ)\n", tests).passed


@pytest.mark.parametrize(
    ("program", "limits", "reason"),
    [
        ("def f(x):\n    while True: pass", ENDLESS, "ProgramEndedError: the program ended"),
        ("while True: pass", ENDLESS, "ProgramEndedError: the program ended"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            ENDLESS,
            "ProgramEndedError: the program ended",
        ),
        ("import time\ntime.sleep(10**6)", ASLEEP, "not done after 0.5 s"),
        ("import sys\nsys.stdin.read()\nwhile True: print('x' * 1000)", AMPLE, "printed more than 65536 bytes"),
        ("import os\nwhile True: os.write(2, b'x' * 1000)", AMPLE, "printed more than 65536 bytes"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", replace(AMPLE, memory_bytes=1 << 28), "MemoryError"),
        ("x = bytearray(10**12)", AMPLE, "MemoryError"),
        ("open('big', 'wb').write(b'x' * 10**8)", AMPLE, ("OSError", "wrote more")),
        ("for i in range(10**7): open(str(i), 'w').close()", AMPLE, "wrote more than"),
        ("import itertools\ndef f(x):\n    return itertools.count()", ENDLESS, ""),
        ("def f(x):\n    return 'x' * 10**8", AMPLE, "ProgramEndedError: too long an answer"),
    ],
)
def test_limits(program: str, limits: Limits, reason: str | tuple[str, ...]):
    verdict = run(program, limits=limits)
    assert not verdict.passed
    assert verdict.reason.startswith(reason), verdict


@pytest.mark.parametrize(
    "program",
    [
        "def f(x):\n    return f(x)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)",
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\ndef f(y):\n    return repr(x)",
        "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
        "import ctypes\ndef f(x):\n    ctypes.string_at(0)",
    ],
)
def test_deep_recursion_and_crashes_fail(program: str):
    assert not run(program, limits=ENDLESS).passed


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import os\ndef f(x):\n    os._exit(0)",
        "raise SystemExit(0)",
        "def f(x):\n    raise SystemExit(0)",
        "def f(x):\n    raise KeyboardInterrupt",
        "",
        "def g(x):\n    return x * 2",
        "def f(x:\n    return",
        "class Same:\n    def __eq__(self, other): return True\ndef f(x):\n    return Same()",
        "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def f(x):\n    return Same(5)",
        'print(\'["passed", ""]\')',
        'import os\nfor fd in range(100):\n    try: os.write(fd, b\'["passed", ""]\\n\' * 3)\n    except OSError: pass',
        "import os\nfor fd in range(100):\n    try: os.close(fd)\n    except OSError: pass",
        # the tests ask in another process: neither patched builtins nor a patched runner reach it
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.isinstance = lambda *_: True\ndef f(x): return 0",
        'import __main__\n__main__._send = lambda stream, message: stream.write(b\'["passed", ""]\\n\')\n'
        "def f(x):\n    return 0",
        "import sys\nsys.modules['values'].encode = lambda value: ['object', 'x']\ndef f(x):\n    return 0",
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals.clear()\n    frame = frame.f_back",
        'import os\nos.write(4, b\'["ready"]\\n["raised", "SystemExit", "0"]\\n\')\nimport time\ntime.sleep(100)',
        'import os\nos.write(4, b\'["ready"]\\n["value"]\\n\')\nimport time\ntime.sleep(100)',
        "import os\nos.write(4, b'[\"ready\"]\\n' + b'[' * 10**6 + b'\\n')\nimport time\ntime.sleep(100)",
        "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.excepthook = lambda *_: os._exit(0)\n1 / 0",
    ],
)
def test_the_verdict_cannot_be_forged(program: str):
    assert not run(program, limits=Limits(wall_seconds=2)).passed


def test_exceptions_reach_the_tests_by_their_type():
    tests = """
def check(candidate):
    for argument, kind in (("x", ValueError), ([], TypeError)):
        try:
            candidate(argument)
        except kind:
            continue
        raise AssertionError(kind)
"""
    assert run("def f(x):\n    return int(x)", tests).passed


VALUES = [
    "None", "True", "-(10**5000)", "0.1", "float('inf')", "1 + 2j", "'\\ud800ü\\n'", "b'\\x00\\xff'", "[1, (2, {3})]",
    "{1: [2], 'a': None, (1, 2): frozenset({1})}", "range(1, 9, 2)", "__import__('fractions').Fraction(1, 3)",
]  # fmt: skip


def test_plain_values_cross_unchanged():
    tests = "def check(candidate):\n"
    for value in VALUES:
        tests += (
            f"    value = candidate({value})\n    assert value == {value}\n    assert type(value) is type({value})\n"
        )
    verdict = run("def f(x):\n    return x", tests)
    assert verdict.passed, verdict.reason


def test_setup_is_the_tests_and_not_the_programs():
    setup = "def helper(x):\n    return x + 1\n"
    tests = "def check(candidate):\n    assert candidate(helper(1)) == 4\n"
    assert run(RIGHT, tests, setup=setup).passed
    assert not run("def f(x):\n    return helper(x)", tests, setup=setup).passed


def test_threads_of_the_caller_may_check_side_by_side():
    programs = [RIGHT, "def f(x):\n    return 0", RIGHT, "import os\nos._exit(0)"] * 2
    with ThreadPoolExecutor(4) as pool:
        assert [verdict.passed for verdict in pool.map(run, programs)] == [True, False, True, False] * 2


def test_a_system_that_lacks_a_protection_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervise, "missing_protections", lambda: ("Landlock, which this kernel does not offer",))
    with pytest.raises(SvdtuneError, match="it lacks Landlock"):
        run(RIGHT)
    monkeypatch.setenv("SVDTUNE_SANDBOX", "weaker")
    with pytest.warns(SvdtuneWarning, match="run without Landlock"):
        assert run(RIGHT).passed


def test_a_dead_program_is_not_taken_for_an_exception_that_a_test_expects():
    tests = """
def check(candidate):
    try:
        candidate(-1)
    except Exception:
        return
    raise AssertionError
"""
    assert run("def f(x):\n    raise ValueError", tests).passed
    assert not run("import os\ndef f(x):\n    os._exit(0)", tests).passed


def watch_a_sleeper(pids: Connection) -> None:
    """Send the ids of the confined processes, then watch over them for as long as this process
    lives."""
    kept = supervise.subprocess.Popen

    def popen(*args, **kwargs):
        process = kept(*args, **kwargs)
        pids.send(process.pid)
        return process

    supervise.subprocess.Popen = popen
    run("import time\ntime.sleep(10**6)", limits=Limits(wall_seconds=10**6))


def test_it_dies_with_the_process_that_watches_it():
    pids, other_end = FORKED.Pipe(duplex=False)
    watcher = FORKED.Process(target=watch_a_sleeper, args=(other_end,))
    watcher.start()
    handles = [os.pidfd_open(pids.recv()) for _ in range(2)]
    watcher.kill()
    watcher.join()
    for handle in handles:
        select.select([handle], [], [])  # for as long as a confined process outlives its watcher
        os.close(handle)


def allows(program: list[tuple[int, int, int, int]], number: int, arguments: tuple[int, ...], audit: int) -> bool:
    """Interpret a filter: what the kernel would say of a system call."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    value = at = 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x20:
            value = int.from_bytes(data[operand : operand + 4], "little")
        elif code == 0x54:
            value &= operand
        elif code == 0x15:
            at += if_true if value == operand else if_false
        else:
            return operand == 0x7FFF0000


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_its_list_and_nothing_else(machine: str):
    syscalls = runpy.run_path(str(Path(supervise.__file__).parent / "inside" / "syscalls.py"))
    column, audit = syscalls["ARCHITECTURES"][machine]
    program = [
        (code, if_true, if_false, operand)
        for code, if_true, if_false, operand in struct.iter_unpack("HBBI", syscalls["filter_program"](machine))
    ]
    numbers = {name: pair[column] for name, pair in syscalls["ALLOWED"].items() if pair[column] is not None}
    unconditional = {number for name, number in numbers.items() if name not in syscalls["CHECKS"]}
    fine = tuple(1 for _ in range(6))  # F_GETFD, O_WRONLY; no ioctl and no prlimit
    assert {number for number in range(1000) if allows(program, number, fine, audit)} == unconditional | {
        numbers[name] for name in ("open", "openat", "fcntl") if name in numbers
    }
    assert not allows(program, numbers["read"], fine, 0x40000003)  # another architecture's numbers
    for arguments, expected in [
        ((0, 1, 0, 0), True), ((0, 1, 1, 0), False), ((0, 1, 1 << 32, 0), False), ((5, 1, 0, 0), False),
    ]:  # fmt: skip
        assert allows(program, numbers["prlimit64"], arguments, audit) is expected
    for flags, expected in [(0, True), (0o1000, False), (0o1001, True), (0o1002, True), (0o1003, False)]:
        assert allows(program, numbers["openat"], (0, 0, flags), audit) is expected
    assert [number for number in range(2000) if allows(program, numbers["fcntl"], (0, number), audit)] == [
        0, 1, 2, 3, 4, 1030,
    ]  # fmt: skip
    assert allows(program, numbers["ioctl"], (0, 0x5413), audit)
    # TIOCSTI: typing into a terminal
    assert not allows(program, numbers["ioctl"], (0, 0x5412), audit)
