"""What is shown before training: adapted modules, trained parameters, and one example with its loss mask visible."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from svdtune.data.encoding import IGNORED
from svdtune.training.method import adapted_modules, by_kind


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a tied weight counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def show_adapted(console: Console, model: nn.Module) -> None:
    """Print which modules are adapted and how many, and the share of trained parameters."""
    names = adapted_modules(model)
    kinds = ", ".join(f"{kind} ×{count}" for kind, count in by_kind(names).items())
    trained, total = parameter_counts(model)
    console.print(f"adapted   {len(names)} modules: {kinds}" if names else "adapted   none: the whole model is trained")
    console.print(f"trained   {trained:,} of {total:,} parameters ({trained / total:.3%})", highlight=False)


def show_example(console: Console, example: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print one example, decoded, a line for each run of tokens that are or are not trained on."""
    console.print("example   (first of the training data, decoded; trained on is what follows ▶)")
    for masked, text in masked_text(example, tokenizer):
        mark, style = ("·", "dim") if masked else ("▶", "bold green")
        for line in text.split("\n"):
            console.print(Text(f"        {mark} {line}", style=style), soft_wrap=True)


def masked_text(example: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> Sequence[tuple[bool, str]]:
    """Runs of the example's text with whether they are masked; special tokens are spelled out."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    runs = ((masked, [i for i, _ in run]) for masked, run in groupby(pairs, key=lambda pair: pair[1] == IGNORED))
    return [(masked, tokenizer.decode(ids, skip_special_tokens=False)) for masked, ids in runs]
