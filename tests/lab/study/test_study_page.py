"""A study's page: whole, the same from the same results, safe for any label; its figures; and the
list of studies."""

import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import SEEDS, made_results, made_run, read, search, whole_study
from markdown_it import MarkdownIt

from svdtune.errors import SvdtuneError
from svdtune.lab.study.arms import Table, tables
from svdtune.lab.study.markdown import block, code, escape
from svdtune.lab.study.page import main, write_index, write_page
from svdtune.lab.study.plots import by_parameters, figures, grad_norms, losses, movement
from svdtune.lab.study.plots import search as search_figure
from svdtune.reports.numbers import Lines

ODD = "a|b <script>alert(1)</script> `x` *y* _z_ [l](u) $m$ \\ & ~~"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "one", whole_study())


def write(folder: Path, results: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def test_the_page_has_everything(folder: Path) -> None:
    (folder / "findings.md").write_text("All the same.\n\n- within **noise**\n")
    written = write_page(folder / "results.json", folder)
    text = (folder / "README.md").read_text()
    headings = re.findall("^## (.*)", text, re.M)
    assert headings[:3] == ["What the numbers say", "How it was run", "How to read it"]
    assert headings[3:] == [
        "math, 300,000 trained parameters",
        "math, 2,400,000 trained parameters",
        "e2e, 300,000 trained parameters",
        "Figures",
    ]
    assert "All the same.\n\n- within **noise**\n" in text
    assert "| machine | NVIDIA H200 |" in text
    assert "svdtune 0.1.0, torch 2.13.0, peft 0.21.2, transformers 5.23.0" in text
    assert "| command | `svdtune study studies/small/math.yaml` |" in text
    assert "3,260 training rows; 100 steps; scored on svamp (120), aqua (120)" in text
    assert "29 finished, 4 diverged, 1 failed" in text
    assert sorted(re.findall(r"\]\(([\w.-]+\.svg)\)", text)) == sorted(path.name for path in written[1:])
    assert {path.name for path in folder.iterdir()} == {"results.json", "findings.md", *(path.name for path in written)}


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    first = write_page(folder / "results.json", tmp_path / "a")
    again = write_page(folder / "results.json", tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in again]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_without_findings_there_is_no_such_section(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", made_results([made_run()]))
    write_page(folder / "results.json", folder)
    assert "What the numbers say" not in (folder / "README.md").read_text()


def test_the_models_are_named_where_the_results_name_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", made_results([made_run()], models={"math": "smollm2-135m"}))
    write_page(folder / "results.json", folder)
    assert "| task math | smollm2-135m; recipe ../recipes/math.yaml; " in (folder / "README.md").read_text()


def test_odd_labels_are_shown_as_they_are(tmp_path: Path) -> None:
    runs = [made_run(arm, s, {ODD: 0.5, "b": 0.4}, task=ODD) for arm in ("lora", ODD) for s in SEEDS]
    runs += search(ODD, {1e-3: None, 3e-3: 0.4}, task=ODD)
    runs[-2]["error"] = f"{ODD}\n# {ODD}"
    results = made_results(runs, title=ODD, question=f"# {ODD}", command=f"svdtune study '{ODD}'")
    folder = write(tmp_path / "one", results | {"spec": {"seeds": [1, 2, 3], "tasks": {ODD: ODD}}})
    write_page(folder / "results.json", folder)
    page = rendered((folder / "README.md").read_text())
    assert "<script" not in page
    shown = html.escape(ODD, quote=False)
    assert f"<h1>{shown}</h1>" in page
    assert f"<p># {shown}</p>" in page
    assert f"<h2>{shown}, 300,000 trained parameters</h2>" in page
    assert f"<td>{shown}</td>" in page
    assert f"{shown}, %</th>" in page
    assert f"<code>svdtune study '{shown}'</code>" in page
    assert f"diverged: {shown} # {shown}</li>" in page
    assert {path.name for path in folder.glob("*.svg")} >= {"search-a-b-script-alert-1-script-x-y-z-l-u-m-300000.svg"}
    for row in re.findall("<tr>.*?</tr>", page, re.S):
        assert len(re.findall("<t[dh]", row)) in (2, 3, 8, 10)


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), max_size=30))
def test_any_label_is_shown_as_it_is(text: str) -> None:
    line = " ".join(text.split())
    shown = rendered(f"| {escape(text)} | b |\n|---|---|\n| {escape(text)} | b |\n")
    cells = re.findall("<t[dh]>([^<>]*)</t[dh]>", shown)
    assert [html.unescape(cell) for cell in cells] == [line, "b"] * 2
    if line:
        (paragraph,) = re.findall("^<p>([^<>]*)</p>\n$", rendered(escape(text)))
        assert html.unescape(paragraph) == line


@given(st.text("a`| \\<", min_size=1, max_size=12))
def test_any_code_is_shown_as_it_is(text: str) -> None:
    line = " ".join(text.split())
    if line:
        assert rendered(code(text)) == f"<p><code>{html.escape(line)}</code></p>\n"
    assert rendered(block(text)) == f"<pre><code>{html.escape(text.rstrip())}\n</code></pre>\n"


def test_figures_show_the_numbers() -> None:
    runs = whole_study()["runs"]
    for run in runs:
        if run["phase"] == "tune" and run["status"] == "diverged":
            run["eval_loss"] = 9.0  # from before it diverged
    found = tables(read(runs))
    math = [table for table in found if table.task == "math"]
    score = by_parameters(math)
    assert [one.name for one in score.series] == ["lora", "sara", "sorsa", "dora", "full"]
    lora = math[0].arms[1]
    assert score.series[0].y[0] == pytest.approx(100 * lora.cells["average"].mean)
    assert score.series[0].spread[0] == pytest.approx([100 * end for end in lora.cells["average"].interval])
    assert len(score.series[0].x) == 2
    # the arm without a budget is in both tables, but it is one point
    assert len(score.series[-1].x) == 1
    curve = next(one for one in losses(math[0]).series if one.name == "lora")
    assert (curve.x[0], curve.y[0]) == (1, pytest.approx(2.04))
    assert curve.spread[0] == pytest.approx((2.02, 2.06))
    rates = next(one for one in search_figure(math[0]).series if one.name == "sorsa")
    assert list(zip(rates.x, rates.y, strict=True)) == [(3e-4, 0.5), (1e-3, 0.4)]


def test_ticks_stand_at_the_budgets_and_the_rates_that_were_tried() -> None:
    math = [table for table in tables(read(whole_study()["runs"])) if table.task == "math"]
    assert list(by_parameters(math).ticks.values()) == ["300k", "2.4M", "89.4M"]
    assert list(search_figure(math[0]).ticks.values()) == ["0.0003", "0.001", "0.003"]
    sizes = [100_000 + 1_000 * i for i in range(30)]
    runs = [made_run(f"arm {size}", budget=size, trained_parameters=size) for size in sizes]
    assert 4 <= len(by_parameters(tables(read(runs))).ticks) <= 9


@pytest.mark.parametrize(
    ("size", "text"), [(6_738_415_616, "6.74B"), (999_800, "1M"), (1_221_120, "1.22M"), (305_280, "305k"), (500, "500")]
)
def test_a_size_has_three_digits(size: int, text: str) -> None:
    runs = [made_run("a", s, trained_parameters=size) for s in SEEDS]
    drawn = {name: figure for name, _, figure in figures(tables(read(runs)))}
    assert [label.get_text() for label in drawn["score-math"].axes[0].get_yticklabels()] == [f"a · {text}"]


def test_the_untrained_base_is_a_line_across() -> None:
    found = tables(read(whole_study()["runs"]))
    drawn = {name: figure.axes[0] for name, _, figure in figures(found)}
    assert [text.get_text() for text in drawn["score-math"].texts] == ["base"]
    assert drawn["score-math"].texts[0].get_position()[1] == pytest.approx(100 * found[0].arms[0].cells["average"].mean)


def test_losses_have_logarithmic_axes() -> None:
    drawn = {name: figure.axes[0] for name, _, figure in figures(tables(read(whole_study()["runs"])))}
    assert drawn["loss-math-300000"].get_yscale() == "log"
    assert [getattr(drawn["search-math-300000"], f"get_{axis}scale")() for axis in "xy"] == ["log", "log"]


def test_a_task_without_a_trained_arm_has_no_figure_of_scores() -> None:
    base = made_run("base", 1, method=None, budget=None, trained_parameters=0, curve=[])
    assert not list(figures(tables(read([base]))))


@pytest.mark.parametrize(("drawn", "recorded"), [(losses, "curve"), (grad_norms, "grad_norms")], ids=["loss", "norm"])
def test_a_curve_has_the_steps_that_all_seeds_logged(drawn: Callable[[Table], Lines], recorded: str) -> None:
    points = {1: [[1, 4.0], [5, 2.0]], 2: [[1, 2.0], [6, 1.0], [7, None]]}
    runs = [made_run(seed=seed, curve=[]) | {recorded: points[seed]} for seed in points]
    (curve,) = drawn(tables(read(runs))[0]).series
    assert (list(curve.x), list(curve.y), list(curve.spread)) == ([1], [3.0], [(2.0, 4.0)])


def test_movement_is_drawn_where_it_was_sampled() -> None:
    runs = [made_run(seed=s, movement={"samples": [[0, 0, 0, 0], [9, 0.1 * s, 0.2 * s, 1.0]]}) for s in (1, 3)]
    (path,) = movement(tables(read(runs))[0]).series
    assert list(path.x) == pytest.approx([0, 0.2])
    assert list(path.y) == pytest.approx([0, 0.4])


def test_the_forest_has_a_row_for_every_arm_that_is_compared() -> None:
    drawn = {name: figure for name, _, figure in figures(tables(read(whole_study()["runs"])))}
    axes = drawn["differences-math-300000"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["sara", "sorsa", "dora", "full"]
    seeds, items = (container.lines[0].get_xdata() for container in axes.containers)
    assert list(seeds) == pytest.approx(list(items))
    assert len(seeds) == 4


def test_many_arms_have_a_legend_outside_and_looks_of_their_own() -> None:
    sizes = [{"budget": size, "trained_parameters": size} for size in (300_000, 600_000)]
    runs = [made_run(f"arm {i}", s, **size) for i in range(32) for s in SEEDS for size in sizes]
    drawn = {name: figure for name, _, figure in figures(tables(read(runs, baseline="arm 0")))}
    figure = drawn["score-math"]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 32
    figure.draw_without_rendering()
    assert legend.get_window_extent().y0 >= 0
    looks = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[0].containers}
    assert len(looks) == 32


def test_scores_of_one_budget_have_a_row_for_every_trained_arm() -> None:
    runs = [made_run("base", 1, method=None, budget=None, trained_parameters=0)]
    runs += [
        made_run(arm, s, trained_parameters=size) for arm, size in (("a", 300_000), ("b", 2_400_000)) for s in SEEDS
    ]
    (found,) = tables(read(runs))
    axes = {name: figure for name, _, figure in figures([found])}["score-math"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a · 300k", "b · 2.4M"]
    (points,) = axes.containers
    assert list(points.lines[0].get_xdata()) == pytest.approx(
        [100 * arm.cells["average"].mean for arm in found.arms[1:]]
    )
    (bars,) = points.lines[2]
    assert bars.get_segments()[0][:, 0] == pytest.approx([100 * end for end in found.arms[1].cells["average"].interval])


def test_labels_that_differ_in_punctuation_alone_have_files_of_their_own(tmp_path: Path) -> None:
    runs = [made_run(seed=s, task=task) for task in ("a b", "a/b") for s in SEEDS]
    folder = write(tmp_path / "one", made_results(runs))
    written = write_page(folder / "results.json", folder)
    assert len({path.name for path in written}) == len(written)
    assert {"score-a-b.svg", "score-a-b-.svg"} <= {path.name for path in written}


def test_an_empty_study_has_a_page(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", made_results([], spec={}))
    assert write_page(folder / "results.json", folder) == [folder / "README.md"]


def test_a_study_whose_runs_all_failed_has_a_page_that_says_so(tmp_path: Path) -> None:
    runs = [
        made_run(arm, s, status="failed", error="no", scores={}, curve=[]) for arm in ("lora", "sara") for s in SEEDS
    ]
    folder = write(tmp_path / "one", made_results(runs))
    assert write_page(folder / "results.json", folder) == [folder / "README.md"]
    text = (folder / "README.md").read_text()
    assert "6 failed" in text
    assert text.count("3 of 3 seeds failed") == 2


def test_the_list_of_studies(tmp_path: Path) -> None:
    write(tmp_path / "b", whole_study())
    write(tmp_path / "a", made_results([made_run()], title="A | B", question=None))
    (tmp_path / "c").mkdir()
    lines = write_index(tmp_path).read_text().splitlines()
    assert lines[-4:-2] == [
        r"| [A \| B](a/README.md) |  | NVIDIA H200 | 1 | 0 | 2 |",
        "| [A study](b/README.md) | Which is better? | NVIDIA H200 | 60 | 11 | 0 |",
    ]


def test_the_module_makes_one_page_or_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write(tmp_path / name, made_results([made_run()])) for name in ("one", "two"))
    assert main([str(one)]) == 0
    assert (one / "README.md").is_file()
    assert not (two / "README.md").exists()
    assert not (tmp_path / "README.md").exists()
    assert main([str(tmp_path)]) == 0
    assert (two / "README.md").is_file()
    assert (tmp_path / "README.md").is_file()
    capsys.readouterr()
    assert main([str(one / "nothing")]) == 1
    assert "has no study: expected results.json" in capsys.readouterr().err
    assert main([]) == 2


def test_without_matplotlib_the_error_names_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SvdtuneError, match="matplotlib"):
        write_page(folder / "results.json", folder)
