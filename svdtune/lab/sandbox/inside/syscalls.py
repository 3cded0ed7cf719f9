"""The system calls a confined program may make, and the seccomp filter that turns every other one
into EPERM.

The list holds what CPython and compiled extensions need to compute, to read libraries and to use
plain files in a scratch folder. It holds no way to start a process or a thread, to open a socket,
to signal or trace another process, to change the mode, owner or times of a file, or to raise a
limit.
"""

import ctypes
import errno
import platform
import struct
from typing import NamedTuple

# name: (x86_64, aarch64); None where the architecture has no such call.
ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "open": (2, None), "openat": (257, 56), "creat": (85, None), "close": (3, 57), "close_range": (436, 436),
    "lseek": (8, 62), "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83), "getdents64": (217, 61),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getcwd": (79, 17), "umask": (95, 166), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "fcntl": (72, 25), "ioctl": (16, 29),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "mmap": (9, 222), "mremap": (25, 216), "munmap": (11, 215), "mprotect": (10, 226), "madvise": (28, 233),
    "brk": (12, 214), "futex": (202, 98), "rseq": (334, 293), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "prlimit64": (302, 261),
    "sysinfo": (99, 179), "uname": (63, 160), "getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

# column in ALLOWED, AUDIT_ARCH_*
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


class Check(NamedTuple):
    """What an allowed call's argument must be: the 32-bit word, masked, is (or is not) one of the
    values."""

    word: int  # 2·argument for its low half, +1 for its high half
    mask: int
    values: tuple[int, ...]
    among: bool = True


_ALL = 0xFFFFFFFF
# Opening for reading with O_TRUNC empties a file, and the first Landlock versions do not see that.
_TRUNCATING = 0o1003, (0o1000, 0o1003), False
CHECKS = {
    "open": [Check(2 * 1, *_TRUNCATING)],
    "openat": [Check(2 * 2, *_TRUNCATING)],
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: not F_SETOWN, which sends
    # signals to others.
    "fcntl": [Check(2 * 1, _ALL, (0, 1, 2, 3, 4, 1030))],
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": [Check(2 * 1, _ALL, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451))],
    # Of this process (0), and reading only (no new limit).
    "prlimit64": [Check(0, _ALL, (0,)), Check(2 * 2, _ALL, (0,)), Check(2 * 2 + 1, _ALL, (0,))],
}

_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _verdict(checks: list[Check]) -> list[bytes]:
    """Instructions that allow a call if all checks hold and deny it if not."""
    ops = []
    for word, mask, values, among in checks:
        ops += [_op(_LOAD, _ARGUMENTS + 4 * word), _op(_AND, mask)]
        if among:
            ops += [_op(_EQUAL, value, if_true=len(values) - i) for i, value in enumerate(values)]
            ops.append(_op(_RETURN, _DENY))
        else:
            for value in values:
                ops += [_op(_EQUAL, value, if_false=1), _op(_RETURN, _DENY)]
    return [*ops, _op(_RETURN, _ALLOW)]


def filter_program(machine: str) -> bytes:
    """The BPF program for an architecture, 8 bytes an instruction."""
    column, audit = ARCHITECTURES[machine]
    ops = [_op(_LOAD, _ARCHITECTURE), _op(_EQUAL, audit, if_true=1), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    for name, numbers in ALLOWED.items():
        number = numbers[column]
        if number is not None:
            verdict = _verdict(CHECKS.get(name, []))
            ops += [_op(_EQUAL, number, if_false=len(verdict)), *verdict]
    return b"".join([*ops, _op(_RETURN, _DENY)])


def restrict_syscalls(libc: ctypes.CDLL) -> str | None:
    """Put the filter in force, for good; the reason where that cannot be done. Needs
    no_new_privs."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return f"no list of system calls for {machine}"
    program = filter_program(machine)
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header, len(header)), 0, 0):
        return f"the kernel refused a seccomp filter ({errno.errorcode.get(ctypes.get_errno(), 'error')})"
    return None
