"""A sandbox for programs that a model wrote: separate confined processes, no privileges needed
(Linux).

`inside/` is what runs in there: it is started by its path, with the standard library alone, and
never imported here.
"""

from svdtune.lab.sandbox.supervise import (
    Limits,
    Verdict,
    check_function,
    missing_protections,
    require_protections,
)

__all__ = ["Limits", "Verdict", "check_function", "missing_protections", "require_protections"]
