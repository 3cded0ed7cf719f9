"""The host memory for starting an adapter layer by layer: what the decomposition of one weight
holds."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdtune.methods.sites import Site
from svdtune.planning.plan import Plan

# Python with torch, transformers and PEFT imported, and their work space.
_RUNTIME = 640 * 2**20
# Numbers in float64 [m, n] and [n, n], n the short side: the weight and its quotient by a power of
# two, or its product with the vectors; the Gram matrix, its mirrored copy, its eigenvectors and
# LAPACK's work space (2 n²).
_LONG, _SQUARE = 2, 6
# Of the factors [out + in, r] in float64: as found, orthonormalised, with signs; the start's own
# copies in fp32.
_FACTORS = 4


def initialisation_bytes(plan: Plan, model: PreTrainedModel) -> int:
    """The most host memory that `svdtune init` needs, by every route of a decomposition except
    LAPACK's SVD. That route is for weights without full rank, and takes some 30 bytes a number
    more.

    Args:
        plan: of a SARA, Mo-SARA or SORSA adapter, whose sites are started.
        model: on the meta device; its dtype is taken for the checkpoint's.
    """
    stored = next((p.dtype for p in model.parameters()), torch.float32)
    declared = getattr(model.config, "dtype", None)
    item = (declared if isinstance(declared, torch.dtype) else stored).itemsize
    return _RUNTIME + max(_one(site, model, item) for site in plan.sites)


def _one(site: Site, model: PreTrainedModel, item: int) -> int:
    assert site.shape is not None
    assert site.rank is not None
    long, short = max(site.shape), min(site.shape)
    read = long * short
    if not site.expert:  # of a slice, all of the projection is read
        whole = model.get_submodule(site.module).weight
        assert isinstance(whole, Tensor)
        read = whole.numel()
    # and its copy in bf16, of which the fingerprint is taken
    weight = item * read + 2 * long * short
    return weight + 8 * (_LONG * long * short + _SQUARE * short * short + _FACTORS * site.rank * (long + short))
