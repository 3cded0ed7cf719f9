"""Files with bytes flipped, cut, removed and put in: each is refused with one sentence, or read as
what it was.

Texts that people write themselves (data, recipes, an adapter's configuration) have no checksum:
another value there is an edit. For those it counts that nothing but a `SvdtuneError` comes out.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from svdtune import SorsaConfig, analyze, evaluate
from svdtune.analysis import read_facts
from svdtune.cache import entries
from svdtune.data.check import check_file
from svdtune.errors import SvdtuneError
from svdtune.evaluation.predictions import Prediction, PredictionStore
from svdtune.export import find_source, open_source
from svdtune.methods.files.adapter import read_adapter, read_config
from svdtune.models import load
from svdtune.reports import gather, render
from svdtune.spectra import store
from svdtune.training.checkpoints import latest_checkpoint
from svdtune.training.recipe import load_recipe


@dataclass
class Flips:
    """By file and outcome how often, and what did not hold."""

    outcomes: dict[str, Counter] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Altered files in all."""
        return sum(sum(counts.values()) for counts in self.outcomes.values())


@dataclass(frozen=True)
class Target:
    """A file to alter, and how it is read.

    Attributes:
        file: it.
        read: reads it and returns a value to compare; None for "counts as absent".
        edited: whether another value is a user's right, as in texts that people write.
        before: called before each reading.
        same: what to call it where the value is the same.
        span: how many bytes from the start may be altered; None for all.
    """

    file: Path
    read: Callable[[], Any]
    edited: bool = False
    before: Callable[[], object] = lambda: None
    same: str = "same value"
    span: int | None = None


def flip(
    work: Path, model: Path, run: Path, recipe: Path, wanted: int, chance: random.Random, deadline: float
) -> Flips:
    """Alter files `wanted` times in all, or until the deadline."""
    targets = _targets(work, run, recipe) | _base_targets(work, model) | _report_targets(work, run)
    share = -(-wanted // len(targets))
    found = Flips()
    for name, target in targets.items():
        counts = found.outcomes[name] = Counter()
        whole = target.file.read_bytes()
        target.before()
        expected = target.read()
        for _ in range(share):
            if time.monotonic() > deadline:
                break
            altered = alter(whole[: target.span], chance) + whole[len(whole[: target.span]) :]
            target.file.write_bytes(altered)
            target.before()
            outcome = _read(name, target, expected, found)
            counts[outcome if altered != whole else "unaltered"] += 1
        target.file.write_bytes(whole)
    return found


def alter(whole: bytes, chance: random.Random) -> bytes:
    """Flip a bit, cut, take out or put in some bytes."""
    data, at = bytearray(whole), chance.randrange(len(whole))
    what = chance.random()
    if what < 0.7:
        data[at] ^= 1 << chance.randrange(8)
    elif what < 0.8:
        del data[at:]
    elif what < 0.9:
        del data[at : at + chance.randint(1, 64)]
    else:
        data[at:at] = chance.randbytes(chance.randint(1, 64))
    return bytes(data)


def _read(name: str, target: Target, expected: Any, found: Flips) -> str:
    try:
        value = target.read()
    except SvdtuneError:
        return "refused"
    except Exception as error:
        found.wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        return "raw error"
    if value is None:
        return "counted as absent"
    if value == expected:
        return target.same
    if target.edited:
        return "read as an edit"
    found.wrong.append(f"{name}: altered, and read as if nothing were wrong")
    return "silently accepted"


def _targets(work: Path, run: Path, recipe: Path) -> dict[str, Target]:
    work.mkdir(exist_ok=True)
    adapter, checkpoints = work / "adapter", work / "checkpoints"
    shutil.copytree(run / "adapter", adapter)
    newest, _ = latest_checkpoint(run)
    assert newest is not None
    shutil.copytree(newest, checkpoints / newest.name)
    store.store("spectrum", "key", {"values": torch.arange(50.0)}, {"a": "b"})
    cached = next(entry.path for entry in entries() if entry.key == "key")
    answers, aside = work / "answers", work / "aside.jsonl"
    kept = PredictionStore(answers, {"seed": 0})
    kept.append(Prediction(i, str(i), "2+2=", f"it is {i}", "4", str(i), False, None, None, 4, True) for i in range(20))
    shutil.copyfile(answers / "predictions.jsonl", aside)
    data = work / "data.jsonl"
    data.write_text("".join(f'{{"question": "what is {i}?", "answer": "{i}"}}\n' for i in range(10)))
    table = work / "data.csv"
    table.write_text("question,answer\n" + "".join(f'"what, {i}?",{i}\n' for i in range(10)))
    copied = work / "recipe.yaml"
    shutil.copyfile(recipe, copied)

    def found_checkpoint() -> str | None:
        path, _ = latest_checkpoint(checkpoints)
        return path and path.name

    def tensors() -> dict[str, list]:
        layers = read_adapter(adapter).layers
        return {f"{layer}.{part}": t.tolist() for layer, parts in layers.items() for part, t in parts.items()}

    def cache() -> list | None:
        loaded = store.load("spectrum", "key")
        return loaded and [loaded[0]["values"].tolist(), loaded[1]]

    def predictions() -> list:
        return sorted(PredictionStore(answers, {"seed": 0}).done.items())

    def some_of_the_predictions() -> Any:
        """A cut file is what an interruption leaves: whole lines from the start count."""
        found = predictions()
        return whole_answers if found == whole_answers[: len(found)] else found

    whole_answers = predictions()
    checkpoint = checkpoints / newest.name
    parts = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth", "sealed.json")
    return {
        "adapter_model.safetensors": Target(adapter / "adapter_model.safetensors", tensors),
        "adapter_config.json": Target(adapter / "adapter_config.json", lambda: vars(read_config(adapter)), edited=True),
        **{f"checkpoint/{part}": Target(checkpoint / part, found_checkpoint) for part in parts},
        "cache": Target(cached, cache),
        "predictions.jsonl": Target(answers / "predictions.jsonl", some_of_the_predictions),
        "settings.json": Target(answers / "settings.json", predictions),
        "data.jsonl": Target(data, lambda: check_file(data), edited=True),
        "data.csv": Target(table, lambda: check_file(table), edited=True),
        "recipe.yaml": Target(copied, lambda: load_recipe(copied), edited=True),
    }


def _base_targets(work: Path, model: Path) -> dict[str, Target]:
    """The base model under an adapter on all of its linear layers but the head, opened as
    `generate` opens it.

    What must not change is what the adapter's fingerprints cover: the adapted layers' weights, at
    bf16's resolution.
    """
    base, adapter = work / "base", work / "on_base"
    shutil.copytree(model, base)
    adapted = get_peft_model(load(base).model, SorsaConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(adapter)

    def weights() -> list:
        opened = open_source(find_source(base, adapter)).model
        layers = (module for module in opened.modules() if isinstance(module, BaseTunerLayer))
        return [layer.get_base_layer().weight.detach().bfloat16().tolist() for layer in layers]

    file = base / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    elsewhere = "in no adapted layer, or below bf16"
    return {
        "base model.safetensors": Target(file, weights, same=elsewhere),
        "base model.safetensors, its header": Target(file, weights, same=elsewhere, span=header),
        "base config.json": Target(base / "config.json", weights, edited=True),
    }


def _report_targets(work: Path, run: Path) -> dict[str, Target]:
    """The files of a run that `report` reads: with any of them altered it writes its page, and
    names what it left out."""
    folder = shutil.copytree(run, work / "reported")
    analyze(folder)
    evaluate(folder, "arithmetic", limit=2, max_new_tokens=2)
    answered = next(folder.glob("evaluations/*/result.json"))
    files = [folder / "training.json", folder / "train_log.jsonl", *(folder / "analysis").iterdir(), answered]
    return {
        f"report of {file.name}": Target(file, lambda: render(gather([read_facts(folder)])), edited=True)
        for file in files
    }
