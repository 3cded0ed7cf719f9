"""Start an adapter from a checkpoint layer by layer: the model is never built, and one weight is in memory at a time.

The result is what `get_peft_model(model, config).save_pretrained(folder)` writes, bit for bit on the same device: names, ranks
and checks come from PEFT on the model without weights, tensors from the same functions, random ones in the same order.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peft import get_peft_model
from peft.utils.other import get_pattern_key
from torch import Tensor
from tqdm import tqdm

from svdtune import spectra
from svdtune.checkpoint import Checkpoint
from svdtune.checkpoint.writer import TensorWriter
from svdtune.errors import SvdtuneError
from svdtune.linalg import Factors
from svdtune.methods.config import SvdConfig
from svdtune.methods.files.compact import PROBE, probe
from svdtune.methods.files.integrity import ADAPTER_WEIGHTS, weight_fingerprint
from svdtune.methods.layers.base import SvdLayer
from svdtune.methods.layers.rows import Rows
from svdtune.system import check_new_folder, new_folder

_ROOT = "base_model.model."


@dataclass(frozen=True)
class Initialised:
    """What was written.

    Attributes:
        adapter: its folder.
        ranks: by layer.
        trained, frozen: numbers in its factors.
    """

    adapter: Path
    ranks: dict[str, int]
    trained: int
    frozen: int


def initialise_adapter(
    checkpoint: Checkpoint,
    config: SvdConfig,
    output: str | Path,
    *,
    device: str = "cpu",
    progress: bool | None = None,
) -> Initialised:
    """Write a new adapter for a checkpoint, ready for `PeftModel.from_pretrained(model, output, is_trainable=True)`.

    Memory: the largest adapted weight and what decomposing it takes, whatever the model's size; `svdtune plan` says how much.
    Random tensors are drawn from torch's global state.

    Args:
        checkpoint: from `open_checkpoint`; its model stays as it is.
        config: of a new SARA, Mo-SARA or SORSA adapter.
        output: folder to create.
        device: where weights are decomposed.
        progress: show a bar; by default where stderr is a terminal.

    Raises:
        SvdtuneError: settings that need the whole model, a layer that cannot be adapted, or an output that cannot be written.
    """
    _check(config)
    output = Path(output).expanduser().absolute()
    check_new_folder(output)
    layers, config = _settle(checkpoint, config)
    ranks: dict[str, int] = {}
    counts = {"trained": 0, "frozen": 0}
    disable = None if progress is None else not progress
    with new_folder(output) as work:
        names = [f"{_ROOT}{name}.{part}{PROBE}" for name, layer in layers.items() for part in _parts(layer)]
        with TensorWriter(work / ADAPTER_WEIGHTS, dict.fromkeys(names), {"format": "pt"}) as file:
            for name, layer in tqdm(layers.items(), desc="svdtune init", unit="layer", delay=1.0, disable=disable):
                started = _start(checkpoint, config, name, layer, device)
                ranks[name], config.base_fingerprint[name] = started.rank, started.fingerprint
                for part, tensor in started.tensors.items():
                    frozen = part in layer.frozen
                    counts["frozen" if frozen else "trained"] += tensor.numel()
                    compact = frozen and config.compact
                    file.write(f"{_ROOT}{name}.{part}{PROBE if compact else ''}", probe(tensor) if compact else tensor)
                del started, tensor  # before the next weight is read
        config.ranks = {name: ranks[name] for name in sorted(ranks)}
        config.base_fingerprint = {name: config.base_fingerprint[name] for name in sorted(ranks)}
        config.save_pretrained(str(work), auto_mapping_dict=_auto_mapping(checkpoint, config))
    return Initialised(output, dict(config.ranks), **counts)


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


def _settle(checkpoint: Checkpoint, config: SvdConfig) -> tuple[dict[str, SvdLayer], SvdConfig]:
    """The adapted layers on the meta device, in the order in which PEFT adapts them, and the configuration with what it says of
    them; `ranks` are those of layers whose rank is given.

    A threshold cannot be looked up without weights: rank 1 takes its place here, and only what `rank_pattern` says counts.
    """
    looked_up = config.threshold is not None
    asked = {"r": config.r, "threshold": config.threshold}
    layers, config = _on_meta(checkpoint, dataclasses.replace(config, threshold=None, r=1) if looked_up else config)
    patterns = config.rank_pattern
    ranks = {
        name: rank
        for name, rank in config.ranks.items()
        if not looked_up or any(get_pattern_key(patterns, key) in patterns for key in (name, config.module_of(name)))
    }
    vars(config).update(asked, ranks=ranks, base_fingerprint={}, inference_mode=True)
    config.base_model_name_or_path = checkpoint.name
    return layers, config


def _on_meta(checkpoint: Checkpoint, config: SvdConfig) -> tuple[dict[str, SvdLayer], SvdConfig]:
    try:
        model = get_peft_model(copy.deepcopy(checkpoint.model), copy.deepcopy(config), low_cpu_mem_usage=True)
    except SvdtuneError:
        raise
    except ValueError as error:  # PEFT's own
        raise SvdtuneError(f"no adapter can be put on {checkpoint.name}: {error}") from error
    modules = model.base_model.model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, SvdLayer)}
    return layers, model.peft_config["default"]


class _Started(NamedTuple):
    rank: int
    fingerprint: str
    tensors: dict[str, Tensor]


def _start(checkpoint: Checkpoint, config: SvdConfig, name: str, layer: SvdLayer, device: str) -> _Started:
    """One layer's rank, its weight's fingerprint and its tensors; the weight [out, in] is gone afterwards."""
    weight = checkpoint.weight(config.module_of(name))
    if name in config.slices:
        weight = Rows(*config.slices[name]).matrix(weight)
    weight = weight.to(device)
    factors, rank = _decompose(name, weight, config)
    tensors = layer.new_tensors(rank, config, factors)
    return _Started(rank, weight_fingerprint(weight), {part: t for part, t in tensors.items() if t is not None})


def _decompose(name: str, weight: Tensor, config: SvdConfig) -> tuple[Factors | None, int]:
    """What an adapter's layer starts from, and its rank, by the ways that `get_peft_model` takes."""
    rank = config.ranks.get(name)  # of those that are given
    if rank is None and config.needs_factors and not config.compact:
        factors = dict(spectra.ranked_factors({name: weight}, config.threshold, progress=False))[name]
        return factors, len(factors.s)
    if rank is None:
        rank = spectra.ranks({name: weight}, config.threshold, progress=False)[name]
    if not config.needs_factors:
        return None, rank
    return dict(spectra.factors({name: weight}, {name: rank}, exact=config.compact, progress=False))[name], rank


def _parts(layer: SvdLayer) -> tuple[str, ...]:
    return (*layer.trained, *layer.frozen)


def _auto_mapping(checkpoint: Checkpoint, config: SvdConfig) -> dict[str, str] | None:
    """What PEFT writes for an adapter without a task: the class that it was made for."""
    if config.task_type is not None:
        return None
    cls = type(checkpoint.model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}
