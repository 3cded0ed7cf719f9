"""The same evaluation by vLLM: the adapter is exported to LoRA, which vLLM serves on the base
model."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.generation import Completion, Decoding, end_token_ids, until_end
from svdtune.export.lora import VLLM_RANKS, export_lora
from svdtune.export.source import Source
from svdtune.methods.files.adapter import read_settings
from svdtune.models import load_tokenizer, set_end_token
from svdtune.models.loader import context_length, load_config, load_decoding, locate

_WEIGHTS = ("*.safetensors", "*.bin")
_PIECES = 64


class VllmEngine:
    """Completes prompts by vLLM; open one with `open_vllm`."""

    def __init__(self, source: Source, lora: Path | None, dtype: str, options: dict[str, Any]) -> None:
        vllm = _import_vllm()
        base = locate(source.base)
        if isinstance(base, Path) and base.suffix == ".gguf":
            raise SvdtuneError(f"vLLM does not read {base} as svdtune does; name a Transformers folder or a hub name")
        self.name = str(source.run or source.adapter or source.base)
        recipe = source.recipe.model if source.recipe else None
        origin = source.origin
        self.tokenizer = load_tokenizer(source.base, **origin)
        if recipe and recipe.end_token:
            set_end_token(None, self.tokenizer, recipe.end_token)
        context = context_length(load_config(base, **origin))
        self.context = options.get("max_model_len") or context
        self._ends = end_token_ids(load_decoding(base, revision=origin["revision"]), self.tokenizer)
        self._identity = {
            "engine": "vllm",
            "weights": _fingerprint(base, source.adapter, origin["revision"]),
            "end_token_ids": self._ends,
            "dtype": dtype,
        }
        serving = {"enable_lora": True, "max_lora_rank": _served_rank(lora)} if lora else {}
        self._vllm, self._lora = vllm, lora
        self._llm = vllm.LLM(model=str(base), dtype=dtype, **origin, **serving, **options)

    def identity(self) -> dict[str, Any]:
        """Engine, fingerprint of base and adapter, end tokens, dtype."""
        return self._identity

    def details(self) -> dict[str, Any]:
        """The version of vLLM."""
        return {"vllm": self._vllm.__version__}

    def close(self) -> None:
        """End vLLM's own process, which holds the accelerator's memory; without this it lives as
        long as this one."""
        core = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        if core is not None:
            core.shutdown()

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, decoding: Decoding, seeds: Sequence[int]
    ) -> list[Completion]:
        """Complete a batch; vLLM schedules it by itself.

        Raises:
            SvdtuneError: If something is asked for that vLLM's fast path does not have.
        """
        if decoding.beams > 1 or decoding.no_repeat_ngram_size or decoding.stop_loops:
            raise SvdtuneError(
                "vLLM decodes without beams, no_repeat_ngram_size and stop_loops; use --engine transformers"
            )
        parameters = [
            self._vllm.SamplingParams(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=seed,
                max_tokens=max_new_tokens,
                stop_token_ids=self._ends,
                detokenize=False,
            )
            for seed in seeds
        ]
        request = None
        if self._lora:
            from vllm.lora.request import LoRARequest

            request = LoRARequest("adapter", 1, str(self._lora))
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            parameters,
            use_tqdm=False,
            lora_request=request,
        )
        return [until_end(list(output.outputs[0].token_ids), set(self._ends)) for output in outputs]


@contextlib.contextmanager
def open_vllm(source: Source, dtype: str | None = None, **options: Any) -> Iterator[VllmEngine]:
    """Start vLLM on a source's base model, with its adapter, exported to LoRA for as long as the
    engine is open.

    Args:
        source: What to evaluate.
        dtype: Of the weights; None for that of the run, or the one they are stored in.
        **options: Passed on to `vllm.LLM`, such as `gpu_memory_utilization` and
            `tensor_parallel_size`.

    Raises:
        SvdtuneError: If vLLM is not installed, or cannot serve the adapter as LoRA: its method is
            no LoRA, its rank is too large, or it trains whole modules or biases.
    """
    _import_vllm()
    dtype = dtype or (source.recipe.model.dtype if source.recipe else "auto")
    with tempfile.TemporaryDirectory(prefix="svdtune-") as folder:
        lora = _as_lora(source.adapter, Path(folder, "lora")) if source.adapter else None
        engine = VllmEngine(source, lora, dtype, options)
        try:
            yield engine
        finally:
            engine.close()


def _as_lora(adapter: Path, output: Path) -> Path:
    """A LoRA adapter is served as it is, one of our methods after its export."""
    if read_settings(adapter)["peft_type"] == "LORA":
        return adapter
    # Adapters with several heads depend on the token: the export refuses them.
    notes = [note for note in export_lora(adapter, output).notes if note.startswith("vLLM")]
    if notes:
        raise SvdtuneError(f"{'; '.join(notes)}; or evaluate the merged model: svdtune merge")
    return output


def _served_rank(lora: Path) -> int:
    """The smallest of vLLM's ranks that holds the adapter's."""
    config = read_settings(lora)
    needed = max([config["r"], *config.get("rank_pattern", {}).values()])
    return next((rank for rank in VLLM_RANKS if rank >= needed), needed)


def _fingerprint(base: str | Path, adapter: Path | None, revision: str | None) -> str:
    """SHA-256 over name, size and 64 evenly spread pieces of every file of weights; a hub model is
    known by its name, and its revision where one is asked for.

    Any training step moves nearly every value, so that the pieces tell.
    """
    named = "@".join([base, *([revision] if revision else [])]) if isinstance(base, str) else ""
    digest = hashlib.sha256(named.encode())
    folders = [folder for folder in (base, adapter) if isinstance(folder, Path)]
    for path in sorted(file for folder in folders for kind in _WEIGHTS for file in folder.glob(kind)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(size * piece // _PIECES)
                digest.update(file.read(64))
    return digest.hexdigest()


def _import_vllm() -> ModuleType:
    try:
        import vllm
    except ImportError as error:
        raise SvdtuneError(
            "the engine vllm needs vLLM, which brings its own torch: pip install vllm (https://docs.vllm.ai)"
        ) from error
    return vllm
