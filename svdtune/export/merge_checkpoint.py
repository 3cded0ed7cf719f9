"""Merge an adapter into a plain Transformers checkpoint on disk, weight by weight, and compare what
it gives with the adapter. (One of fused experts is merged in the loaded model.)

No model is built for it: each tensor of the base checkpoint is copied, or merged and written, one
in memory at a time. Files, their names and the dtype stay those of the base. A comparison of logits
follows where the model fits into memory.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from torch import Tensor
from tqdm import tqdm

from svdtune.checkpoint import Checkpoint
from svdtune.checkpoint.rewrite import CARD, copy_other_files, floating, folder_of, write_weights
from svdtune.checkpoint.tensors import FLOATING, Stored
from svdtune.checkpoint.writer import Computed
from svdtune.errors import SvdtuneError
from svdtune.export.comparison import LogitComparison, compare_checkpoint, why_not
from svdtune.export.layerwise import IN_MEMORY, LayerwiseAdapter
from svdtune.export.source import Source, adapter_of, check_writes, open_source, opened_base
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.adapter import read_config
from svdtune.methods.files.card import TITLES, front, table
from svdtune.methods.layers.experts import stacks_in
from svdtune.models import load_tokenizer, set_end_token
from svdtune.models.loader import load_decoding
from svdtune.system import check_new_folder, new_folder, read_json, without_bar
from svdtune.training.lock import held


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        output: folder of the checkpoint.
        dtype: of the merged weights, as a word of Transformers; several, joined by commas, where
            the base mixes them.
        layers: number of weights that the adapter changed.
        comparison: the checkpoint's logits, read back from the disk, with the adapter's; None where
            they were not compared.
        unchecked: why not.
    """

    output: Path
    dtype: str
    layers: int
    comparison: LogitComparison | None
    unchecked: str | None


def merge(
    source: Source,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    check: bool | None = None,
) -> MergeReport:
    """Write base + adapter as one checkpoint that needs neither PEFT nor svdtune.

    Shards, dtype, tokenizer, generation config and the base folder's other files are kept. The
    checkpoint is written beside `output`, compared with the adapter there, and only then moved into
    place. All but `source`, a base model with an adapter, is as for `svdtune.merge`.
    """
    output = Path(output).expanduser()
    folder = adapter_of(source, "merge")
    check_writes(source)
    if dtype != "auto" and dtype not in _words():
        raise SvdtuneError(f"dtype {dtype!r} is none to merge in: expected auto, {', '.join(_words())}")
    check_new_folder(output)
    target = None if dtype == "auto" else _words()[dtype]
    config = read_config(folder)
    kept = nullcontext() if source.run is None else held(source.run, "merge")
    with kept, new_folder(output) as work, opened_base(source, config, output.absolute().parent) as base:
        if isinstance(config, SvdConfig) and config.target_parameters:
            layers = len({*map(config.module_of, config.ranks)})
            untied, dtypes = _write_loaded(base, source, work, target)
        else:
            adapter = LayerwiseAdapter(folder, config, base.model)
            layers, (untied, dtypes) = len(adapter.layers), _write_weights(base, work, adapter, target)
        _copy_other_files(base, work, source)
        _edit_config(work, untied, target)
        weights = sum(_cast(stored, target).nbytes for stored in base.tensors.values())
        own = folder_of(base)
        unchecked = "not asked for" if check is False else why_not(source, base.model, own, weights, device)
        if check and unchecked:
            raise SvdtuneError(f"the merged checkpoint cannot be compared with the adapter: {unchecked}")
        comparison = None if unchecked else compare_checkpoint(source, work, dtype, device, dtypes)
        words = ", ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
        report = MergeReport(output, words, layers, comparison, unchecked)
        (work / CARD).write_text(_card(source, config, report), encoding="utf-8")
    return report


def _words() -> dict[str, torch.dtype]:
    return {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING.values()}


def _write_loaded(
    base: Checkpoint, source: Source, work: Path, target: torch.dtype | None
) -> tuple[bool, set[torch.dtype]]:
    """Merge in the loaded model, and write every weight; whether tied embeddings had to part, and
    the dtypes of the experts' weights.

    Fused experts are a parameter in the model, and in a checkpoint often tensors of their own, from
    which Transformers makes the one and back.
    """
    # the sum is rounded once, to the dtype that is asked for
    model: Any = open_source(source, dtype="auto" if target is None else "float32").model
    merged = model.merge_and_unload(safe_merge=True)
    (merged if target is None else merged.to(target)).save_pretrained(work)
    ends, merged_ends = _ends(base.model), _ends(merged)
    tied = None not in ends and ends[0] is ends[1]
    return tied and not torch.equal(*merged_ends), {stack.weight.dtype for _, stack in stacks_in(merged)}


def _ends(model: Any) -> list[Any]:
    """The weights of the input and output embeddings."""
    return [getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())]


def _write_weights(
    base: Checkpoint, work: Path, adapter: LayerwiseAdapter, target: torch.dtype | None
) -> tuple[bool, set[torch.dtype]]:
    """Write every weight; whether tied weights had to part, and the dtypes of the weights that were
    changed."""
    with tqdm(desc="svdtune merge", unit="weight", delay=1.0, disable=without_bar(None)) as bar:
        new, added, untied = _plan(base, adapter, target, bar)

        def replacement(name: str, stored: Stored) -> dict[str, Stored | Computed]:
            return {name: new.get(name) or _cast(stored, target)} | added.get(name, {})

        write_weights(base, work, replacement)
    changed = [*new.values(), *(tensor for group in added.values() for tensor in group.values())]
    return untied, {tensor.dtype for tensor in changed if isinstance(tensor, Computed)}


def _plan(
    base: Checkpoint, adapter: LayerwiseAdapter, target: torch.dtype | None, bar: tqdm
) -> tuple[dict[str, Computed], dict[str, dict[str, Stored | Computed]], bool]:
    """What takes the place of a stored tensor, what is written beside one, and whether tied
    embeddings part.

    Where input and output embeddings are one weight and one of them is adapted, both are written,
    each with its own values.
    """
    tensors, own = base.tensors, base.names.own
    changed = {f"{layer}.weight": partial(_merged, base, adapter, layer) for layer in adapter.layers}
    changed |= {parameter: partial(adapter.read, parameter) for parameter in adapter.replaced}
    new: dict[str, Computed] = {}
    added: dict[str, dict[str, Stored | Computed]] = {}
    bar.total = len(changed)
    untied = False
    for parameter, compute in changed.items():
        place = _place(base, parameter)
        dtype = target or floating(tensors[place])
        shape = tensors[place].shape
        tensor = Computed(dtype, shape, partial(_rounded, parameter, compute, dtype, shape, bar))
        if parameter in own:
            new[place] = tensor
        else:
            added.setdefault(place, {})[parameter] = tensor
        for twin in _twins(base, parameter):
            untied = True
            if twin not in own and twin not in changed:
                added.setdefault(place, {})[twin] = _cast(tensors[place], target)
    return new, added, untied


def _place(base: Checkpoint, parameter: str) -> str:
    """The stored name of a parameter, under whichever of the parameter's names."""
    place = base.names.of(parameter)
    if place is None:
        raise SvdtuneError(
            f"the base checkpoint stores no {parameter!r} under that name, so it cannot be merged on disk; {IN_MEMORY}"
        )
    return place


def _twins(base: Checkpoint, parameter: str) -> list[str]:
    """The other names of a tied parameter; a configuration can untie input and output embeddings
    alone."""
    names = base.names.groups.get(parameter, [parameter])
    if len(names) == 1:
        return []
    ends = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    modules = [base.model.get_submodule(name.rpartition(".")[0]) for name in names]
    if len(names) > 2 or not all(any(module is end for end in ends) for module in modules):
        raise SvdtuneError(
            f"{parameter!r} is one weight with {', '.join(repr(n) for n in names if n != parameter)}: merging would change "
            "them too. Keep the adapter unmerged"
        )
    return [name for name in names if name != parameter]


def _merged(base: Checkpoint, adapter: LayerwiseAdapter, layer: str) -> Tensor:
    return adapter.merged(layer, base.readers[f"{layer}.weight"]())


def _rounded(
    parameter: str, compute: Callable[[], Tensor], dtype: torch.dtype, shape: tuple[int, ...], bar: tqdm
) -> Tensor:
    found = compute().to(dtype)
    if tuple(found.shape) != shape:
        raise SvdtuneError(
            f"{parameter} is {list(found.shape)} in the adapter and {list(shape)} in the base checkpoint: it was made for a "
            "base of another size, or with a resized vocabulary. Save that base first and name its folder"
        )
    if not torch.isfinite(found).all():
        raise SvdtuneError(
            f"{parameter} with the adapter in it does not fit {dtype}: it holds NaN or infinity; the adapter cannot be merged. "
            "Is it broken? If not, use --dtype float32 (dtype='float32')"
        )
    bar.update()
    return found


def _cast(stored: Stored, target: torch.dtype | None) -> Stored | Computed:
    if target is None or stored.dtype not in FLOATING or FLOATING[stored.dtype] == target:
        return stored
    return Computed(target, stored.shape, stored.read)


def _copy_other_files(base: Checkpoint, work: Path, source: Source) -> None:
    """Tokenizer, configurations and whatever else stands in the base folder; with the run's end
    token where it set one."""
    folder, model = folder_of(base), base.model
    copy_other_files(base, work)
    end_token = source.recipe.model.end_token if source.recipe else None
    if end_token is not None:
        tokenizer = load_tokenizer(folder, trust_remote_code=source.trust_remote_code)
        model.generation_config = load_decoding(folder, revision=None) or model.generation_config
        set_end_token(model, tokenizer, end_token)
        tokenizer.save_pretrained(work)
        model.config.save_pretrained(work)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(work)


def _card(source: Source, adapter: PeftConfig, report: MergeReport) -> str:
    method = PeftType(adapter.peft_type).value
    found = report.comparison
    error = f"relative difference {found.relative:.1e}, at {found.positions} positions" if found else "not compared"
    rows = {
        "base model": f"`{source.base}`",
        "adapter": TITLES.get(method.lower(), method),
        "weights changed": report.layers,
        "dtype of those": report.dtype,
        "logits against the adapter's": error,
    }
    data = {"base_model": source.base, "library_name": "transformers", "tags": ["merged", "svdtune", method.lower()]}
    return f"{front(data)}# {source.base} with an adapter merged into it\n\n{table(rows)}\n\nBy `svdtune merge`.\n"


def _edit_config(work: Path, untied: bool, target: torch.dtype | None) -> None:
    path = work / "config.json"
    config = read_json(path)
    if target is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(target).removeprefix("torch.")
    if untied:
        config["tie_word_embeddings"] = False
    if untied or target is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
