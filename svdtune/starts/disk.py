"""Start a stock LoRA from a checkpoint, one weight in memory at a time.

The result is a folder that PEFT loads without svdtune. PiSSA, MiLoRA and OLoRA take the start off
the weights. The weights that are left are then written beside the adapter, as a checkpoint like the
one that was read. Each weight is read once for both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from tqdm import tqdm

from svdtune import spectra
from svdtune.checkpoint import Checkpoint
from svdtune.checkpoint.rewrite import copy_other_files, floating, folder_of, write_weights
from svdtune.checkpoint.tensors import Stored
from svdtune.checkpoint.writer import Computed, TensorWriter
from svdtune.errors import SvdtuneError
from svdtune.linalg import Components, Factors, band_of
from svdtune.methods.files.integrity import ADAPTER_WEIGHTS, PEFT_ROOT
from svdtune.methods.sites import Site, sites, skeleton
from svdtune.methods.start.disk import Started, auto_mapping
from svdtune.spectra.decompose import named
from svdtune.spectra.devices import devices_for_work, on_device
from svdtune.starts.pairs import (
    PISSA,
    LoraPair,
    check_not_asked,
    check_pissa,
    from_factors,
    from_last_left,
    from_qr,
    residual,
)
from svdtune.system import check_new_folder, new_folder, without_bar

ADAPTER, RESIDUAL = "adapter", "residual"


class _PlannedLora(NamedTuple):
    """The sites by parameter, each with alpha / r, and the configuration as PEFT completed it."""

    sites: dict[str, tuple[Site, float]]
    config: LoraConfig


def start_lora(
    checkpoint: Checkpoint,
    config: LoraConfig,
    output: str | Path,
    *,
    components: Components = "first",
    device: str | None = None,
    progress: bool | None = None,
) -> Started:
    """Write the start of a stock LoRA for a checkpoint, equal to PEFT's own exact one to rounding.

    Args:
        checkpoint: from `open_checkpoint`; its model stays as it is.
        config: with `init_lora_weights` "pissa", "pissa_niter_N" (exact too), "olora" or "mica".
        output: folder to create. For "mica" it is the adapter; else it has the adapter in
            `adapter`, and in `residual` the checkpoint that it belongs on.
        components: the triplets that "pissa" starts from: "first", "middle", "last" (MiLoRA), or
            (start, stop).
        device: where weights are decomposed; a GPU by default, where there is one.
        progress: show a bar; by default where stderr is a terminal.

    Raises:
        SvdtuneError: a start that decomposes nothing, settings that put more than A and B into the
            adapter, a weight that others share, or an output that cannot be written.
    """
    output = Path(output).expanduser().absolute()
    check_new_folder(output)
    init = config.init_lora_weights
    pair_of = _way(init, components)
    planned = _plan(checkpoint, config, components)
    whole = init == "mica"  # its pair is zero, so nothing is taken off
    if not whole:
        folder_of(checkpoint)
        _check_weights(checkpoint, planned)
        planned.config.base_model_name_or_path, planned.config.revision = str(output / RESIDUAL), None
    where = devices_for_work(device)[0]
    with new_folder(output) as work:
        adapter = work if whole else work / ADAPTER
        adapter.mkdir(exist_ok=True)
        names = [f"{PEFT_ROOT}{site.name}.lora_{part}.weight" for site, _ in planned.sites.values() for part in "AB"]
        bar = tqdm(
            total=len(planned.sites), desc="svdtune init", unit="layer", delay=1.0, disable=without_bar(progress)
        )
        with bar, TensorWriter(adapter / ADAPTER_WEIGHTS, dict.fromkeys(names), {"format": "pt"}) as file:

            def begin(parameter: str) -> tuple[Tensor, LoraPair]:
                """Write a layer's pair; its weight [out, in] and the pair."""
                site, scaling = planned.sites[parameter]
                weight = site.weight(checkpoint)
                pair = pair_of(weight, site, scaling, where)
                for part, tensor in zip("AB", pair, strict=True):
                    file.write(f"{PEFT_ROOT}{site.name}.lora_{part}.weight", tensor)
                bar.update()
                return weight, pair

            if whole:
                for parameter in planned.sites:
                    begin(parameter)
            else:
                _write_residual(checkpoint, work / RESIDUAL, planned, begin)
        planned.config.save_pretrained(str(adapter), auto_mapping_dict=auto_mapping(checkpoint, config))
    ranks = {site.name: site.rank or 0 for site, _ in planned.sites.values()}
    trained = sum(site.trained for site, _ in planned.sites.values())
    frozen = sum(site.frozen for site, _ in planned.sites.values())
    return Started(output if whole else output / ADAPTER, ranks, trained, frozen, None if whole else output / RESIDUAL)


Way = Callable[[Tensor, Site, float, torch.device], LoraPair]


def _way(init: Any, components: Components) -> Way:
    """How the pair of a layer comes from its weight [out, in]."""
    if isinstance(init, str) and PISSA.fullmatch(init):
        return partial(_pissa, components)
    if init not in ("olora", "mica"):
        raise SvdtuneError(
            f"start writes what LoRA takes from a weight's decomposition: init_lora_weights='pissa', 'olora' or 'mica'; got "
            f"{init!r}. get_peft_model starts the others without one, or from data"
        )
    of_weight = from_qr if init == "olora" else from_last_left

    def decompose(weight: Tensor, site: Site, _: float, where: torch.device) -> LoraPair:
        return named(site.name, lambda: on_device(lambda there: of_weight(there, site.rank or 0), weight, where))

    return decompose


def _pissa(components: Components, weight: Tensor, site: Site, scaling: float, where: torch.device) -> LoraPair:
    how: dict[str, Any] = {"components": components, "device": str(where), "progress": False}
    factors: Factors = dict(spectra.factors({site.name: weight}, {site.name: site.rank or 0}, **how))[site.name]
    return from_factors(factors, scaling)


def _plan(checkpoint: Checkpoint, config: LoraConfig, components: Components) -> _PlannedLora:
    """Put the adapter on the model without weights, and check that A and B are all of it."""
    check_components(config, components)
    starts_at_zero = config.init_lora_weights == "mica"  # the name also says that B stays
    # PEFT would decompose weights that are not there; what is loaded is not taken off again either
    given = config if starts_at_zero else replace(config, init_lora_weights=True)
    model = skeleton(checkpoint, given)
    completed = model.peft_config["default"]
    assert isinstance(completed, LoraConfig)
    planned = {}
    for site in sites(model):
        layer: Any = model.get_base_model().get_submodule(site.name)
        if site.shape is None or not isinstance(layer, LoraLayer):
            continue  # what it adds is named below
        planned[f"{site.module}.weight"] = (site, float(layer.scaling["default"]))
    _check_alone(completed, model, [site for site, _ in planned.values()])
    for site, scaling in planned.values():
        assert site.shape is not None
        if (site.rank or 0) > min(site.shape):
            raise SvdtuneError(
                f"layer {site.name!r} {list(site.shape)} has no {site.rank} singular triplets; lower `r`, or name it in "
                "`exclude_modules`"
            )
        if PISSA.fullmatch(str(config.init_lora_weights)):
            named(site.name, partial(check_pissa, components, site.rank or 0, scaling, site.shape))
    completed.inference_mode = True
    completed.base_model_name_or_path, completed.revision = checkpoint.name, checkpoint.commit
    return _PlannedLora(planned, completed)


def _check_alone(config: LoraConfig, model: PeftModel, places: Sequence[Site]) -> None:
    """Refuse a configuration that puts more into the adapter than A and B of linear layers, each
    with a weight of its own in the checkpoint."""
    if config.target_parameters:
        raise SvdtuneError(
            f"the configuration adapts fused parameters ({min(config.target_parameters)}), which PEFT starts from no "
            "decomposition; name linear layers in `target_modules` alone ('all-linear' takes fused experts too)"
        )
    if config.layer_replication:
        raise SvdtuneError(
            "start writes the checkpoint's own layers, and layer_replication makes others of them; put the configuration on "
            "the loaded model inside svdtune.fast_starts()"
        )
    wanted: dict[str, tuple[int | None, ...]] = {}
    for site in places:
        out, inside = site.shape or (0, 0)
        shapes = {"A": (site.rank, inside), "B": (out, site.rank)}
        wanted |= {f"{PEFT_ROOT}{site.name}.lora_{part}.weight": shape for part, shape in shapes.items()}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if more := sorted(name for name, _ in found.items() ^ wanted.items()):
        raise SvdtuneError(
            f"start writes lora_A and lora_B of linear layers alone, and this configuration has {more[0]} otherwise (DoRA, "
            "biases, convolutions, embeddings, single tokens and the like); put it on the loaded model inside "
            "svdtune.fast_starts()"
        )


def check_components(config: LoraConfig, components: Components) -> None:
    """Raise `SvdtuneError` for components that name no triplets, or not as many as a LoRA of this
    rank has."""
    init = config.init_lora_weights
    if not (isinstance(init, str) and PISSA.fullmatch(init)):
        check_not_asked(components, init)
    for r in (config.r, *(config.rank_pattern or {}).values()):
        band_of(components, r, r)  # the layers' own checks would come with some of them written


def _check_weights(checkpoint: Checkpoint, planned: _PlannedLora) -> None:
    """Refuse a weight that is missing, or that other modules share: they would lose the start
    too."""
    for parameter, (site, _) in planned.sites.items():
        if parameter not in checkpoint.readers:
            site.weight(checkpoint)  # says what is missing
        others = [name for name in checkpoint.names.groups.get(parameter, ()) if name != parameter]
        if others:
            raise SvdtuneError(
                f"the weight of {site.name!r} is also {others[0]!r}, which would lose what the adapter starts with; name the "
                "layer in `exclude_modules`"
            )


def _write_residual(
    checkpoint: Checkpoint, work: Path, planned: _PlannedLora, begin: Callable[[str], tuple[Tensor, LoraPair]]
) -> None:
    """Write the checkpoint with every pair taken off its weight. Each pair is begun when its weight
    is reached."""
    work.mkdir()
    places = {checkpoint.names.of(parameter): parameter for parameter in planned.sites}

    def left(parameter: str) -> Tensor:
        weight, pair = begin(parameter)
        site, scaling = planned.sites[parameter]
        return spectra.as_stored(checkpoint.model.get_submodule(site.module), residual(weight, pair, scaling))

    def replacement(name: str, stored: Stored) -> Mapping[str, Stored | Computed]:
        if name not in places:
            return {name: stored}
        return {name: Computed(floating(stored), stored.shape, partial(left, places[name]))}

    write_weights(checkpoint, work, replacement)
    copy_other_files(checkpoint, work)
