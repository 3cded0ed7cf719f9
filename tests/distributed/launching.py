"""torchrun's own agent, whose processes are forked (see `new_process`) instead of started."""

import os
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from programs import call
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import LaunchConfig, elastic_launch

import new_process


class Done(NamedTuple):
    """How a launch ended, and what its processes said, the main one first."""

    failed: bool
    stdout: str
    stderr: str


def launch(processes: int, program: Callable[[], None], words: list[str], logs: Path, **environment: str) -> Done:
    """A program in several processes, as `torchrun --standalone` launches them.

    Args:
        processes: How many.
        program: What each does.
        words: Its command line.
        logs: A folder for what the processes say.
        environment: Set for each of them, beside this process's.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method=new_process.FORKED.get_start_method(),
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    with ThreadPoolExecutor(1) as thread:  # outside the main thread the agent leaves signals alone
        failed = thread.submit(_fails, config, program, words, os.environ | environment).result()
    said = {
        name: "".join(path.read_text() for path in sorted(logs.rglob(f"{name}.log"))) for name in ("stdout", "stderr")
    }
    return Done(failed, **said)


def _fails(config: LaunchConfig, *arguments: object) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        try:
            elastic_launch(config, call)(*arguments)
        except ChildFailedError:
            return True
    return False
