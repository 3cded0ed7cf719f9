"""Adapters: where they go, what they cost, how they start, and what becomes of them."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

from svdtune.api.inputs import ModelLike, asked, source_of
from svdtune.errors import SvdtuneError
from svdtune.methods import sites as places
from svdtune.models.loader import load_tokenizer, locate, placement
from svdtune.spectra.devices import check_device

if TYPE_CHECKING:
    from svdtune.export import MergeReport, Source
    from svdtune.export.lora import LoraReport
    from svdtune.methods.sites import Count, Sites
    from svdtune.planning import Plan
    from svdtune.training.recipe import Recipe

ConfigLike = PeftConfig | Mapping[str, Any]


def sites(
    model: "ModelLike | Recipe | Mapping[str, Any]",
    config: ConfigLike | None = None,
    *,
    device: str | None = None,
    progress: bool | None = None,
) -> "Sites":
    """Where an adapter goes on a model, with the rank and the numbers that it has there.

    PEFT itself puts the adapter on a copy of the model without weights, and everything is read off
    that copy; a model on disk is never built. With a threshold, weights are read, one at a time.

    Args:
        model: a model folder, a `.gguf` file, a hub name or a shape such as "llama-7b"; a loaded
            model, which stays as it is; or a recipe (a YAML file, its sections as a dict, or one
            that was read).
        config: of any PEFT method, or a recipe's `method` section, {"name": "sorsa", "r": 64}. None
            with a recipe; with a loaded model, describes the adapter that is on it, or the bare
            model; with a run or adapter folder in the model's place, the adapter there.
        device: where weights are decomposed; a GPU by default, where there is one.
        progress: show a bar; by default where stderr is a terminal.

    Returns:
        A sequence of sites, each with its name, module, rows, shape (out, in), rank, and the counts
        of numbers that are trained and frozen there; its `count` is that of the whole model,
        `ranks` the ranks by name.

    Raises:
        SvdtuneError: there is no such model, the adapter cannot be put on it, or it needs weights
            that are not there.
    """
    check_device(device)
    wanted = asked("sites", model, config)
    by_spectrum = getattr(wanted.config, "threshold", None) is not None
    return places.sites(wanted.open(weights=by_spectrum), wanted.config, device=device, progress=progress)


def count(model: "ModelLike | Recipe | Mapping[str, Any]", config: ConfigLike | None = None) -> "Count":
    """The parameters of an adapted model.

    Args:
        model, config: as for `sites`.

    Returns:
        (trained, frozen, total): those that get gradients, those that the adapter adds without
        training them, and all, the base model's included.

    Raises:
        SvdtuneError: as `sites`.
    """
    return sites(model, config).count


def plan(
    model: "ModelLike | Recipe | Mapping[str, Any]",
    config: ConfigLike | None = None,
    *,
    threshold: float | None = None,
    budget: str | int | None = None,
    match_lora: int | None = None,
    ranks: str = "sara",
    device: str | None = None,
    progress: bool | None = None,
) -> "Plan":
    """Ranks and trained parameters of an adapter before anything trains: what `get_peft_model`
    would put on the loaded model. The model is never built; weights are read one at a time, and
    only where ranks come from them.

    At most one of `threshold`, `budget` and `match_lora` sets the ranks, in place of the
    configuration's own `r` or threshold; ranks in its `rank_pattern` stay.

    Args:
        model: as for `sites`.
        config: of any PEFT method, or a recipe's `method` section; None with a recipe.
        threshold: θ in (0, 1], the share of the sum of a layer's singular values that its rank
            holds.
        budget: parameters to train at most: a count (500_000, "500k", "1.5M") or a share of all the
            adapted model's ("0.1%").
        match_lora: train at most as many parameters as a LoRA of this rank on the same modules.
        ranks: the rule by which a spectrum gives a rank: "sara" (the threshold's), "entropy" or
            "stable" (so many directions as the spectrum counts as, times the threshold, 1 where
            none of the three is given).
        device: where weights are decomposed; a GPU by default, where there is one.
        progress: show a bar; by default where stderr is a terminal.

    Returns:
        A plan: `config` is the configuration with every rank written out, for `get_peft_model`;
        `sites` as from `sites`; `trained`, `frozen` and `base_parameters` are counts, `share` is
        trained over all, `threshold` the θ that gave the ranks or None; `method_section()` is for a
        recipe, `lora_section()` for a LoRA of the same ranks, `to_json()` all of it.

    Raises:
        SvdtuneError: no configuration, several of the three sizes, a value outside its range, a
            budget below rank 1 everywhere, or whatever `sites` refuses.
    """
    from svdtune.planning import plan as make

    check_device(device)
    wanted = asked("plan", model, config)
    if wanted.config is None:
        raise SvdtuneError(
            "plan was given no configuration: expected one of PEFT such as SaraConfig(threshold=0.01), a recipe's method "
            "section, or a recipe in place of the model"
        )
    sizes = (threshold, budget, match_lora, getattr(wanted.config, "threshold", None))
    opened = wanted.open(weights=ranks != "sara" or any(size is not None for size in sizes))
    return make(
        opened,
        wanted.config,
        threshold=threshold,
        budget=budget,
        match_lora=match_lora,
        ranks=ranks,
        device=device,
        progress=progress,
    )


def merge(
    source: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    check: bool | None = None,
) -> "MergeReport":
    """Write base + adapter as one checkpoint that needs neither PEFT nor svdtune.

    Weights are read, merged and written one at a time, so a model larger than memory merges. What
    was written is read back and compared with the adapter's outputs before it appears under its
    name.

    Args:
        source: a run or adapter folder, or with `adapter` a model.
        output: folder to create.
        adapter: an adapter folder, where `source` is a model.
        dtype: "auto" (the base's own), "float32", "bfloat16" or "float16".
        device: where to compare; by default a GPU where there is one.
        check: compare logits with the adapter's; by default where the model fits into memory.

    Returns:
        `output`; `dtype`; `layers`, how many weights changed; `comparison` with `max_abs`,
        `relative`, `effect`, `same_token` and `positions`, or None, and `unchecked`, why not.

    Raises:
        SvdtuneError: there is no adapter, it cannot be merged (Mo-SARA with several heads: its
            update depends on the token) or belongs to another base, `output` cannot be written, or
            the checkpoint does not give the adapter's outputs.
    """
    from svdtune.export import merge as write

    found = source_of("merge", source, adapter, instead="A loaded model merges by model.merge_and_unload()")
    return write(found, output, check=check, **{"dtype": dtype} | placement(None, device))


def export_lora(
    source: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    uniform: bool = False,
    base: str | Path | None = None,
    start: str | Path | None = None,
    to: str = "lora",
) -> "LoraReport":
    """Write an adapter as the LoRA that does the same, which PEFT, vLLM and llama.cpp load without
    svdtune; or the difference of two models.

    SARA gives a LoRA of its own ranks, SORSA one of twice its rank, Mo-SARA with one head one of
    its own, LoRA itself, all without loss unless they are cut. A PiSSA or OLoRA adapter less its
    `start` gives one of twice its rank for the model from before. A fully tuned model is cut.

    Args:
        source: a run or adapter folder, of SARA, Mo-SARA, SORSA or LoRA; or a tuned model.
        output: folder to create; a file `to` "gguf".
        rank: cut every layer to this rank, and state the error. None: no loss.
        error: cut every layer to the smallest rank with ‖ΔW_lora − ΔW‖ <= error · ‖ΔW‖ (Frobenius).
        uniform: pad all layers to one rank, as llama.cpp's own converter needs.
        base: a model; given, the logits of both adapters on it are compared. For a tuned model, the
            one that it was tuned from (a run's own by default); with `start`, the untouched one.
        start: the adapter as `svdtune.start` wrote it, where it took its start off the weights.
        to: "lora", PEFT's folder, or "gguf", llama.cpp's file, for which the base's configuration
            is read.

    Returns:
        `output`; `ranks` by layer; `errors`, ‖ΔW_lora − ΔW‖ / ‖ΔW‖ (Frobenius) of the layers that
        were cut; `notes` on tools that would not take it; `difference` of the logits (`relative`,
        `effect`), None without `base` or where there is no adapter to compare.

    Raises:
        SvdtuneError: there is no adapter, it is damaged, another method's or has several heads, or
            `output` exists or cannot be written; llama.cpp has no such LoRA.
    """
    if to not in ("lora", "gguf"):
        raise SvdtuneError(f"export_lora writes to 'lora' or 'gguf'; got {to!r}")
    if to == "gguf":
        from svdtune.export.gguf import write_gguf

        path = Path(output).expanduser()
        if path.exists():
            raise SvdtuneError(f"{path} is there already, and nothing is overwritten; name another output")
        with tempfile.TemporaryDirectory() as work:
            lora = Path(work, "lora")
            report = export_lora(source, lora, rank=rank, error=error, uniform=uniform, base=base, start=start)
            write_gguf(lora, path, None if base is None else str(base))
        kept = [note for note in report.notes if not note.startswith(("vLLM", "llama.cpp"))]  # those are of the folder
        return dataclasses.replace(report, output=path, notes=kept)
    from svdtune.export import Source, adapter_of
    from svdtune.export.lora import Cut
    from svdtune.export.lora import export_lora as write
    from svdtune.methods.files.integrity import ADAPTER_CONFIG

    cut, name = Cut(rank, error), None if base is None else str(base)
    begun = None if start is None else Path(start)
    folder = Path(source).expanduser() if isinstance(source, str | Path) else None
    found: Source | None = None  # the base that an adapter itself names need not be there
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        found = source_of("export_lora", source, instead="Save the adapter first: model.save_pretrained(folder)")
    if found is not None and found.adapter is None and (name or found.recipe):
        from svdtune.checkpoint import open_checkpoint
        from svdtune.export.difference import export_difference

        _check_no_start(source, begun)
        before = (
            Source(name) if name else dataclasses.replace(found, base=found.recipe.model.name if found.recipe else "")
        )
        tuned, untuned = (open_checkpoint(locate(each.base), **each.origin) for each in (found, before))
        return export_difference(tuned, untuned, Path(output), cut, uniform=uniform)
    adapter = folder if found is None else adapter_of(found, "export")
    opened = found if name is None else dataclasses.replace(found or Source(name, folder), base=name, revision=None)
    if name is not None:
        locate(name)  # one that is not there is no reason to find after everything is written
    report = write(adapter, Path(output), cut=cut, uniform=uniform, base=opened, start=begun)
    return report if opened is None or name is None or begun is not None else _compared(report, opened)


def _check_no_start(source: str | Path, start: Path | None) -> None:
    if start is not None:
        raise SvdtuneError(
            f"{source} is a tuned model, which has no start to take off; got start={str(start)!r}. Leave start out: the "
            "difference from its base is exported, cut to a rank or an error. Or name an adapter in its place"
        )


def _compared(report: "LoraReport", adapted_base: "Source") -> "LoraReport":
    """The report with the outputs' difference, or with a note why there is none."""
    from svdtune.export.lora import compare

    try:
        load_tokenizer(adapted_base.base, **adapted_base.origin)
    except SvdtuneError as error:
        return dataclasses.replace(report, notes=[*report.notes, f"the outputs were not compared: {error}"])
    return dataclasses.replace(report, difference=compare(adapted_base, report.output))


def combine(
    weights: Mapping[str, float] | Mapping[Path, float] | Mapping[str | Path, float],
    output: str | Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    uniform: bool = False,
) -> "LoraReport":
    """Write a weighted sum of adapters on one base model, Σ w ΔW, as one LoRA. The methods may
    differ, LoRA among them.

    Exact by stacking: a layer's rank is the sum of the adapters' ranks there.

    Args:
        weights: run or adapter folder → its weight, which may be negative.
        output: folder to create.
        rank, error, uniform: as for `export_lora`.

    Returns:
        As `export_lora`.

    Raises:
        SvdtuneError: as `export_lora`; also where one adapter is named twice, or the adapters were
            made from different bases or train whole modules or biases.
    """
    from svdtune.export.lora import Cut
    from svdtune.export.lora import combine as write

    if not isinstance(weights, Mapping):
        raise SvdtuneError(
            f"combine takes the weight of each folder, such as {{'runs/a': 0.7, 'runs/b': 0.3}}; got a "
            f"{type(weights).__name__}"
        )
    return write(weights, Path(output), cut=Cut(rank, error), uniform=uniform)
