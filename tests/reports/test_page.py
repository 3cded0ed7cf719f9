"""The page in a real Chromium: every control, keyboard, both themes, phone and desktop, print, and
axe's rules."""

import csv
import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run

from svdtune.analysis import read_facts
from svdtune.reports import all_numbers, gather, render

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = pytest.mark.slow
NAMES = ("sorsa", "lora", "mosara")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    installed = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    with playwright.sync_playwright() as running:
        try:
            started = running.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"needs a Chromium (apt-get install chromium, or playwright install chromium): {error}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    methods = [
        {"name": "sorsa", "r": 8},
        {"name": "lora", "r": 8},
        {"name": "mosara", "threshold": 0.5, "num_heads": 3},
    ]
    runs = [make_run(folder / name, m, kinds=3, seed=i) for i, (name, m) in enumerate(zip(NAMES, methods, strict=True))]
    return gather([read_facts(run) for run in runs])


@pytest.fixture(scope="module")
def file(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(data), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """A function that opens a file; whatever the console says fails the test at its end."""
    said: list[str] = []
    contexts = []

    def go(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: said.append(request.url) if not request.url.startswith(("file:", "blob:")) else None,
        )
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert not said


def keys(page: Any, figure: str) -> list[str]:
    return page.locator(f"#{figure} .keys li").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_serious_for_axe_and_nothing_too_wide(opened: Any, file: Path, width: int, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe: pip install axe-playwright-python"
    )
    page = opened(file, width, scheme)
    page.locator("#controls").evaluate("box => box.open = true")
    page.locator("#loss details summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    found = [v for v in axe.Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
    assert not [(v["id"], [node["html"][:120] for node in v["nodes"]][:3]) for v in found]


def test_it_starts_with_the_result(opened: Any, file: Path, data: dict[str, Any]) -> None:
    page = opened(file)
    assert page.locator("#result .lead").inner_text() == data["headline"]
    assert page.locator("h2").first.inner_text() == "Result"
    assert page.locator("#runs-table tbody tr").count() == 3
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids))


def test_runs_switch_on_and_off(opened: Any, file: Path) -> None:
    page = opened(file)
    assert keys(page, "loss") == list(NAMES)
    page.get_by_role("group", name="Runs").get_by_label("lora").uncheck()
    assert keys(page, "loss") == ["sorsa", "mosara"]
    assert keys(page, "movement") == ["sorsa"]
    assert page.locator("#runs-table tbody tr").count() == 2
    page.locator("#moved select[name=run]").select_option("lora")
    assert page.locator("#moved .empty").is_visible()
    page.get_by_role("group", name="Runs").get_by_label("lora").check()
    assert page.locator("#moved svg rect").count() == 12


def test_modules_and_layers_filter(opened: Any, file: Path) -> None:
    page = opened(file)
    assert page.locator("#moved svg rect").count() == 12  # 3 modules of 4 layers
    page.get_by_role("checkbox", name="self_attn.k_proj").uncheck()
    assert page.locator("#moved svg rect").count() == 8
    page.get_by_label("from", exact=True).fill("2")
    page.get_by_label("from", exact=True).press("Tab")
    assert page.locator("#moved svg rect").count() == 4
    assert page.locator("#layers-table tbody tr").count() == 8  # of two runs
    page.get_by_label("to", exact=True).fill("2")
    page.get_by_label("to", exact=True).press("Tab")
    assert page.locator("#layers-table tbody tr").count() == 4
    before = page.locator("#movement svg.chart path").count()
    page.get_by_label("draw every layer").check()
    assert page.locator("#movement svg.chart path").count() == before + 4


def test_every_choice_of_every_figure_draws(opened: Any, file: Path) -> None:
    page = opened(file)
    for choice in page.locator("figure select").all():
        for value in choice.evaluate("box => [...box.options].map(option => option.value)"):
            choice.select_option(value)
            drawn = choice.locator("xpath=ancestor::figure").locator("svg.chart")
            assert drawn.count() == 1, value
            assert "NaN" not in drawn.evaluate("node => node.outerHTML")
    page.locator("#movement select").select_option("delta_d")
    assert "ΔD" in page.locator("#movement svg.chart").get_attribute("aria-label")


def test_tables_sort(opened: Any, file: Path) -> None:
    page = opened(file)
    head = page.locator("#layers-table thead button", has_text="ΔD")
    column = page.locator("#layers-table tbody td:nth-child(5)")
    head.click()
    down = [float(text) for text in column.all_inner_texts()]
    assert down == sorted(down, reverse=True)
    head.press("Enter")
    assert page.locator("#layers-table th[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column.all_inner_texts()] == sorted(down)


def test_values_by_pointer_and_by_keyboard(opened: Any, file: Path, data: dict[str, Any]) -> None:
    page = opened(file)
    chart = page.locator("#loss svg.chart")
    first = data["runs"][0]["log"]
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text().split("\n") == ["sorsa", "step: 10", f"loss: {first['loss'][0]:.4g}"]
    assert page.locator("#said").inner_text() == f"sorsa, step: 10, loss: {first['loss'][0]:.4g}"
    page.keyboard.press("End")
    assert "mosara" in page.locator("#tip").inner_text()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert "step: 1,000" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    chart.blur()
    page.locator("#moved svg.chart rect").first.hover()
    assert page.locator("#tip").inner_text().startswith("module self_attn.q_proj, layer 0\n")
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def saved(page: Any, figure: str, button: str) -> str:
    with page.expect_download() as waiting:
        page.locator(f"#{figure}").get_by_role("button", name=button).click()
    return Path(waiting.value.path()).read_text(encoding="utf-8")


FIGURES = {
    "loss": ("loss", {}),
    "delta": ("delta", {}),
    "movement-angle": ("movement", {"measure": "angle"}),
    "energy": ("energy", {}),
    "change-spectrum": ("change-spectrum", {}),
    "moved-delta_d-lora": ("moved", {"run": "lora", "measure": "delta_d"}),
    "spectra-self_attn.v_proj": ("spectra", {"kind": "self_attn.v_proj"}),
    "budget-0.5": ("budget", {"threshold": "1"}),
    "by-parameters-0": ("by-parameters", {}),
    "ranks-self_attn.q_proj": ("ranks", {}),
    "routing-mosara-math-self_attn.k_proj": ("routing", {"task": "math", "kind": "self_attn.k_proj"}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_page_and_the_files_hold_the_same_numbers(opened: Any, file: Path, data: dict[str, Any], name: str) -> None:
    page = opened(file)
    figure, choice = FIGURES[name]
    for label, value in choice.items():
        page.locator(f"#{figure} select[name={label}]").select_option(value)
    numbers = next(each for each in all_numbers(data) if each.name == name)
    rows = list(csv.reader(io.StringIO(saved(page, figure, "Save CSV"))))[1:]
    if hasattr(numbers, "values"):
        found = {(row, column): float(value) for row, column, value in rows}
        cells = {
            (row, column): value
            for row, values in zip(numbers.rows, numbers.values, strict=True)
            for column, value in zip(numbers.columns, values, strict=True)
        }
        assert found == pytest.approx(cells)
        return
    for one in numbers.series:
        mine = [row for row in rows if row[0] == one.name]
        assert [float(row[1]) for row in mine] == pytest.approx(list(one.x))
        assert [float(row[2]) for row in mine] == pytest.approx(list(one.y))


def test_a_saved_figure_stands_alone(opened: Any, file: Path) -> None:
    page = opened(file)
    for figure in ("loss", "moved"):
        text = saved(page, figure, "Save SVG")
        ElementTree.fromstring(text)
        assert "var(" not in text or "fill:" in text
        assert "rgb(" in text


def test_numbers_below_a_figure(opened: Any, file: Path) -> None:
    page = opened(file)
    page.locator("#loss summary").click()
    # made once it is open
    playwright.expect(page.locator("#loss details tbody tr")).to_have_count(300)
    assert page.locator("#loss details th").all_inner_texts() == ["series", "step", "loss"]


def test_themes_print_and_a_change_of_width(opened: Any, file: Path) -> None:
    page = opened(file)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.locator("#theme").select_option("dark")
    assert page.evaluate(paper) != light
    page.locator("#theme").select_option("light")
    assert page.evaluate(paper) == light
    page.emulate_media(media="print")
    assert page.locator("#controls").is_hidden()
    assert page.locator("#loss .tools").is_hidden()
    assert page.locator("#loss svg.chart").is_visible()
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 500, "height": 900})
    playwright.expect(page.locator("#moved svg.chart")).to_have_attribute("viewBox", re.compile(r"^0 0 4\d\d "))


def test_names_are_text_whatever_is_in_them(opened: Any, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=window.hacked=1>&amp;"
    make_run(folder, {"name": "sorsa", "r": 8}, depth=1, kinds=1)
    (folder / "evaluations" / "gsm8k-gsm8k").rename(folder / "evaluations" / "<b>bold")
    data = gather([read_facts(folder)], title="</title></script><script>window.hacked=1</script>@data@")
    (tmp_path / "page.html").write_text(render(data), encoding="utf-8")
    page = opened(tmp_path / "page.html")
    assert page.evaluate("window.hacked") is None
    assert page.locator("h1").inner_text() == "</title></script><script>window.hacked=1</script>@data@"
    assert page.locator("#runs-table tbody td").first.inner_text().strip() == folder.name
    assert page.locator("img, b").count() == 0


def test_a_run_with_next_to_nothing_says_what_is_missing(opened: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", {"name": "sorsa", "r": 8}, depth=1, kinds=1)
    for part in ("training.json", "train_log.jsonl", "analysis/before.json", "analysis/during.jsonl"):
        (run / part).unlink()
    (run / "analysis" / "after.json").write_text("{damaged")
    shutil.rmtree(run / "evaluations")
    data = gather([read_facts(run)])
    (tmp_path / "page.html").write_text(render(data), encoding="utf-8")
    page = opened(tmp_path / "page.html", 390)
    text = page.locator("#missing").inner_text()
    for part in (
        "after.json is damaged",
        "svdtune analyze RUN",
        "not finished",
        "svdtune evaluate RUN",
        "`analysis` section",
    ):
        assert part in text
    assert page.locator("figure").count() == 0


def test_json_in_a_script_element_keeps_every_number(data: dict[str, Any], file: Path) -> None:
    text = file.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    assert json.loads(text) == json.loads(json.dumps(data))


def test_the_tables_round_as_the_sentences_do(opened: Any, file: Path) -> None:
    shares = [*(n / 16 for n in range(17)), 0.12345, 2 / 3]
    assert opened(file).evaluate("shares => shares.map(tenths)", shares) == [f"{share:.1%}"[:-1] for share in shares]
