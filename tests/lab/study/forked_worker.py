"""The process of a study's run, forked from a server that has imported torch: to start Python and
import that takes seconds."""

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from new_process import FORKED


class ForkedWorker:
    """What the runner needs of `subprocess.Popen`, for a process forked from a server that has
    imported torch."""

    def __init__(self, job: Path, log: Path, environment: dict[str, str]) -> None:
        stdin, self._stdin = FORKED.Pipe(duplex=False)
        arguments = (job.resolve(), log.resolve(), environment, Path.cwd(), stdin)
        self._process = FORKED.Process(target=_work, args=arguments)
        self._process.start()
        stdin.close()
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def __enter__(self) -> "ForkedWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stdin.close()
        self.wait()


def _work(job: Path, log: Path, environment: dict[str, str], folder: Path, stdin: Connection) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(stdin.fileno(), 0)
    sys.stdin = os.fdopen(0)
    from svdtune.lab.study.worker import main

    sys.exit(main(job))
