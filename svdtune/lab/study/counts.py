"""The sites of a recipe's method section on a model, and what it trains there."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from peft import PeftConfig

from svdtune.checkpoint import Checkpoint, open_checkpoint
from svdtune.errors import SvdtuneError
from svdtune.methods.injection import check_target_names, check_targets
from svdtune.methods.sites import Sites, sites
from svdtune.models.loader import locate
from svdtune.training.method import FULL, TARGETS, build_config


@lru_cache(maxsize=4)
def opened(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """The model as `svdtune.planning` opens it, once."""
    return open_checkpoint(locate(model), revision=revision, trust_remote_code=trust_remote_code)


def config_of(checkpoint: Checkpoint, method: Mapping[str, Any]) -> PeftConfig:
    """The PEFT configuration of a method section, with its target names looked up in the model.

    Raises:
        SvdtuneError: unknown or wrong settings, or a target name that the model does not have.
    """
    if method["name"] == FULL:
        raise SvdtuneError("full fine-tuning has no adapter, and so no ranks by layer")
    config = build_config(method["name"], {key: value for key, value in method.items() if key != "name"})
    check_targets(checkpoint.model, config)
    return config


def sites_of(checkpoint: Checkpoint, method: Mapping[str, Any]) -> Sites:
    """The sites of a method section; those of full fine-tuning are none.

    Raises:
        SvdtuneError: unknown or wrong settings, or a method that PEFT cannot set up without
            weights.
    """
    return sites(checkpoint, None if method["name"] == FULL else config_of(checkpoint, method))


def count(checkpoint: Checkpoint, method: Mapping[str, Any]) -> int:
    """Parameters that a method section trains on a model; errors as in `sites_of`."""
    targets = method.get(TARGETS)
    if method["name"] == FULL and targets:
        check_target_names(checkpoint.model, targets)
        return sum(
            tensor.numel()
            for name, tensor in checkpoint.model.named_parameters()
            if any(f".{target}." in f".{name}" for target in targets)
        )
    return sites_of(checkpoint, method).count.trained


def largest_rank(checkpoint: Checkpoint, method: Mapping[str, Any]) -> int:
    """The largest rank that any of the matrices which a method adapts can have."""
    shapes = (site.shape for site in sites_of(checkpoint, method))
    return max((min(shape) for shape in shapes if shape is not None), default=1)
