"""What MkDocs needs besides docs/: the pages that lie elsewhere in the repository, and links that
hold on the site.

A link to a page becomes one on the site; a link to a file that is no page becomes its path, which
is in the repository. A path that is not there fails the build.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Pages outside docs/, by their place on the site.
PAGES = {
    "index.md": "README.md",
    "changes.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "methods/sara.md": "svdtune/methods/sara/README.md",
    "methods/mosara.md": "svdtune/methods/mosara/README.md",
    "methods/sorsa.md": "svdtune/methods/sorsa/README.md",
    "methods/baselines.md": "svdtune/lab/baselines/README.md",
}
_PLACES = {ROOT / source: place for place, source in PAGES.items()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/."""
    for place, source in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let every link of a page hold on the site."""
    here = page.file.src_uri
    source = ROOT / PAGES.get(here, f"docs/{here}")

    def linked(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        there = (source.parent / path).resolve()
        if not there.exists():
            raise PluginError(f"{source.relative_to(ROOT)}: there is no {target}")
        place = _place(there)
        if place is None:
            return text if text.startswith("`") else f"{text} (`{there.relative_to(ROOT)}`)"
        relative = os.path.relpath(place, Path(here).parent)
        return f"{mark}[{text}]({relative}{hash_}{anchor})"

    return _LINK.sub(linked, markdown)


def _place(path: Path) -> str | None:
    """Where a file lies on the site; None of one that is not there."""
    if path in _PLACES:
        return _PLACES[path]
    if path.is_relative_to(DOCS):
        page = path / "README.md" if path.is_dir() else path
        return page.relative_to(DOCS).as_posix() if page.is_file() else None
    return None
