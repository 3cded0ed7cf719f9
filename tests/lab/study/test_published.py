"""Every published study's page, made again from its results, is the page that is published."""

import json
import re
from operator import sub
from pathlib import Path
from statistics import fmean

import pytest

from svdtune.lab.study.page import write_index, write_page
from svdtune.lab.study.results import FINDINGS, read_results
from svdtune.training.yaml_files import read_yaml

PUBLISHED = Path(__file__).parents[3] / "docs" / "results"
STUDIES = sorted(path.parent for path in PUBLISHED.glob("*/results.json"))

# Of SARA's tables: 1 (LoRA, SARA: five sets without AQuA, and the average), 2 (averages on
# LLaMA-7B), 3 (BLEU), 4, and 8 to 12.
TABLE_1 = {
    "LLaMA-7B": (([58.50, 75.95, 92.73, 88.24, 24.24], 60.53), ([60.00, 79.75, 89.09, 84.31, 24.62], 62.18)),
    "LLaMA-13B": (([66.00, 82.28, 95.45, 89.22, 36.74], 65.21), ([71.50, 81.01, 93.64, 88.24, 36.36], 66.37)),
    "GPT-J-6B": (([47.00, 65.82, 72.73, 76.47, 11.36], 46.54), ([50.50, 65.82, 79.09, 74.51, 12.50], 51.65)),
}
MO_SARA = 58.95  # on LLaMA-7B
TABLE_2 = {"LoRA": 74.7, "SARA": 78.5}
TABLE_3 = {"full": 68.2, "DyLoRA": 69.2, "AdaLoRA": 68.2, "LoRA": 70.4, "VeRA": 69.1, "Mo-SARA": 69.4, "SARA": 70.4}
PARAMETERS_3 = [0.094, 0.39]  # in millions, the least and the most of an adapter here
TABLE_4 = {"SARA": 62.18, "V = 0": 58.85, "w/o Λ": 49.40, "w/o Λ, V = 0": 58.42}
WITHOUT_V = 52.88
TABLE_8 = {"LoRA": [51.16, 55.82, 49.41, 38.60], "SARA": [55.77, 56.41, 53.24, 42.56]}
TABLE_9 = {"LoRA": [58.35, 60.53, 59.98, 60.06], "SARA": [58.57, 62.18, 60.24, 60.28]}
TABLE_10 = [56.56, 58.23, 58.31, 57.61]  # one head, by threshold
TABLE_11 = [58.31, 58.38, 58.95, 59.21, 59.34]  # by heads
PAPERS = {
    "math": [*(fmean(sets) for pair in TABLE_1.values() for sets, _ in pair), 23.53, 35.29]
    + [sara - lora for (_, lora), (_, sara) in TABLE_1.values()]
    + [TABLE_1["LLaMA-7B"][0][1] - MO_SARA],
    "commonsense": [*TABLE_2.values()],
    "e2e": [*TABLE_3.values(), *PARAMETERS_3],
    "ablations": [TABLE_4["SARA"] - other for other in TABLE_4.values()] + [*TABLE_4.values(), MO_SARA - WITHOUT_V],
    "layers": [*TABLE_8["LoRA"], *TABLE_8["SARA"], *map(sub, TABLE_8["SARA"], TABLE_8["LoRA"])],
    "parameters": [*map(sub, TABLE_9["SARA"], TABLE_9["LoRA"])],
    "heads": [*TABLE_10, *TABLE_11],
    "scale": [58.60, 60.53, TABLE_4["SARA"]],
}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
@pytest.mark.family(4)
def test_the_page_is_that_of_the_results(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text byte for byte; of figures that the same are there, since their bytes change with
    matplotlib's version."""
    # most of the time
    monkeypatch.setattr("svdtune.lab.study.plots.save", lambda figure, path: path.touch())
    written = write_page(study / "results.json", tmp_path)
    again = f"make it again: python -m svdtune.lab.study.page docs/results/{study.name}"
    assert (tmp_path / "README.md").read_bytes() == (study / "README.md").read_bytes(), again
    assert {path.name for path in written} == {path.name for path in (study / "README.md", *study.glob("*.svg"))}, again


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_study_file_on_the_page_has_every_arm_as_it_ran(study: Path) -> None:
    """Empty lists too: of IA3's feed-forward layers, one says that there are none."""
    arms = (json.loads((study / "results.json").read_text())["spec"] or {"arms": {}})["arms"]
    shown = re.findall("<summary>Study file</summary>\n\n```yaml\n(.*?)```", (study / "README.md").read_text(), re.S)
    for name, arm in (read_yaml(shown[0], "page")["arms"] if arms else {}).items():
        assert {key: arm.get(key, {}) for key in ("method", "settings")} == {
            key: arms[name][key] or {} for key in ("method", "settings")
        }


def said_and_made(name: str) -> tuple[str, str]:
    """A page's text from `findings.md`, and what is made of the results below it."""
    _, said, made = re.split(
        r"## (?:What the numbers say|How it was run)\n", (PUBLISHED / name / "README.md").read_text()
    )
    return said, made


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_what_is_said_of_the_numbers_quotes_them(study: Path) -> None:
    """Every number with a decimal point in `findings.md` stands in tables, its page's or a linked
    one's, or is a paper's."""
    said, _ = said_and_made(study.name)
    known = set()
    for name in (study.name, *re.findall(r"\]\(\.\./(\w+)/README\.md\)", said)):
        known |= set(re.findall(r"\d+\.\d+", said_and_made(name)[1]))
        known |= {f"{number:.1f}" for number in PAPERS.get(name, [])}
    assert set(re.findall(r"\d+\.\d+", said)) - known == set()


def test_the_guide_quotes_measurements() -> None:
    """Every score and time in `docs/guide.md` stands in a study's page or among the timings."""
    docs = PUBLISHED.parent
    pages = [(study / "README.md").read_text() for study in STUDIES] + [(docs / "performance.md").read_text()]
    known = {number for page in pages for number in re.findall(r"\d+\.\d+", page)}
    known |= {"0.9", "0.02", "0.16"}  # sizes, which `svdtune plan` says
    assert set(re.findall(r"\d+\.\d+", (docs / "guide.md").read_text())) <= known


def test_the_guide_starts_from_the_learning_rates_found() -> None:
    guide = (PUBLISHED.parent / "guide.md").read_text()
    rows = [line.split("|") for line in guide.splitlines() if re.fullmatch(r"\|[^|]*\|[^|]*\|[^|]*\|[^|]*\|", line)]
    told = {row[1].strip(): row[2].split()[0] for row in rows if re.match(r" \de-\d", row[2])}
    named = {
        "full": "full fine-tuning",
        "lora": "LoRA, α = 2 r",
        "rslora": "rsLoRA, α = 16",
        "dora": "DoRA, α = 2 r",
        "pissa": "PiSSA, α = 2 r",
        "adalora": "AdaLoRA",
        "vera": "VeRA",
        "miss": "MiSS",
        "prefix": "prefix tuning",
        "series": "series adapter",
        "parallel": "parallel adapter",
        "sara": "SARA",
        "sara without Λ": "SARA without Λ",
        "mosara": "Mo-SARA",
        "sorsa": "SORSA",
    }
    best: dict[str, tuple[float, float]] = {}
    for study in ("math", "ablations"):
        for run in read_results(PUBLISHED / study / "results.json").runs:
            if run.phase == "tune" and run.eval_loss is not None and run.arm in named:
                found = (run.eval_loss, run.learning_rate)
                best[named[run.arm]] = min(best.get(named[run.arm], found), found)
    assert {name: float(rate) for name, rate in told.items()} == {name: rate for name, (_, rate) in best.items()}


def test_the_list_of_studies_is_complete(tmp_path: Path) -> None:
    if not STUDIES:
        pytest.skip("no study is published in docs/results")
    for study in STUDIES:
        (tmp_path / study.name).mkdir()
        (tmp_path / study.name / "results.json").write_bytes((study / "results.json").read_bytes())
    (tmp_path / FINDINGS).write_bytes((PUBLISHED / FINDINGS).read_bytes())
    again = "make it again: python -m svdtune.lab.study.page docs/results"
    assert write_index(tmp_path).read_bytes() == (PUBLISHED / "README.md").read_bytes(), again
