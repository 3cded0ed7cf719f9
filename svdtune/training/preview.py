"""What is shown before training: adapted modules, trained parameters, and one example with its loss
mask visible."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from svdtune.data.encoding import IGNORED
from svdtune.methods.injection import by_kind
from svdtune.methods.sites import Sites
from svdtune.system import printable

_STYLES = {"·": "dim", "▶": "bold green", "✗": "red"}


def show_adapted(console: Console, found: Sites) -> None:
    """Print which modules are adapted and how many, and the share of trained parameters."""
    trained, _, total = found.count
    kinds = ", ".join(f"{kind} ×{count}" for kind, count in by_kind([site.name for site in found]).items())
    if found:
        console.print(f"adapted   {len(found)} modules: {kinds}")
    else:
        whole = "the whole model is trained" if trained == total else "some of the model's own weights are trained"
        what = whole if found.config is None else "virtual tokens are trained"
        console.print(f"adapted   none: {what}")
    console.print(f"trained   {trained:,} of {total:,} parameters ({trained / total:.3%})", highlight=False)


def show_example(console: Console, example: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print one example, decoded, a line for each run of tokens that are or are not trained on."""
    console.print("example   (first of the training data, decoded; trained on is what follows ▶)")
    for masked, text in masked_text(example, tokenizer):
        _show(console, text, "·" if masked else "▶")


def show_judged(console: Console, example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print one pair, labelled answer or prompt, decoded, and marked what is to become likelier and
    what less likely."""
    parts = [("prompt_ids", "·"), ("chosen_ids", "▶"), ("rejected_ids", "✗")]
    if "prompt" in example:
        parts, what = parts[:1], "the model answers"
    elif "completion_ids" in example:
        parts = [("prompt_ids", "·"), ("completion_ids", "▶" if example["label"] else "✗")]
        what = f"label: {str(example['label']).lower()}"
    else:
        what = "▶ chosen, ✗ rejected"
    console.print(f"example   (first of the training data, decoded; {what})")
    for name, mark in parts:
        _show(console, str(tokenizer.decode(example[name], skip_special_tokens=False)), mark)


def _show(console: Console, text: str, mark: str) -> None:
    for line in printable(text).split("\n"):
        console.print(Text(f"        {mark} {line}", style=_STYLES[mark]), soft_wrap=True)


def masked_text(example: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> Sequence[tuple[bool, str]]:
    """Runs of the example's text with whether they are masked; special tokens are spelled out."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    runs = ((masked, [i for i, _ in run]) for masked, run in groupby(pairs, key=lambda pair: pair[1] == IGNORED))
    return [(masked, str(tokenizer.decode(ids, skip_special_tokens=False))) for masked, ids in runs]
