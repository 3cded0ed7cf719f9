"""Confine the running process for good, without privileges: resource limits, Landlock, no
capabilities, seccomp.

Runs inside the sandbox's own interpreter, before the first line of foreign code, with the standard
library alone.
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from syscalls import restrict_syscalls

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
# by Landlock ABI
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = (
    1 << 1,
    1 << 2,
    1 << 3,
    1 << 5,
    1 << 8,
    1 << 14,
)
_TCP, _SCOPES = 3, 3  # bind and connect; abstract sockets and signals

# What an interpreter reads besides its own folders. Not among them: /proc, /sys, /etc/passwd,
# anybody's home.
SYSTEM_FILES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
    "/etc/localtime", "/etc/ssl/openssl.cnf", "/dev/urandom", "/dev/zero",
)  # fmt: skip


def confine(scratch: str, limits: dict[str, Any], parent: int) -> list[str]:
    """Give up everything a program under test has no use for.

    Args:
        scratch: The only folder to write in.
        limits: those of `supervise.Limits`.
        parent: Process to die with.

    Returns:
        The protections that this system does not offer, in words; empty where all are in force.
    """
    if sys.platform != "linux":
        _limit(limits)
        return [f"Landlock and seccomp, which {sys.platform} does not have: files and network stay open"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    _limit(limits)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    missing = [_restrict_files(libc, scratch)]
    _drop_capabilities(libc)
    missing.append(restrict_syscalls(libc))
    return [reason for reason in missing if reason]


def _limit(limits: dict[str, Any]) -> None:
    wanted = {
        "RLIMIT_CPU": limits["cpu_seconds"],
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["scratch_bytes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        # a second lock: seccomp already denies fork and clone, and root is exempt from this one
        "RLIMIT_NPROC": 0,
    }
    for name, value in wanted.items():
        if sys.platform == "linux" or name in ("RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_CORE"):
            resource.setrlimit(getattr(resource, name), (value, value))


def _restrict_files(libc: ctypes.CDLL, scratch: str) -> str | None:
    """Allow reading the interpreter and the system's libraries, and writing in `scratch`; deny all
    other files."""
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return "Landlock, which this kernel does not offer (Linux 5.13 or later, switched on): files stay readable"
    rights = _FS_RIGHTS[max(known for known in _FS_RIGHTS if known <= abi)]
    attributes = struct.pack("QQQ", rights, _TCP, _SCOPES)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    reading = _READ_FILE | _READ_DIR
    writing = reading | _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | (_TRUNCATE & rights)
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(os.__file__).parent)}
    for path in sorted(own | set(SYSTEM_FILES)):
        _allow(libc, ruleset, path, reading)
    _allow(libc, ruleset, "/dev/null", _READ_FILE | _WRITE_FILE)
    _allow(libc, ruleset, scratch, writing)
    refused = libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return f"Landlock ({errno.errorcode.get(ctypes.get_errno(), 'error')}): files stay readable" if refused else None


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Add a rule for a folder or file; for one that does not exist there is nothing to allow."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
    libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Even root then is a user like any other."""
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), 8)
    libc.syscall(_CAPSET.get(os.uname().machine, -1), header, ctypes.create_string_buffer(24))
