"""The documentation's pages: each has its place on the site, and every link leads to a file."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "svdtune").rglob("*.md")),
]


def navigated(part: object) -> set[str]:
    """The pages in a part of the navigation."""
    if isinstance(part, str):
        return {part}
    inner = part.values() if isinstance(part, dict) else part
    assert not isinstance(inner, str)
    return set().union(*map(navigated, inner))


def test_every_page_is_in_the_navigation() -> None:
    named = navigated(YAML(typ="safe", pure=True).load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    places = re.findall(r'"([\w/.]+)": "([\w/.]+\.md)"', (ROOT / ".ci" / "site.py").read_text(encoding="utf-8"))
    outside = dict(places)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"results/README.md"} == named - outside.keys()
    assert {ROOT / source for source in outside.values()} >= {path for path in PAGES if "docs" not in path.parts}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    gone = [link for link in links if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists()]
    assert gone == []
