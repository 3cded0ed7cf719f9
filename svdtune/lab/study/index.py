"""The list of all published studies: README.md of the folder that has a folder for each."""

from pathlib import Path

from svdtune.lab.study.markdown import escape, table
from svdtune.lab.study.results import RESULTS, Results, read_findings, read_results
from svdtune.system import explain_write_errors, replace_text

_FOOT = "Every page is made of the `results.json` beside it by `python -m svdtune.lab.study.page`."


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
        replace_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")
    return folder / "README.md"


def _row(name: str, study: Results) -> list[str]:
    unfinished = sum(run.status != "finished" for run in study.runs)
    link = f"[{escape(study.title)}]({name}/README.md)"
    return [
        link,
        escape(study.question or ""),
        escape(study.devices),
        str(len(study.runs)),
        str(unfinished),
        str(study.not_run),
    ]
