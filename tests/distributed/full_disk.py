"""Training where the main process finds the disk full at FULL_AT, "start" or "end"; prints what this process ends with.

Started without a launcher, which would end the processes that wait.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.training import run
from svdtune.training.recipe import load_recipe


def _fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


if __name__ == "__main__":
    setattr(run, {"start": "start_run", "end": "write_summary"}[os.environ["FULL_AT"]], _fail)
    try:
        run.train(load_recipe(Path(sys.argv[1])))
    except SvdtuneError as error:
        print(error)
