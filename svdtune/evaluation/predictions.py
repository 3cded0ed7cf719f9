"""The predictions file: one JSON line an item, written so that an interruption loses nothing and a
rerun goes on."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks import Reference
from svdtune.system import replace_text, whole_lines


@dataclass(frozen=True)
class Prediction:
    """One graded item, as it stands in `predictions.jsonl`.

    Attributes:
        index: Position of the item in its data, from 0.
        id: The item's own name where the data has one, its index where not.
        prompt: The text the model was given.
        completion: The text it answered, special tokens left out.
        reference: The text to grade against.
        extracted: The answer that strict grading read out of the completion, None where it holds
            none.
        correct: Whether that answer is right; None where the task grades no single completions.
        paper_extracted: The answer that the paper's grading read out.
        paper_correct: Whether the paper's grading accepts it; None where no paper graded such
            items.
        tokens: Number of new tokens, the end token not counted.
        ended: Whether the model ended by itself; False where it was cut, at the length limit or in
            a loop.
        sample: Which of several completions of the item, from 0.
    """

    index: int
    id: str
    prompt: str
    completion: str
    reference: Reference
    extracted: str | None
    correct: bool | None
    paper_extracted: str | None
    paper_correct: bool | None
    tokens: int
    ended: bool
    sample: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Its place in the file."""
        return self.index, self.sample


class PredictionStore:
    """A folder with `settings.json`, `predictions.jsonl` and, once complete, `result.json`.

    Args:
        folder: Created where missing.
        settings: What the predictions depend on. A folder that holds predictions made with others
            is refused, so that two models' answers never mix.
        restart: Drop what the folder holds instead of continuing.

    Raises:
        SvdtuneError: If the folder holds predictions of other settings, a damaged file, or files of
            another origin.
        OSError: If the folder cannot be read or written.
    """

    FILES = RESULT, PREDICTIONS, SETTINGS = "result.json", "predictions.jsonl", "settings.json"

    def __init__(self, folder: Path, settings: dict[str, Any], restart: bool = False) -> None:
        self.folder = folder
        self._result, self._predictions, self._settings = (folder / name for name in self.FILES)
        if folder.exists() and not folder.is_dir():
            raise SvdtuneError(f"{folder} is a file; predictions need a folder of their own: name another output")
        folder.mkdir(parents=True, exist_ok=True)
        if restart:
            for path in (self._result, self._predictions, self._settings):
                path.unlink(missing_ok=True)
        self._check_settings(_placed(settings))
        self.done = self._read()

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add lines, and return only when the operating system says that they are on the disk."""
        predictions = list(predictions)
        with self._predictions.open("a", encoding="utf-8") as file:
            file.writelines(_line(prediction) for prediction in predictions)
            file.flush()
            os.fsync(file.fileno())
        self.done.update((prediction.place, prediction) for prediction in predictions)

    def finish(self, result: dict[str, Any]) -> None:
        """Put the lines into the data's order and write `result.json`; each file is replaced whole
        or not at all."""
        replace_text(self._predictions, "".join(_line(self.done[place]) for place in sorted(self.done)))
        replace_text(self._result, json.dumps(result, indent=2, ensure_ascii=False) + "\n")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        if not self._settings.exists():
            if self._predictions.exists():
                raise SvdtuneError(f"{self._predictions} has no {self._settings.name} beside it; {_WAY_OUT}")
            replace_text(self._settings, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            found = json.loads(self._settings.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no settings")
        except (ValueError, RecursionError) as error:
            raise SvdtuneError(f"{self._settings} cannot be read ({error}); {_WAY_OUT}") from error
        # Through JSON and back: tuples are lists there.
        wanted = json.loads(json.dumps(settings))
        found = _placed(found)
        changed = [key for key in wanted | found if wanted.get(key) != found.get(key)]
        if changed:
            differences = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in changed)
            raise SvdtuneError(f"{self.folder} holds predictions made with other settings ({differences}); {_WAY_OUT}")

    def _read(self) -> dict[tuple[int, int], Prediction]:
        """Read what an earlier run wrote."""
        if not self._predictions.exists():
            return {}
        done = {}
        for number, line in enumerate(whole_lines(self._predictions, cut=True), start=1):
            try:
                prediction = _parsed(line)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise SvdtuneError(f"{self._predictions}, line {number} is damaged ({error}); {_WAY_OUT}") from error
            done[prediction.place] = prediction
        return done


_WAY_OUT = "name another output folder, or start over with --restart"


def _placed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a model of this disk is one, however its path is spelt."""
    model = settings.get("model")
    if not isinstance(model, str) or not os.path.exists(place := os.path.expanduser(model)):
        return settings
    return {**settings, "model": os.path.realpath(place)}


def _line(prediction: Prediction) -> str:
    return json.dumps({**asdict(prediction), "digest": _digest(prediction)}, ensure_ascii=False) + "\n"


def _digest(prediction: Prediction) -> str:
    """16 hex digits over all fields: a byte that a disk changed would otherwise be somebody's
    answer."""
    return hashlib.sha256(json.dumps(asdict(prediction)).encode()).hexdigest()[:16]


def _parsed(line: bytes) -> Prediction:
    found = json.loads(line)
    digest = found.pop("digest", None)
    prediction = Prediction(**found)
    if digest != _digest(prediction):
        raise ValueError("it was altered since it was written")
    return prediction
