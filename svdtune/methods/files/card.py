"""The model card of a saved adapter: README.md, with what the Hub reads in its head and what a
person needs below it.

PEFT writes an empty form first, which is replaced here. A text that somebody wrote is kept: only
the sections that are named here are brought up to date.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from safetensors import safe_open

from svdtune._version import __version__
from svdtune.checkpoint.rewrite import CARD
from svdtune.errors import SvdtuneError
from svdtune.methods.settings import chosen
from svdtune.system import first_line

if TYPE_CHECKING:
    from svdtune.methods.config import SvdConfig

TITLES = {"sara": "SARA", "mosara": "Mo-SARA", "sorsa": "SORSA"}
_VERSIONS = "### Framework versions"


def write_card(folder: Path, config: "SvdConfig", weights: Path) -> None:
    """Write or bring up to date the card of an adapter that was just saved."""
    card = _load(folder)
    title = f"{TITLES[config.method]} adapter"
    base = config.base_model_name_or_path
    if base:
        title += f" for {base}"
        card.data["base_model"] = base
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "svdtune", config.method})
    if not card.text.partition(_VERSIONS)[0].strip():
        card.text = f"# {title}\n\n{card.text.lstrip()}"
    card.text = with_section(card.text, "Adapter", _table(config, weights))
    card.text = with_section(card.text, "How to load", _how_to_load(config))
    if f"- svdtune {__version__}" not in card.text.splitlines():
        heading = "" if _VERSIONS in card.text else f"\n{_VERSIONS}\n\n"
        card.text = f"{card.text.rstrip()}\n{heading}- svdtune {__version__}\n"
    card.save(folder / CARD)


def add_section(folder: Path, title: str, body: str) -> None:
    """Put a section into the card of a saved adapter, in the place of an earlier one of that
    title."""
    card = _load(folder)
    card.text = with_section(card.text, title, body)
    card.save(folder / CARD)


def with_section(text: str, title: str, body: str) -> str:
    """The text with a section `## title`. It replaces an earlier section of that title. Else it
    goes before the list of versions, or to the end where there is none."""
    section = f"## {title}\n\n{body.strip()}\n\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^#{{1,3}} |\Z)", text, re.MULTILINE | re.DOTALL)
    if found:
        return text[: found.start()] + section + text[found.end() :]
    before, mark, after = text.partition(_VERSIONS)
    return f"{before.rstrip()}\n\n{section}{mark}{after}".lstrip("\n")


def table(rows: Mapping[str, Any]) -> str:
    """Two columns in Markdown, without a head."""
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def front(data: Mapping[str, Any]) -> str:
    """The head of a card, as YAML between two lines of dashes."""
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n"


def ranks_in_words(ranks: Mapping[str, int]) -> str:
    """How large the ranks are."""
    values = sorted(ranks.values())
    if values[0] == values[-1]:
        return str(values[0])
    return f"{values[0]} to {values[-1]}, {mean(values):.1f} on average"


def _load(folder: Path) -> ModelCard:
    """The card in a folder, or a new one. PEFT's empty form counts as a card without text.

    Raises:
        SvdtuneError: it is not UTF-8, or its head is no YAML.
    """
    path = folder / CARD
    if not path.is_file():
        return ModelCard(front({"library_name": "peft"}))
    try:
        card = ModelCard.load(path)
    except Exception as error:  # by the types of what reads YAML
        raise SvdtuneError(
            f"{path} is damaged: {first_line(error)}; mend its head, or delete it for a new one"
        ) from error
    text, mark, versions = card.text.partition(_VERSIONS)
    if text.strip() == _empty_form():
        card.text = mark + versions
    return card


@cache
def _empty_form() -> str:
    """What PEFT writes into a card that nothing is known for."""
    return str(ModelCard.from_template(ModelCardData()).text).partition(_VERSIONS)[0].strip()


def _table(config: "SvdConfig", weights: Path) -> str:
    stored = trained = 0
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            shape = file.get_slice(key).get_shape()
            elements = 1
            for size in shape:
                elements *= size
            stored += elements
            if not key.rpartition(".")[2].startswith("frozen_"):
                trained += elements
    rows = {
        "method": TITLES[config.method],
        "base model": f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "not named",
        "adapted layers": len(config.ranks),
        "rank": ranks_in_words(config.ranks),
        "trained parameters": f"{trained:,}",
        "in the file": f"{stored:,} numbers, {weights.stat().st_size:,} bytes",
        "settings": ", ".join(f"`{name}={value}`" for name, value in _settings(config).items()) or "the defaults",
    }
    return table(rows)


def _settings(config: "SvdConfig") -> dict[str, Any]:
    """The settings that differ from the defaults. The task is left out: it has a line of its
    own."""
    found = chosen(config)
    found.pop("task_type", None)
    targets = found.get("target_modules")
    if isinstance(targets, list) and {config.module_of(name) for name in config.ranks} == set(targets):
        # "all-linear", spelled out
        found["target_modules"] = sorted({name.rpartition(".")[2] for name in targets})
    return found


def _how_to_load(config: "SvdConfig") -> str:
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(getattr(config.task_type, "value", config.task_type)))
    lines = ["import svdtune  # makes PEFT know the method: pip install svdtune"]
    if cls is not None and config.base_model_name_or_path:
        auto = f"Auto{cls.__name__}"
        lines += [f"from peft import {auto}", "", f'model = {auto}.from_pretrained("this-folder-or-repository")']
    else:
        lines += ["from peft import PeftModel", ""]
        lines += ['model = PeftModel.from_pretrained(base_model, "this-folder-or-repository")']
    code = "\n".join(["```python", *lines, "```"])
    return (
        f"{code}\n\nThe base must be the very checkpoint that the adapter was made from; svdtune compares fingerprints."
    )
