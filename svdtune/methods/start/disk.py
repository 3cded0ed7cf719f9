"""Start an adapter from a checkpoint layer by layer. The model is never built, and one weight is in
memory at a time.

The result is what `get_peft_model(model, config).save_pretrained(folder)` writes for a model on the
CPU, bit for bit if the same device decomposes. Names, ranks and checks come from PEFT on the model
without weights, tensors from the same functions, and random numbers are drawn in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, TaskType
from torch import Tensor
from tqdm import tqdm

from svdtune import spectra
from svdtune.checkpoint import Checkpoint
from svdtune.checkpoint.writer import TensorWriter
from svdtune.errors import SvdtuneError
from svdtune.linalg import Factors
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.compact import PROBE, probe
from svdtune.methods.files.integrity import ADAPTER_WEIGHTS, PEFT_ROOT, weight_fingerprint
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.ranks import pattern_rank, with_rank
from svdtune.methods.sites import Site, sites, skeleton
from svdtune.system import check_new_folder, new_folder, without_bar


@dataclass(frozen=True)
class Started:
    """What was written.

    Attributes:
        adapter: its folder.
        ranks: by layer.
        trained, frozen: numbers in its factors.
        residual: folder of the checkpoint that it belongs on; None for the one that it was started
            from.
    """

    adapter: Path
    ranks: dict[str, int]
    trained: int
    frozen: int
    residual: Path | None = None


def start(
    checkpoint: Checkpoint,
    config: SvdConfig,
    output: str | Path,
    *,
    seed: int | None = None,
    device: str | None = None,
    progress: bool | None = None,
) -> Started:
    """Write a new adapter for a checkpoint, ready for
    `PeftModel.from_pretrained(model, output, is_trainable=True)`.

    Memory: the largest adapted weight and what decomposing it takes, whatever the model's size;
    `svdtune plan` says how much.

    Args:
        checkpoint: from `open_checkpoint`; its model stays as it is.
        config: of a new SARA, Mo-SARA or SORSA adapter.
        output: folder to create.
        seed: of what starts at random, which leaves torch's global state as it is. None draws from
            that state, as `get_peft_model` does.
        device: where weights are decomposed; a GPU by default, where there is one.
        progress: show a bar; by default where stderr is a terminal.

    Raises:
        SvdtuneError: settings that need the whole model, a layer that cannot be adapted, or an
            output that cannot be written.
    """
    _check(config)
    output = Path(output).expanduser().absolute()
    check_new_folder(output)
    planned = _plan(checkpoint, config)
    config = planned.config
    counts = {"trained": 0, "frozen": 0}
    with new_folder(output) as work, seeded(seed):
        names = [f"{PEFT_ROOT}{site.name}.{part}{PROBE}" for site, layer in planned.layers for part in _parts(layer)]
        with TensorWriter(work / ADAPTER_WEIGHTS, dict.fromkeys(names), {"format": "pt"}) as file:
            for site, layer in tqdm(
                planned.layers, desc="svdtune init", unit="layer", delay=1.0, disable=without_bar(progress)
            ):
                rank, mark, tensors = _tensors(checkpoint, config, site, layer, planned.given.get(site.name), device)
                config.ranks[site.name], config.base_fingerprint[site.name] = rank, mark
                for part, tensor in tensors.items():
                    frozen = part in layer.frozen
                    counts["frozen" if frozen else "trained"] += tensor.numel()
                    compact = frozen and config.compact
                    name = f"{PEFT_ROOT}{site.name}.{part}{PROBE if compact else ''}"
                    file.write(name, probe(tensor) if compact else tensor)
                del tensors, tensor  # before the next weight is read
        config.ranks, config.base_fingerprint = _sorted(config.ranks), _sorted(config.base_fingerprint)
        config.save_pretrained(str(work), auto_mapping_dict=auto_mapping(checkpoint, config))
    return Started(output, dict(config.ranks), counts["trained"], counts["frozen"])


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed inside. Afterwards torch goes on where it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def _check(config: SvdConfig) -> None:
    if not isinstance(config, SvdConfig):
        raise SvdtuneError(
            f"expected the configuration of a SARA, Mo-SARA or SORSA adapter; got {type(config).__name__}"
        )
    if config.initialized:
        raise SvdtuneError("the configuration is of an adapter that was saved; give one of a new adapter")
    if config.modules_to_save or config.bias != "none":
        raise SvdtuneError(
            "modules_to_save and bias put whole parts of the model into the adapter, which layer by layer is not done; "
            "leave them out, or start the adapter with get_peft_model on the loaded model"
        )


class _Planned(NamedTuple):
    """What `start` writes: the adapted layers on the meta device, in PEFT's order; their
    configuration; and in `given` the ranks that no spectrum decides."""

    layers: list[tuple[Site, SvdLayer[Any]]]
    config: SvdConfig
    given: dict[str, int]


def _plan(checkpoint: Checkpoint, config: SvdConfig) -> _Planned:
    """Put the adapter on the model without weights. With a threshold every rank is 1 there."""
    measured = config.threshold is not None
    model = skeleton(checkpoint, with_rank(config, 1) if measured else config)
    found = sites(model)
    given = {
        site.name: site.rank
        for site in found
        if site.rank is not None and (not measured or pattern_rank(config, site.name, site.module))
    }
    layers = []
    for site in sorted(found, key=lambda site: site.expert):  # PEFT goes to parameters last
        layer = model.get_base_model().get_submodule(site.name)
        assert isinstance(layer, SvdLayer)
        layers.append((site, layer))
    completed = found.config
    assert isinstance(completed, SvdConfig)
    if completed.modules_to_save:
        raise SvdtuneError(
            f"an adapter of task_type={TaskType(config.task_type).value} holds the model's whole head "
            f"({', '.join(completed.modules_to_save)}), which layer by layer is not done; start it with get_peft_model on the "
            "loaded model"
        )
    vars(completed).update(r=config.r, threshold=config.threshold, ranks={}, base_fingerprint={}, inference_mode=True)
    completed.base_model_name_or_path, completed.revision = checkpoint.name, checkpoint.commit
    return _Planned(layers, completed, given)


def _tensors(
    checkpoint: Checkpoint, config: SvdConfig, site: Site, layer: SvdLayer[Any], rank: int | None, device: str | None
) -> tuple[int, str, dict[str, Tensor]]:
    """One layer's rank, its weight's fingerprint and its tensors. The weight [out, in] is freed
    afterwards."""
    weight = site.weight(checkpoint)
    factors, rank = _decompose(site.name, weight, config, rank, device)
    tensors = layer.new_tensors(rank, config, factors)
    return rank, weight_fingerprint(weight), {part: t for part, t in tensors.items() if t is not None}


def _decompose(
    name: str, weight: Tensor, config: SvdConfig, rank: int | None, device: str | None
) -> tuple[Factors | None, int]:
    """The factors that a layer starts from, and its rank. They are found as `get_peft_model` finds
    them. `rank` is None if the spectrum decides."""
    threshold = cast(float, config.threshold)  # where it is None, the rank is not
    how: Any = {"device": device, "progress": False}
    if rank is None and config.needs_factors and config.triplets == "first" and not config.compact:
        factors = dict(spectra.ranked_factors({name: weight}, threshold, **how))[name]
        return factors, len(factors.s)
    if rank is None:
        rank = spectra.ranks({name: weight}, threshold, **how)[name]
    if not config.needs_factors:
        return None, rank
    band: Any = {"components": config.triplets, "exact": config.compact}
    return dict(spectra.factors({name: weight}, {name: rank}, **band, **how))[name], rank


def _sorted(by_layer: dict[str, Any]) -> dict[str, Any]:
    return {name: by_layer[name] for name in sorted(by_layer)}


def _parts(layer: SvdLayer[Any]) -> tuple[str, ...]:
    return (*layer.trained, *layer.frozen)


def auto_mapping(checkpoint: Checkpoint, config: PeftConfig) -> dict[str, str] | None:
    """The class that an adapter without a task was made for, as PEFT writes it."""
    if config.task_type is not None:
        return None
    cls = type(checkpoint.model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}
