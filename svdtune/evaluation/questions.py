"""Which items a model is asked, and in what form: as the user says, else as its recipe says, else
as the data set asks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from svdtune.data import Example, read_rows, to_examples
from svdtune.data.catalogue import CATALOGUE, GROUPS, scored
from svdtune.data.files import FILES, kind
from svdtune.data.prompts import TEMPLATES
from svdtune.errors import SvdtuneError
from svdtune.evaluation.engines import Engine
from svdtune.evaluation.generation import GREEDY, Completion, Decoding, plan_batches
from svdtune.evaluation.items import to_items
from svdtune.evaluation.scores import Evaluation, evaluate
from svdtune.evaluation.tasks import Task, get_task
from svdtune.models import LoadedModel
from svdtune.training.folder import EVALUATIONS
from svdtune.training.recipe import Recipe
from svdtune.training.sections import DataSource, EvaluationSection


@dataclass(frozen=True)
class Form:
    """In what form items are asked and graded.

    Attributes:
        task: Name of the task that grades.
        prompt: Field that is asked, or a text with fields.
        answer: Field to grade against; None for the completion.
        completion: As in training, where the completion is graded against; None otherwise.
        template: The prompt around it; None for the chat template where there is one.
        fallback: The template where there is none.
        max_new_tokens: Length limit.
    """

    task: str
    prompt: str
    answer: str | None
    completion: str | None
    template: str | None
    fallback: str
    max_new_tokens: int

    def template_for(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The template, once it is known whether the tokenizer has one for chats."""
        return self.template or ("chat" if tokenizer.chat_template else self.fallback)


def form_of(
    data: str,
    recipe: Recipe | None,
    task: str | None,
    prompt: str | None,
    answer: str | None,
    template: str | None,
    max_new_tokens: int | None,
) -> Form:
    """What the user said; else what the run's recipe says of its evaluation; else what a data set
    of the papers asks for; else what the run was trained with.

    A run that was trained with a paper's prompt is asked with the prompt that the paper tests with.
    """
    known, trained = CATALOGUE.get(data), recipe.data if recipe else None
    section = _section_for(recipe, data)
    if section:
        task, prompt, answer = task or section.task, prompt or section.prompt, answer or section.answer
        template, max_new_tokens = template or section.template, max_new_tokens or section.max_new_tokens
    if not template and trained:
        template = trained.template if known is None or trained.template not in TEMPLATES else known.template
    own_answer = known.answer if known else trained.answer if trained else "answer"
    graded_against = answer or own_answer
    return Form(
        task=task or (known and known.task) or "number",
        prompt=prompt or (known.prompt if known else trained.prompt if trained else "question"),
        answer=graded_against,
        # A run without a field for the answer is graded against the completions it was trained
        # towards.
        completion=trained.completion if trained and graded_against is None else None,
        template=template or None,
        fallback=known.template if known else "plain",
        max_new_tokens=max_new_tokens or (known.max_new_tokens if known else 256),
    )


def _section_for(recipe: Recipe | None, data: str) -> EvaluationSection | None:
    """The recipe's evaluation section, where it speaks of that data: of the papers' sets, and of
    the sources that it names."""
    section = recipe.evaluation if recipe else None
    named = section is not None and data in [source.source for source in section.sources]
    return section if named or data in CATALOGUE else None


def sets_to_ask(recipe: Recipe | None, data: str | None, task: str | None) -> list[str | DataSource | None]:
    """What is scored: the data named, or the sets and sources that the run's recipe names; groups
    as their members. A task that is asked for is about one's own data.

    None stands for what `held_out` finds by itself.
    """
    if data is not None:
        if not data.strip():
            raise SvdtuneError("the data's name is empty; name a file, a generator or a data set, or leave it out")
        return [dataset.name for dataset in scored(data)] if data in GROUPS else [data]
    section = recipe.evaluation if recipe else None
    if section is None or task in CATALOGUE:
        return [None]
    known = [] if task is not None else [dataset.name for dataset in section.known]
    return [*known, *section.sources] or [None]


def held_out(
    recipe: Recipe | None,
    data: str | DataSource | None,
    split: str | None,
    config: str | None,
    limit: int | None,
    task: str | None = None,
) -> DataSource:
    """Where the items come from: the source, or the data named, or the run's own held-out rows, or
    the data set that the task is made for.

    Raises:
        SvdtuneError: If none is there.
    """
    if limit is not None and limit < 1:
        raise SvdtuneError(f"limit is {limit}; expected at least 1 item")
    sets, section = recipe.data.eval if recipe else {}, recipe.evaluation if recipe else None
    own = next(iter(sets.values()), None)
    if data is None and task in CATALOGUE and (own is None or own.source not in CATALOGUE):
        data = task
    name = data.source if isinstance(data, DataSource) else data
    known = CATALOGUE.get(name) if name is not None else None
    if split is None and section is not None and known is not None and section.split in known.splits:
        split = section.split
    given = {
        key: value for key, value in {"split": split, "config": config, "limit": limit}.items() if value is not None
    }
    if name is None:
        if len(sets) > 1:
            raise SvdtuneError(f"data.eval has several sets, {', '.join(sets)}: name one's source with --data")
        if own is None:
            raise SvdtuneError("there is no data to evaluate on: name a file, generator or hub data set with --data")
        found = own
    else:
        found = data if isinstance(data, DataSource) else DataSource.model_validate(name)
        # Files have no splits; the default of training, "train", would be the wrong one here.
        is_file = kind(Path(name)) in FILES or Path(name).exists()
        if found.split is None and not is_file:
            found = found.model_copy(update={"split": known.test if known else "test"})
    if is_share(found):  # of all rows: one of the first few would be another share, with rows that are trained on
        given.pop("limit", None)
    return found.model_copy(update=given)


def is_share(source: DataSource) -> bool:
    """Whether a source is a part of its rows, drawn from all of them."""
    return source.only is not None or source.without is not None


@dataclass(frozen=True)
class Asked:
    """One data set, ready to be asked: where its rows come from, in what form, the rows as
    examples, and how many of a share's were taken, if not all."""

    rows: DataSource
    form: Form
    task: Task
    examples: list[Example]
    limit: int | None = None


def prepare(
    recipe: Recipe | None,
    name: str | DataSource | None,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    task: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
) -> Asked:
    """Read a data set, before the model: what is wrong with it shows at once."""
    if task is not None:
        get_task(task)
    source = name.source if isinstance(name, DataSource) else name
    section = _section_for(recipe, source) if source is not None else None
    limit = section.limit if limit is None and section is not None else limit
    rows = held_out(recipe, name, split, config, limit, task)
    form = form_of(rows.source, recipe, task, prompt, answer, template, max_new_tokens)
    found = read_rows(**rows.model_dump())[:limit]
    examples = to_examples(found, form.prompt, form.completion, source=rows.source)
    return Asked(rows, form, get_task(form.task), examples, limit if is_share(rows) else None)


def decoding_of(recipe: Recipe | None) -> Decoding:
    """How the recipe of a run decodes; greedily without one."""
    own = recipe.evaluation if recipe else None
    if own is None:
        return GREEDY
    return Decoding(beams=own.beams, length_penalty=own.length_penalty, no_repeat_ngram_size=own.no_repeat_ngram_size)


def ask(
    opened: Engine | LoadedModel,
    asked: Asked,
    folder: Path,
    batch_size: int = 16,
    decoding: Decoding = GREEDY,
    restart: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a model on one data set; `evaluate` with what `prepare` found."""
    form, rows = asked.form, asked.rows
    template = form.template_for(opened.tokenizer)
    cut = {} if asked.limit is None else {"limit": asked.limit}
    return evaluate(
        opened,
        to_items(asked.examples, opened.tokenizer, template, form.answer),
        asked.task,
        folder,
        max_new_tokens=form.max_new_tokens,
        batch_size=batch_size,
        decoding=decoding,
        settings={"data": rows.model_dump(), "prompt": form.prompt, "answer": form.answer, "template": template} | cut,
        restart=restart,
        on_progress=on_progress,
    )


class BatchedEngine:
    """An engine that completes the prompts of several data sets in common batches, longest first.

    A small set would otherwise wait for its longest answer by itself. What it completes ahead is
    kept in memory, so it is for runs that are scored in minutes.

    Args:
        engine: what completes.
        asked: the sets, of which one is asked first; the others' prompts with the same length limit
            come along.
        batch_size: completions generated together.
    """

    def __init__(self, engine: Engine, asked: Sequence[Asked], batch_size: int) -> None:
        self.name, self.tokenizer, self.context = engine.name, engine.tokenizer, engine.context
        self.identity, self.details = engine.identity, engine.details
        self._engine, self._batch_size = engine, batch_size
        self._prompts: dict[int, dict[tuple[int, ...], None]] = {}
        for one in asked:
            items = to_items(one.examples, engine.tokenizer, one.form.template_for(engine.tokenizer), one.form.answer)
            self._prompts.setdefault(one.form.max_new_tokens, {}).update((tuple(item.tokens), None) for item in items)
        self._done: dict[tuple[int, Decoding, tuple[int, ...]], Completion] = {}

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, decoding: Decoding, seeds: Sequence[int]
    ) -> list[Completion]:
        """Complete a batch; with what waits in the other sets, where nothing is drawn by chance."""
        if decoding.temperature > 0 or decoding.samples > 1:
            return self._engine.complete(prompts, max_new_tokens, decoding, seeds)
        keys = [(max_new_tokens, decoding, tuple(prompt)) for prompt in prompts]
        if missing := {key[-1]: None for key in keys if key not in self._done}:
            waiting = list(missing | self._prompts.pop(max_new_tokens, {}))
            for batch in plan_batches(waiting, self._batch_size):
                some = [waiting[place] for place in batch]
                completed = self._engine.complete(some, max_new_tokens, decoding, [0] * len(some))
                self._done.update(zip(((max_new_tokens, decoding, prompt) for prompt in some), completed, strict=True))
        return [self._done[key] for key in keys]


def output_folder(run: Path | None, source: str, data: str, task: str) -> Path:
    """In the run's own folder; for a model, whose folder is not ours to write to, below
    runs/evaluations."""
    name = f"{_short(data)}-{task}"
    return run / EVALUATIONS / name if run else Path("runs", "evaluations", f"{_short(source)}-{name}")


def _short(name: str) -> str:
    """The last part of a path or hub name, without file endings."""
    return Path(name).name.split(".")[0] or "data"
