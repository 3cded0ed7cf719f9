"""A folder that appears whole or not at all: written beside its place, then moved there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdtune.errors import SvdtuneError
from svdtune.system import explain_write_errors, to_disk


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes `output` if the body succeeds and vanishes if it does not.

    It lies beside `output`, hence on the same file system, so the move is one step.

    Raises:
        SvdtuneError: If `output` exists and is not an empty folder, or cannot be written.
    """
    output = output.expanduser().absolute()
    check_new_folder(output)
    with explain_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        with explain_write_errors(output):
            work.chmod(0o777 & ~_umask())  # mkdtemp makes it private; a result gets the usual permissions
            yield work
            for path in work.rglob("*"):
                if path.is_file():
                    to_disk(path)
                    path.chmod(0o666 & ~_umask())  # so does each file: safetensors makes its own private
            work.replace(output)  # an empty folder gives way; anything that appeared there meanwhile does not
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_new_folder(output: Path) -> None:
    """Refuse an output that exists, unless it is an empty folder.

    Raises:
        SvdtuneError: Saying what is there.
    """
    if output.is_dir():
        if any(output.iterdir()):
            raise SvdtuneError(
                f"the output folder {output} is not empty; nothing there is overwritten: name another one"
            )
    elif output.exists() or output.is_symlink():
        raise SvdtuneError(f"{output} exists and is not a folder; name another output")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
