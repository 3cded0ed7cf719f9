"""Merge an adapter into a plain Transformers checkpoint, and prove that the checkpoint gives the adapter's outputs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdtune.errors import SvdtuneError
from svdtune.export.folder import check_new_folder, new_folder
from svdtune.export.opening import Source, open_source
from svdtune.models import load

# Texts of several lengths and kinds to compare logits on; what they say does not matter.
PROBES = (
    "A train leaves at 9 with 120 passengers; 35 get off and 18 get on. How many are on it now?",
    "The quick brown fox jumps over the lazy dog.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Singular values of a matrix are never negative, and the largest of them is its operator norm, which says how much "
    "the matrix can stretch a vector at most.",
)

# Largest ‖merged − adapter‖/‖adapter‖ of the logits that rounding the merged weights explains, by dtype. A merge that
# went wrong is off by a multiple of the adapter's own effect, which for a trained one is far larger.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class MergeReport:
    """How near the merged checkpoint, read back from the disk, is to the adapter on its base.

    Attributes:
        output: Folder of the checkpoint.
        dtype: Its dtype, in which both sides were computed.
        max_abs: Largest absolute difference of two logits.
        relative: ‖merged − adapter‖ / ‖adapter‖ over all logits (Frobenius).
        effect: ‖base − adapter‖ / ‖adapter‖, what the adapter itself changes: `relative` must be small beside it, or
            rounding ate what was trained.
        same_token: Share of positions with the same likeliest next token.
        positions: Number of positions compared.
    """

    output: Path
    dtype: str
    max_abs: float
    relative: float
    effect: float
    same_token: float
    positions: int


def merge(source: Source, output: str | Path, *, dtype: str = "auto", device: str | None = None) -> MergeReport:
    """Write base + adapter as one checkpoint that needs neither PEFT nor svdtune.

    Tokenizer and generation config are kept. The checkpoint is written beside `output`, read back and compared with the
    adapter there, and only then moved into place.

    Args:
        source: A base model with an adapter.
        output: Folder to create.
        dtype: Of the checkpoint; "auto" keeps the base checkpoint's own, whatever the run was trained in.
        device: Where to compute.

    Raises:
        SvdtuneError: If there is no adapter, it cannot be merged (Mo-SARA with several heads: its update depends on the
            token), `output` cannot be written, or the checkpoint does not give the adapter's outputs.
    """
    output = Path(output).expanduser()
    if source.adapter is None:
        raise SvdtuneError(f"{source.base} is a model without an adapter, so there is nothing to merge")
    check_new_folder(output)
    loaded = open_source(source, dtype=dtype, device=device)
    tokenizer = loaded.tokenizer
    adapted = probe_logits(loaded.model, tokenizer)
    with loaded.model.disable_adapter():
        base = probe_logits(loaded.model, tokenizer)
    try:
        merged = loaded.model.merge_and_unload(safe_merge=True)
    except SvdtuneError:
        raise
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise SvdtuneError(f"the adapter {source.adapter} cannot be merged: {error}") from error
    with new_folder(output) as work:
        merged.save_pretrained(work)
        tokenizer.save_pretrained(work)
        kept = merged.dtype
        del merged, loaded  # one copy of the model in memory at a time
        reloaded = load(work, device=device)
        report = _compare(output, reloaded.model, probe_logits(reloaded.model, reloaded.tokenizer), adapted, base)
        limit = TOLERANCE.get(kept, TOLERANCE[torch.bfloat16])
        if reloaded.model.dtype != kept or not report.relative <= limit:  # "not <=" catches NaN too
            raise SvdtuneError(
                f"the merged checkpoint ({reloaded.model.dtype}) does not give the adapter's outputs: relative logit "
                f"difference {report.relative:.1e}, allowed in {kept} is {limit:.0e}; nothing was kept. "
                "Merge with --dtype float32"
            )
    return report


@torch.inference_mode()
def probe_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Next-token logits at every position of `PROBES`, float32 on the CPU, (positions, vocabulary)."""
    device = model.get_input_embeddings().weight.device
    rows = []
    for text in PROBES:
        ids = torch.tensor([tokenizer.encode(text)], device=device)
        rows.append(model(input_ids=ids).logits[0].float().cpu())
    return torch.cat(rows)


def _compare(
    output: Path, model: PreTrainedModel, merged: torch.Tensor, adapted: torch.Tensor, base: torch.Tensor
) -> MergeReport:
    scale = adapted.norm().item()
    return MergeReport(
        output=output,
        dtype=str(model.dtype).removeprefix("torch."),
        max_abs=(merged - adapted).abs().max().item(),
        relative=(merged - adapted).norm().item() / scale,
        effect=(base - adapted).norm().item() / scale,
        same_token=(merged.argmax(-1) == adapted.argmax(-1)).float().mean().item(),
        positions=len(adapted),
    )
