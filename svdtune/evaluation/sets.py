"""Evaluate a run, an adapter or a model on one data set or on several.

source → all questions, before the model → the model, once → set by set → their averages
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.averages import Average, average, average_json, no_average
from svdtune.evaluation.questions import ask, decoding_of, output_folder, prepare, sets_to_ask
from svdtune.evaluation.score_table import add_scores
from svdtune.evaluation.scores import Evaluation
from svdtune.evaluation.tasks import HARNESSES
from svdtune.evaluation.vllm import VllmEngine, open_vllm
from svdtune.export import Source, open_source
from svdtune.models import LoadedModel
from svdtune.models.loader import locate, placement
from svdtune.system import read_json, write_json
from svdtune.training.folder import trained_weights
from svdtune.training.lock import held

ENGINES = ("transformers", "vllm")
OnProgress = Callable[[int, int], None]
# (name of the data set, folder) → what is called with (completions done, completions in all)
Watch = Callable[[str, Path], AbstractContextManager[OnProgress | None]]
# (name of the data set, its outcome, how many sets there are)
OnResult = Callable[[str, Evaluation, int], None]


@dataclass(frozen=True, eq=False)
class Evaluations(Mapping[str, Evaluation]):
    """The outcome on each data set, by the set's name.

    Attributes:
        results: the outcomes.
        averages: over the sets, by mode (strict, paper); empty for a single set, and for sets
            that are graded differently.
        file: where the averages are kept; of a harness, its results; else None.
        table: what a harness such as lm-eval says of its tasks; None for svdtune's own tasks.
    """

    results: dict[str, Evaluation] = field(default_factory=dict)
    averages: dict[str, Average] = field(default_factory=dict)
    file: Path | None = None
    table: str | None = None

    def __getitem__(self, name: str) -> Evaluation:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, strictly graded; of several sets, the mean of theirs. None
        where nothing is right or wrong, such as E2E's texts."""
        if len(self.results) == 1:
            return next(iter(self.results.values())).accuracy
        return self.averages["strict"].macro if "strict" in self.averages else None


def evaluate_source(
    source: Source | LoadedModel,
    name: str,
    data: str | None = None,
    *,
    task: str | None = None,
    form: Mapping[str, Any] | None = None,
    decoding: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    engine: str = "transformers",
    dtype: str | None = None,
    device: str | None = None,
    output: Path | None = None,
    restart: bool = False,
    watch: Watch = lambda *_: nullcontext(),
    on_result: OnResult = lambda *_: None,
) -> Evaluations:
    """Score what `find_source` found, or a loaded model.

    Args:
        source: what answers.
        name: of it, for folders.
        data: a data set or a group; None for those of the run's recipe.
        task: how to grade, or HARNESS:TASK,...; None as the data set asks for.
        form: further arguments of `svdtune.evaluation.questions.prepare`, None for those left open.
        decoding: fields of `Decoding`, None for those left to the run's recipe.
        batch_size: completions generated together.
        engine: one of `ENGINES`.
        dtype, device: of the model; None as the run's evaluation section says, else as the run was
            trained, and a GPU where there is one.
        output: folder for predictions and results; None for the run's own.
        restart: drop earlier predictions there.
        watch: around the questions of one set.
        on_result: called after each set.

    Raises:
        SvdtuneError: a part is missing, a setting has no meaning, or a folder cannot be written.
    """
    named = None if isinstance(source, LoadedModel) else source
    recipe, run, adapter = (named.recipe, named.run, named.adapter) if named else (None, None, None)
    if isinstance(source, Source):
        locate(source.base)  # a model that is not there shows before its questions are read
    if dtype is None and recipe is not None and recipe.evaluation is not None:
        dtype = recipe.evaluation.dtype
    harness, _, tasks = (task or "").partition(":")
    if tasks and harness in HARNESSES:
        folder = output or output_folder(run, name, harness, tasks.replace(",", "-"))
        with _opened(source, "transformers", dtype, device) as model:
            limit = (form or {}).get("limit")
            table = HARNESSES[harness](model, tasks.split(","), folder, batch_size=batch_size, limit=limit)
        return Evaluations(file=folder / "results.json", table=table)
    how = replace(decoding_of(recipe), **_given(decoding))
    asked = [prepare(recipe, each, task=task, **_given(form)) for each in sets_to_ask(recipe, data, task)]
    results: dict[str, Evaluation] = {}
    with _opened(source, engine, dtype, device) as model:
        for one in asked:
            own = output_folder(run, name, one.rows.source, one.form.task)
            folder = own if output is None else output if len(asked) == 1 else output / own.name
            with watch(one.rows.source, folder) as on_progress:
                results[one.rows.source] = ask(model, one, folder, batch_size, how, restart, on_progress)
            if run is not None and (weights := trained_weights(run)):
                path = folder / "result.json"
                write_json(path, read_json(path) | {"weights": weights})
            on_result(one.rows.source, results[one.rows.source], len(asked))
    if run and adapter:
        add_scores(run, adapter)
    if len(asked) == 1:
        return Evaluations(results)
    group = data or (run.name if run else "sets")
    return _averaged(results, (output or folder.parent) / f"{group}-averages.json")


def _given(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (settings or {}).items() if value is not None}


@contextmanager
def _opened(
    source: Source | LoadedModel, engine: str, dtype: str | None, device: str | None
) -> Iterator[LoadedModel | VllmEngine]:
    """The model, ready to answer."""
    if engine not in ENGINES:
        raise SvdtuneError(f"there is no engine {engine!r}; expected one of {', '.join(ENGINES)}")
    if isinstance(source, LoadedModel):
        if engine != "transformers" or dtype is not None or device is not None:
            raise SvdtuneError(
                "a loaded model answers by Transformers, in the dtype and on the device that it has; leave out engine, "
                "dtype and device, or give a folder"
            )
        yield source
        return
    with nullcontext() if source.run is None else held(source.run, "evaluate"):
        if engine == "transformers":
            yield open_source(source, **placement(dtype, device))
            return
        if device is not None:
            raise SvdtuneError("vLLM chooses its device itself; leave out --device, or hide GPUs from it")
        with open_vllm(source, dtype) as opened:
            yield opened


def _averaged(results: dict[str, Evaluation], path: Path) -> Evaluations:
    """Average over the sets in each mode, and write that to a file.

    Sets whose items are neither right nor wrong (E2E) are in no average.
    """
    kept: dict[str, Any] = {"sets": {name: _set_json(result) for name, result in results.items()}}
    averages: dict[str, Average] = {}
    if apart := no_average([(name, result.task) for name, result in results.items()]):
        write_json(path, kept | {"no_average": apart})
        return Evaluations(results, averages, path)
    for mode in ("strict", "paper"):
        scores = {name: (getattr(result, mode), result) for name, result in results.items() if getattr(result, mode)}
        if not scores:
            continue
        samples = {name: result.n * result.settings.get("samples", 1) for name, (_, result) in scores.items()}
        averages[mode] = average({name: (score.correct, samples[name]) for name, (score, _) in scores.items()})
        kept[mode] = average_json(averages[mode]) | {"over": list(scores)}
    write_json(path, kept)
    return Evaluations(results, averages, path)


def _set_json(result: Evaluation) -> dict[str, Any]:
    scores = {mode: getattr(result, mode) for mode in ("strict", "paper")}
    return {"n": result.n, "folder": str(result.folder)} | {
        mode: score and score._asdict() | {"interval": score.interval._asdict()} for mode, score in scores.items()
    }
