"""`svdtune` with one process that is killed, or told to stop, in the middle of a step: ODD_PROCESS is "SIGNAL STEP"."""

import os
import signal
from typing import Any

from svdtune.cli import main
from svdtune.training.trainer import RunTrainer

_step = RunTrainer.training_step


def _step_or_end(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
    name, step = os.environ["ODD_PROCESS"].split()
    if os.environ["RANK"] == "1" and self.state.global_step == int(step):
        os.kill(os.getpid(), getattr(signal, name))
    return _step(self, *args, **kwargs)


if __name__ == "__main__":
    RunTrainer.training_step = _step_or_end
    main()
