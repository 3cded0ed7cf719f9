"""The study files that come with svdtune: each loads, its grids expand, and every arm is a valid
recipe on every task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import svdtune
from svdtune.lab.study.grid import cells
from svdtune.lab.study.spec import arm_settings, load_study
from svdtune.training import check_recipe

STUDIES = Path(svdtune.__file__).parent.parent / "studies"
# _*.yaml: recipes of studies
FILES = sorted(path.relative_to(STUDIES) for path in STUDIES.rglob("[!_]*.yaml"))


def test_the_papers_tables_and_figures_have_their_files() -> None:
    sara = {"table-1", "table-2", "table-3", "table-4", "figure-3", "figure-4", "figure-5", "figure-6", "figure-9"}
    sorsa = {"table-1", "figure-2", "figure-3", "regularizer"}
    for paper, wanted in (("sara", sara), ("sorsa", sorsa)):
        found = {"-".join(path.stem.split("-")[:2]) for path in FILES if path.parts[0] == paper}
        assert found == wanted


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_study_file_loads_and_every_arm_is_a_recipe(file: Path) -> None:
    assert (STUDIES / file).read_text().startswith("# ")
    study, tasks = load_study(STUDIES / file)
    assert not any(arm.grid for arm in study.arms.values())
    for recipe in tasks.values():
        for name, arm in study.arms.items():
            changed = check_recipe({**arm_settings(recipe, arm), "output": {"dir": "runs"}}, name)
            assert arm.method is None or changed.method.name == arm.method["name"]


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] in ("sara", "sorsa")], ids=str)
def test_the_papers_studies_have_a_run_for_each_arm_task_and_seed(file: Path) -> None:
    study, tasks = load_study(STUDIES / file)
    jobs = [job for cell in cells(study, tasks) for job in cell.finals(cell.candidates[:1], study.seeds)]
    trained = sum(not arm.untrained for arm in study.arms.values())
    untrained = len(study.arms) - trained
    assert len(jobs) == len(tasks) * (trained * len(study.seeds) + untrained)
    assert len({job.key for job in jobs}) == len(jobs)
    # the papers' learning rates stand
    assert not any(cell.searched for cell in cells(study, tasks))


def trained_by(file: str) -> Mapping[str, dict[str, Any] | None]:
    study, _ = load_study(STUDIES / file)
    return {name: arm.method for name, arm in study.arms.items()}


def test_grids_are_the_papers_values() -> None:
    lora = [method["lora_alpha"] for name, method in trained_by("sara/figure-9-lambda.yaml").items() if "lora" in name]
    assert lora == [10, 20, 30, 40]
    heads = [method["num_heads"] for name, method in trained_by("sara/figure-6-heads.yaml").items() if "mosara" in name]
    assert heads == [1, 3, 5, 7, 9]
    layers = trained_by("sara/figure-3-layers.yaml")
    for method in ("lora", "sara"):
        parts = [layers[f"{method}-{a}-{a + 7}"]["layers_to_transform"] for a in (0, 8, 16, 24)]
        assert [layer for part in parts for layer in part] == list(range(32))
