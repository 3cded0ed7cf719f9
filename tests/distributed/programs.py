"""What the processes of a run do: svdtune as it is, or with something done to it."""

import errno
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.fsdp as fsdp
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from tiny_steps import shard_on_cpu

from svdtune.errors import SvdtuneError
from svdtune.training import run
from svdtune.training.recipe import load_recipe
from svdtune.training.trainer import RunTrainer


def call(program: Callable[[], None], words: list[str], environment: dict[str, str]) -> None:
    """A program with words and an environment, in a process that a launcher has just started."""
    os.environ.update(environment)
    sys.argv = ["svdtune", *words]
    program()


def svdtune() -> None:
    """`python -m svdtune`."""
    runpy.run_module("svdtune", run_name="__main__")


def sharded_on_cpu() -> None:
    """Make Accelerate shard on the CPU, where it otherwise takes FSDP's settings for DDP's."""
    begin = PartialState.__init__

    def begin_as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_on_gpus
    fsdp.fully_shard = shard_on_cpu
    svdtune()


def with_an_odd_process() -> None:
    """Kill one process, or tell it to stop, in the middle of a step: ODD_PROCESS is "SIGNAL
    STEP"."""
    step = RunTrainer.training_step

    def step_or_end(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        name, number = os.environ["ODD_PROCESS"].split()
        if os.environ["RANK"] == "1" and self.state.global_step == int(number):
            os.kill(os.getpid(), getattr(signal, name))
        return step(self, *args, **kwargs)

    RunTrainer.training_step = step_or_end
    svdtune()


def end_of_a_run_on_a_full_disk(recipe: Path, when: str) -> str:
    """The sentence that a run ends with where the main process finds the disk full at its "start"
    or "end".

    Called without a launcher, which would end the processes that wait.
    """

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(run, {"start": "start_run", "end": "write_summary"}[when], fail)
    try:
        run.train(load_recipe(recipe))
    except SvdtuneError as error:
        return str(error)
    return ""
