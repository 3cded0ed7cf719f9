"""A study's page in Markdown, made of its `results.json` alone: the same results give the same
bytes.

`python -m svdtune.lab.study.page docs/results/NAME` makes the page of one study again; a folder of
such folders, all of theirs and the index. What the numbers say is written by hand, in `findings.md`
beside the results, and taken over as it is.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.lab.study.arms import left_out, tables
from svdtune.lab.study.layers import layer_figures, layer_sections
from svdtune.lab.study.loss_plots import loss_figures
from svdtune.lab.study.loss_tables import loss_sections
from svdtune.lab.study.markdown import block, code, escape, table
from svdtune.lab.study.plots import figures, write_figures
from svdtune.lab.study.results import RESULTS, Results, Run, read_findings, read_results
from svdtune.lab.study.table import all_sections, title
from svdtune.system import explain_write_errors, replace_text
from svdtune.training.yaml_files import write_yaml

PAGE = "README.md"
_FOOT = "Every page is made of the `results.json` beside it by `python -m svdtune.lab.study.page`."
_READING = """\
Scores are means over the finished seeds ± their sample standard deviation; in parentheses Student's 95 % interval. The share is
of all parameters, an adapter's frozen ones included: Mo-SARA keeps its singular vectors beside the weights.

A difference to the baseline has two intervals, for two questions. *Over seeds* (paired t-test): would training again, with
other seeds, say the same on these items? *Over items* (sign-flip permutation test of every item's mean over the seeds): would
other items of the same kind say the same of these trained models? A difference between methods should hold in both. Each p is
corrected for the arms of its table (Holm), intervals are not; a dash stands where there is nothing to compute from.

The search tried every learning rate once, on held-out loss; in its table the chosen one is bold. Seconds are wall-clock time
of training; runs may have shared a device, so they compare methods only roughly."""


_READING_LOSSES = """\
Losses are in nats: the mean over a set's items of −log p of each token, the mean over the item's tokens. KL to the base is
that of the base's next tokens from the trained model's, on text that the run did not train on.

The contrasts were named in the study file before its runs, whose records carry a digest of them. A difference has one 95 %
interval over seeds and items together: would other seeds, and other items of the kind, say the same? Seeds are not paired and
their variance is pooled; items are paired. With one seed the interval is over items alone, and decides nothing. *p* is of no
difference, *alike* of one of the margin or more (two one-sided tests); both are corrected for the contrasts of the table
(Holm). *Could see* is the smallest difference that the test of *p*, so corrected, finds four times in five. Everything else is
exploratory: its intervals and p values are not corrected, and what it shows is a reason to look again. Of KL where both have
learnt as much, the items of a set keep the proportions that they have at the run's end.

The learning rate of an arm is the one with the lowest loss on held-out training rows over its seeds; *tied* are those that
cannot be told from it, without a run whose training loss collapsed. ± is the sample standard deviation over seeds. Seconds
are wall-clock time of training, in which loading what measuring needs may be, but not measuring; runs may have shared a
device, so they compare methods only roughly."""


def write_page(results: Path, folder: Path) -> list[Path]:
    """Write a study's page and figures.

    Args:
        results: the study's `results.json`; `findings.md` beside it becomes a section of the page.
        folder: where README.md and the figures go.

    Returns:
        The files written.

    Raises:
        SvdtuneError: the results cannot be read, scipy or matplotlib is not installed, or the
            folder cannot be written.
    """
    study = read_results(results)
    said = read_findings(results.parent)
    found = tables(study)
    by_layers = [one for each in found for one in layer_figures(each, study.ranks.get(each.task))]
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        drawn = write_figures([*loss_figures(found), *figures(found), *by_layers], folder)
        parts = [f"# {escape(study.title)}", escape(study.question or "")]
        parts += [f"## What the numbers say\n\n{said}"] if said else []
        parts += ["## How it was run", table(["", ""], _how(study), left=2), _file_of(study)]
        parts += ["## How to read it", _READING_LOSSES if any(one.by_loss for one in found) else _READING]
        for one in found:
            parts.append(f"## {escape(title(one))}")
            sections = loss_sections(study, one) if one.by_loss else all_sections(one)
            sections = [*sections, *layer_sections(one, study.ranks.get(one.task))]
            parts += [f"### {heading}\n\n{body}" for heading, body in sections]
        if drawn:
            parts.append("## Figures")
            parts += [f"![{escape(caption)}]({name})" for name, caption in drawn]
        parts.append(f"Made of [{RESULTS}]({RESULTS}) by `python -m svdtune.lab.study.page`.")
        replace_text(folder / PAGE, "\n\n".join(part for part in parts if part) + "\n")
    return [folder / PAGE, *(folder / name for name, _ in drawn)]


def write_index(folder: Path) -> Path:
    """Write the list of the studies in the folders of a folder, by name, below what its
    `findings.md` says if it has one.

    Raises:
        SvdtuneError: some results cannot be read, or the folder cannot be written.
    """
    rows = [_row(path.parent.name, read_results(path)) for path in sorted(folder.glob(f"*/{RESULTS}"))]
    with explain_write_errors(folder):
        body = table(["study", "question", "machine", "runs", "failed or diverged", "not run yet"], rows, left=3)
        parts = ["# Studies", read_findings(folder), body, _FOOT]
        replace_text(folder / PAGE, "\n\n".join(part for part in parts if part) + "\n")
    return folder / PAGE


def _row(name: str, study: Results) -> list[str]:
    unfinished = sum(run.status != "finished" for run in study.runs)
    link = f"[{escape(study.title)}]({name}/{PAGE})"
    return [
        link,
        escape(study.question or ""),
        escape(study.devices),
        str(len(study.runs)),
        str(unfinished),
        str(study.not_run),
    ]


def main(folders: Sequence[str]) -> int:
    """Make the pages of the named folders again; the exit status."""
    if not folders:
        print("usage: python -m svdtune.lab.study.page FOLDER...", file=sys.stderr)
        return 2
    try:
        for folder in map(Path, folders):
            one = (folder / RESULTS).is_file()
            studies = [folder] if one else sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
            if not studies:
                raise SvdtuneError(f"{folder} has no study: expected {RESULTS} in it or in folders in it")
            for study in studies:
                print(write_page(study / RESULTS, study)[0])
            if not one:
                print(write_index(folder))
    except SvdtuneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _how(study: Results) -> Iterator[tuple[str, str]]:
    """How the study was run, as rows of a table."""
    finals = [run for run in study.runs if run.phase == "final"]
    searches = [run for run in study.runs if run.phase == "tune"]
    yield "machine", escape(study.devices or "not recorded")
    versions = [f"svdtune {study.svdtune}"]
    versions += [f"{name} {version}" for one in study.machines for name, version in one.items() if name != "device"]
    yield "versions", escape(", ".join(dict.fromkeys(versions)))
    for task in dict.fromkeys(run.task for run in study.runs):
        yield f"task {escape(task)}", escape("; ".join(_task(study, task)))
    yield "seeds", ", ".join(str(seed) for seed in study.spec.get("seeds") or sorted({run.seed for run in finals}))
    measured = [run.measured for run in finals if run.measured is not None]
    if measured:
        last = max(measured, key=lambda one: len(one.steps))
        counts = {name: str(len(found["nll"].items)) for name, found in last.sets.items()}
        counts |= {name: f"{counts[name]}; {n} longer than data.max_length" for name, n in last.left_out.items()}
        sets = ", ".join(f"{escape(name)} ({count})" for name, count in counts.items())
        yield "measured on", f"{sets}; {len(last.steps) - 1} times along a run"
    for task in dict.fromkeys(run.task for run in study.runs):
        if out := left_out(study, [run for run in study.runs if run.task == task]):
            yield "left out", f"{escape(task)}: seeds {', '.join(map(str, out))}, with which not every arm was run"
    yield "runs that count", _outcomes(finals) + (f", {study.not_run} not run yet" if study.not_run else "")
    tune = study.spec.get("tune") or {}
    if searches:
        chosen = "learning rate with the lowest loss on held-out rows"
        share = f" ({tune['share']:.0%} of the training rows where a task has none held out)" if "share" in tune else ""
        yield "search", f"{_outcomes(searches)}; {chosen}{share}"
    seconds = sum(run.train_seconds or 0 for run in study.runs)
    yield "training time", f"{seconds / 60:,.0f} minutes, summed over all runs"
    if study.command:
        yield "command", code(study.command).replace("|", "\\|")


def _task(study: Results, task: str) -> Iterator[str]:
    runs = [run for run in study.runs if run.task == task]
    if task in study.models:
        yield study.models[task]
    recipe = (study.spec.get("tasks") or {}).get(task)
    if isinstance(recipe, str):
        yield f"recipe {recipe}"
    finals = [run for run in runs if run.phase == "final" and run.trained_parameters]
    for name, text in (("rows", "training rows"), ("steps", "steps")):
        if values := sorted({value for run in finals if (value := getattr(run, name)) is not None}):
            yield f"{' to '.join(f'{value:,}' for value in dict.fromkeys([values[0], values[-1]]))} {text}"
    sizes = {name: score.n for run in runs for name, score in run.scores.items()}
    if sizes:
        yield "scored on " + ", ".join(f"{name} ({n:,})" for name, n in sizes.items())


def _outcomes(runs: Sequence[Run]) -> str:
    counts: Counter[str] = Counter(run.status for run in runs)
    order = ("finished", "diverged", "failed")
    return ", ".join(f"{counts[status]} {status}" for status in order if counts[status]) or "none"


def _file_of(study: Results) -> str:
    """The study file, folded away."""
    if not study.spec:
        return ""
    text = write_yaml(_said(study.spec), flow=None, width=120)
    return f"<details><summary>Study file</summary>\n\n{block(text, 'yaml')}\n\n</details>"


def _said(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that are empty. Those of methods and recipes stand whole: to both
    an empty list says something."""
    said = {
        name: _said(value) if isinstance(value, dict) and name not in ("method", "settings") else value
        for name, value in settings.items()
    }
    return {name: value for name, value in said.items() if value is not None and value != {} and value != []}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
