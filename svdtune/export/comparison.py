"""Compare two models by their logits: a merged checkpoint, or an exported adapter, with the adapter
that it came from."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdtune.errors import SvdtuneError
from svdtune.export.source import Source, open_source
from svdtune.models import load, load_tokenizer
from svdtune.models.loader import input_device

# Texts of several lengths and kinds to compare logits on; what they say does not matter.
PROBES = (
    "A train leaves at 9 with 120 passengers; 35 get off and 18 get on. How many are on it now?",
    "The quick brown fox jumps over the lazy dog.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Singular values of a matrix are never negative, and the largest of them is its operator norm, which says how much "
    "the matrix can stretch a vector at most.",
)


# Largest ‖merged − adapter‖/‖adapter‖ of the logits that rounding the merged weights explains, by
# dtype. A merge that went wrong is off by a multiple of the adapter's own effect, which for a
# trained one is far larger.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class LogitComparison:
    """How near a model's logits are to those of the adapter on its base.

    Attributes:
        max_abs: largest absolute difference of two logits.
        relative: ‖model − adapter‖ / ‖adapter‖ over all logits (Frobenius).
        effect: ‖base − adapter‖ / ‖adapter‖, what the adapter itself changes: `relative` must be
            small beside it, or rounding ate what was trained.
        same_token: share of positions with the same likeliest next token.
        positions: number of positions compared.
    """

    max_abs: float
    relative: float
    effect: float
    same_token: float
    positions: int


@torch.inference_mode()
def probe_logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Next-token logits at every position of `PROBES`, float32 on the CPU, (positions,
    vocabulary)."""
    device = input_device(model)
    rows = []
    for text in PROBES:
        ids = torch.tensor([tokenizer.encode(text)], device=device)
        rows.append(model(input_ids=ids).logits[0].float().cpu())
    return torch.cat(rows)


def compare_logits(found: Tensor, adapted: Tensor, base: Tensor) -> LogitComparison:
    """Compare logits (positions, vocabulary) with the adapter's, and those with its base's."""
    scale = adapted.norm().item()
    return LogitComparison(
        max_abs=(found - adapted).abs().max().item(),
        relative=(found - adapted).norm().item() / scale,
        effect=(base - adapted).norm().item() / scale,
        same_token=(found.argmax(-1) == adapted.argmax(-1)).float().mean().item(),
        positions=len(adapted),
    )


def why_not(source: Source, model: PreTrainedModel, folder: Path, weights: int, device: str | None) -> str | None:
    """Why the logits of a checkpoint and its adapter cannot be compared; None where they can.

    Args:
        source: base and adapter.
        model: of the checkpoint's class, with or without values.
        folder: of the base, where its tokenizer lies.
        weights: bytes of the checkpoint's weights.
        device: where to compute.
    """
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is no causal language model"
    try:
        load_tokenizer(folder, trust_remote_code=source.trust_remote_code)
    except SvdtuneError as error:
        return str(error)
    assert source.adapter is not None
    # A fifth more for activations and what loading takes beside the weights.
    needed = 1.2 * (weights + sum(path.stat().st_size for path in source.adapter.glob("*.safetensors")))
    free = psutil.virtual_memory().available
    if device is not None and device.startswith("cuda"):
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if needed > free:
        return f"that takes about {needed / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} are free"
    return None


def compare_checkpoint(
    source: Source, folder: Path, dtype: str, device: str | None, dtypes: Iterable[torch.dtype]
) -> LogitComparison:
    """Compare a merged checkpoint, read back from its folder, with the adapter on its base; one
    model in memory at a time.

    Args:
        source: base and adapter.
        folder: of the checkpoint.
        dtype: in which to load the base, "auto" for its own.
        device: where to compute.
        dtypes: of the weights that were merged; the coarsest says what rounding explains.

    Raises:
        SvdtuneError: rounding to the checkpoint's dtype does not explain the difference.
    """
    loaded = open_source(source, dtype=dtype, device=device)
    adapted = probe_logits(loaded.model, loaded.tokenizer)
    with warnings.catch_warnings():
        # this is for scale alone
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
        with cast(PeftModel, loaded.model).disable_adapter():
            alone = probe_logits(loaded.model, loaded.tokenizer)
    del loaded
    merged = load(folder, device=device, trust_remote_code=source.trust_remote_code)
    found = compare_logits(probe_logits(merged.model, merged.tokenizer), adapted, alone)
    kept = max(dtypes, key=TOLERANCE.__getitem__)
    if not found.relative <= TOLERANCE[kept]:  # "not <=" catches NaN too
        raise SvdtuneError(
            f"the merged checkpoint does not give the adapter's outputs: relative logit difference {found.relative:.1e}, "
            f"allowed in {kept} is {TOLERANCE[kept]:.0e}; nothing was kept. Merge with --dtype float32"
        )
    return found
