"""What completes prompts: the interface that `evaluate` asks, and the engine that runs a loaded
model by Transformers."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdtune.evaluation.generation import Completion, Decoding, complete_batch, end_token_ids, reads_padding
from svdtune.models import LoadedModel
from svdtune.models.loader import context_length


class Engine(Protocol):
    """Completes batches of prompts.

    Attributes:
        name: Of the model, for reports.
        tokenizer: The model's.
        context: Positions the model has, None where unknown.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None

    def identity(self) -> dict[str, Any]:
        """What predictions depend on; those of another identity are never mixed with this
        engine's."""
        ...

    def details(self) -> dict[str, Any]:
        """What else is worth recording: versions, the device."""
        ...

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, decoding: Decoding, seeds: Sequence[int]
    ) -> list[Completion]:
        """Complete a batch: one completion for each prompt and its seed, in their order."""
        ...


class TransformersEngine:
    """Runs a loaded model, with or without an adapter on it, here."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.name, self.tokenizer = loaded.name, loaded.tokenizer
        self._model = loaded.model.eval()
        self.context = context_length(self._model.config)
        self._ends = end_token_ids(self._model.generation_config, self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """Fingerprint of the weights, end tokens, dtype."""
        return {
            "weights": weights_fingerprint(self._model),
            "end_token_ids": self._ends,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    def details(self) -> dict[str, Any]:
        """Device and versions."""
        return {
            "device": str(self._model.device),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, decoding: Decoding, seeds: Sequence[int]
    ) -> list[Completion]:
        """Complete a batch, padded on the left; all of it is drawn with the first seed. A model
        that takes padding for tokens completes prompts of one length at a time."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._ends[0]
        by_length: dict[int, list[int]] = {}
        for at, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(at)
        apart = len(by_length) > 1 and self._reads_padding
        completed: dict[int, Completion] = {}
        for group in by_length.values() if apart else [range(len(prompts))]:
            some, seed = [prompts[at] for at in group], seeds[group[0]]
            made = complete_batch(
                self._model, some, max_new_tokens, self._ends, pad, decoding=decoding, seed=seed, in_rounds=True
            )
            completed |= zip(group, made, strict=True)
        return [completed[at] for at in range(len(prompts))]

    @cached_property
    def _reads_padding(self) -> bool:
        return reads_padding(self._model)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and up to 64 evenly spread values of every parameter and buffer
    that is saved.

    Cheap enough for any model, and changed by any training step, which moves nearly every value.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // 64))].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
