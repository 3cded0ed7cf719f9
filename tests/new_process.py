"""Functions called in new processes, which share nothing with the test but its environment.

They are forked from a server that has imported torch, Transformers and PEFT, and nothing of
svdtune: to start Python and import those takes seconds of a core, for every process.
"""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
# The server finds what is installed, not what pytest puts on the path; a module that it cannot
# import, it leaves out.
FORKED.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "transformers.trainer",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "peft",
    ]
)


def start(function: Callable[..., Any], *arguments: Any, **environment: str) -> Future[Any]:
    """Call a function in a new process; what it returns or raises is the future's.

    Args:
        function: Found by its module's name in the new process too.
        arguments: Pickled, as what it returns is.
        environment: Set for the new process, beside this one's.
    """
    pool = ProcessPoolExecutor(1, FORKED)
    called = pool.submit(_call, os.environ | environment, function, arguments)
    pool.shutdown(wait=False)
    return called


def loaded_by(module: str) -> set[str]:
    """The names of all modules that are loaded once a module is imported."""
    importlib.import_module(module)
    return set(sys.modules)


def _call(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ.clear()
    os.environ.update(environment)
    return function(*arguments)
