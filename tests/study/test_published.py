"""Every published study's page, made again from its results, is the page that is published."""

from pathlib import Path

import pytest

from svdtune.study.index import write_index
from svdtune.study.page import write_page

PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
STUDIES = sorted(path.parent for path in PUBLISHED.glob("*/results.json"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_page_is_that_of_the_results(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text byte for byte; of figures that the same are there, since their bytes change with matplotlib's version."""
    monkeypatch.setattr("svdtune.study.plots.save", lambda figure, path: path.touch())  # most of the time
    written = write_page(study / "results.json", tmp_path)
    again = f"make it again: python -m svdtune.study.page docs/results/{study.name}"
    assert (tmp_path / "README.md").read_bytes() == (study / "README.md").read_bytes(), again
    assert {path.name for path in written} == {path.name for path in (study / "README.md", *study.glob("*.svg"))}, again


def test_the_list_of_studies_is_complete(tmp_path: Path) -> None:
    if not STUDIES:
        pytest.skip("no study is published in docs/results")
    for study in STUDIES:
        (tmp_path / study.name).mkdir()
        (tmp_path / study.name / "results.json").write_bytes((study / "results.json").read_bytes())
    again = "make it again: python -m svdtune.study.page docs/results"
    assert write_index(tmp_path).read_bytes() == (PUBLISHED / "README.md").read_bytes(), again
