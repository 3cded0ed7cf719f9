"""Where svdtune meets the machine: files and folders that appear whole or not at all, and what full
disks and memory mean.

Light to import: the command line takes its last resort from here.
"""

import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    from rich.console import Console

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file is larger than this system allows",
    errno.EACCES: "you have no permission to write there",
    errno.EPERM: "you have no permission to write there",
    errno.ENOENT: "there is no such place",
    errno.EROFS: "that file system is read-only",
    errno.ENOTDIR: "a part of that path is a file",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENAMETOOLONG: "that name is too long",
    errno.EEXIST: "something of that name is in the way",
    errno.ENOTEMPTY: "something of that name is in the way",
    errno.EIO: "the disk does not answer as it should (an input/output error)",
}
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of a line
_UNWRAPPED = 1000  # characters, which no line of ours has
_READING = {errno.EACCES: "you have no permission to read it", errno.EPERM: "you have no permission to read it"}


def open_console(*, stderr: bool = False, quiet: bool = False) -> "Console":
    """A console on standard output or standard error. It wraps lines in a terminal and in a
    notebook; elsewhere what reads them wants them whole."""
    from rich.console import Console

    made = Console(stderr=stderr, quiet=quiet)
    if not made.is_terminal and not made.is_jupyter and "COLUMNS" not in os.environ:
        made.width = _UNWRAPPED
    return made


def without_bar(progress: bool | None) -> bool:
    """What tqdm takes as `disable`.

    Args:
        progress: what was asked for. None: a bar where standard error is a terminal, or a
            notebook's, which tqdm itself takes for a file.
    """
    if progress is not None:
        return not progress
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return not (sys.stderr.isatty() or hasattr(shell, "kernel"))


@contextmanager
def explain_write_errors(path: Path, advice: str = "name another output") -> Iterator[None]:
    """Turn what the operating system says about writing below `path` into one clear SvdtuneError.

    Covers Rust's libraries, which give its number in a text, and `torch.save`, which gives none.

    Args:
        path: what was to be written.
        advice: what to do, the end of the message.
    """
    try:
        yield
    except Exception as error:
        reason = _write_reason(error, path)
        if reason is None:
            raise
        raise SvdtuneError(f"cannot write {path}: {reason}; {advice}") from error


def errno_of(error: Exception) -> int:
    """The number of what the operating system refused, 0 where it refused nothing. Libraries in
    Rust (safetensors, tokenizers) have it in their text, in exceptions of any type."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _write_reason(error: Exception, path: Path) -> str | None:
    """Why a write failed, None where the error is about something else."""
    if number := errno_of(error):
        return _REASONS.get(number)
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|iostream error", str(error)):
        return f"writing stopped half-way, with {free_bytes(path) / 1e6:,.0f} MB left on the disk"
    return None


def free_bytes(path: Path) -> int:
    """What is free on the disk that a path lies on, or would."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free


def check_free(path: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk has no room for: `needed` bytes for `what`.

    Raises:
        SvdtuneError: less is free.
    """
    if (free := free_bytes(path)) < needed:
        raise SvdtuneError(
            f"{path} needs {needed / 1e6:,.0f} MB for {what}, and {free / 1e6:,.0f} MB are free on that disk; free some, or "
            "name another place (output.dir)"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def printable(text: str) -> str:
    """A text of somebody else's for a terminal: characters that steer one are spelled out."""
    return "".join(character if _harmless(character) else f"\\x{ord(character):02x}" for character in text)


def _harmless(character: str) -> bool:
    return character in "\n\t" or not (unicodedata.category(character) == "Cc" or character in _TURNING)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def explain_damage(what: str, advice: str = "") -> Iterator[None]:
    """Turn what a library says of somebody else's files into one SvdtuneError between `what` and
    `advice`. It comes as any of a dozen types, some of them nobody's. What is ours, and a lack of
    memory, stays as it is."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, SvdtuneError):
            raise
        raise SvdtuneError(f"{what}: {first_line(error):.300}{advice}") from error


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Import inside it what an extra of svdtune brings.

    Args:
        what: the beginning of the message: what needs which package.
        extra: of pyproject.toml.

    Raises:
        SvdtuneError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise SvdtuneError(f"{what}: pip install 'svdtune[{extra}]'") from error


def explain_read_error(error: OSError) -> str:
    """Why a file cannot be read, as the end of a sentence."""
    return _READING.get(error.errno or 0) or _REASONS.get(error.errno or 0) or error.strerror or str(error)


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode())


def write_text(path: Path, text: str, advice: str = "name another output") -> None:
    """Write a text whole or not at all, and its folder where that is missing.

    Raises:
        SvdtuneError: it cannot be written; `advice` is the end of the message.
    """
    with explain_write_errors(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)


def write_json(path: Path, document: Any, advice: str = "name another output", indent: int | None = 2) -> None:
    """`write_text` of a document as JSON."""
    write_text(path, json.dumps(document, indent=indent) + "\n", advice)


def plain(value: Any) -> Any:
    """A value in what JSON has; what it does not have, as text, and a number that is none, as
    None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # JSON has no other numbers
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with one object, in which no key stands twice.

    Raises:
        SvdtuneError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise SvdtuneError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise SvdtuneError(f"{path} is damaged: expected a JSON object, found a {type(found).__name__}")
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object, of which Python would take the last of equal keys.

    Raises:
        ValueError: a key stands there twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} stands there twice; remove one of them")
        found[key] = value
    return found


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file beside its place, then move it there: a reader sees the old one or the new one,
    never a part.

    It is on the disk when this returns. A kill leaves at most `NAME.new` behind, which the next
    write takes over. A link stays one, and what is no file (a device, a pipe) is written into.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as stream:
            stream.write(data)
        return
    with fresh_file(path) as fresh:
        fresh.write_bytes(data)


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to. What is written there is moved to `path` if the body
    succeeds, and vanishes if it does not."""
    fresh = path.with_name(path.name + ".new")
    try:
        yield fresh
        to_disk(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes `output` if the body succeeds and vanishes if
    it does not.

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
            # mkdtemp makes it private; a result gets the usual permissions
            work.chmod(0o777 & ~_umask())
            yield work
            for path in work.rglob("*"):
                if path.is_file():
                    to_disk(path)
                    # so does each file: safetensors makes its own private
                    path.chmod(0o666 & ~_umask())
            # an empty folder gives way; anything that appeared there meanwhile does not
            work.replace(output)
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


def check_new_file(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be replaced.

    Raises:
        SvdtuneError: Saying what to do.
    """
    if output.exists() and not overwrite:
        raise SvdtuneError(f"{output} is there already; name another --output, or give --overwrite")


def whole_lines(path: Path, *, cut: bool = False) -> list[bytes]:
    """The lines of a file that is appended to, without their ends or the half line that a power cut
    can leave at the end.

    Args:
        path: The file.
        cut: Take that half line off the file, which is then gone on with.

    Raises:
        OSError: If the file cannot be read or cut.
    """
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if cut and len(whole) < len(text):
        os.truncate(path, len(whole))
    return whole.split(b"\n")[:-1]


def read_objects(path: Path, damaged: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The whole lines of a file that is appended to, each a JSON object; none where there is no
    file.

    Args:
        path: The file.
        damaged: Takes a sentence for each line that is something else, which is left out.

    Raises:
        ValueError: A line is something else, and `damaged` is None.
    """
    found = []
    for number, line in enumerate(whole_lines(path) if path.is_file() else [], 1):
        try:
            read = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
            if not isinstance(read, dict):
                raise ValueError(f"expected a JSON object, found a {type(read).__name__}")
            found.append(read)
        except (ValueError, RecursionError) as error:
            reason = "its values lie too deep in each other" if isinstance(error, RecursionError) else str(error)
            if damaged is None:
                raise ValueError(f"line {number}: {reason}") from error
            damaged(f"line {number} of {path.name} is damaged and is left out: {reason}")
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_disk(path: Path) -> None:
    """Wait until a file is on the disk: a power cut must not leave a folder under its name, and its
    files empty."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU's or the host's memory is used up."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch for it
    said = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")
    return named or isinstance(error, MemoryError) or any(words in str(error) for words in said)


def last_resort(error: Exception) -> str | None:
    """One sentence about an error of the machine that nothing nearer explained, None if it is not
    the machine's."""
    if is_out_of_memory(error):
        return "out of memory: give it smaller batches, a smaller model, or a machine with more"
    if isinstance(error, OSError) and error.errno in set(_REASONS) - {errno.ENOENT} and error.filename is not None:
        return f"cannot use {error.filename}: {_REASONS[error.errno].removesuffix(' to write there')}"
    if (number := errno_of(error)) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"cannot write: {_REASONS[number]}"
    return None
