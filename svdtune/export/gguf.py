"""A LoRA folder as the one GGUF file that llama.cpp and what is built on it take (`--lora`).

The pairs stay as they are. Names become llama.cpp's, by the package gguf; and where llama.cpp turns
neighbouring numbers of q and k by one angle, and Transformers those half a head apart, the rows of
those layers are put in its order, as its converter of the base does.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from svdtune.checkpoint import Checkpoint, open_checkpoint
from svdtune.errors import SvdtuneError
from svdtune.export.change import SavedChange, read_change
from svdtune.methods.files.integrity import PEFT_ROOT
from svdtune.models.loader import locate
from svdtune.system import explain_write_errors, fresh_file, needs

# Model type in Transformers → architecture in GGUF.
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
# Those whose rotary embedding turns neighbours.
NEIGHBOURS = {"granite", "llama", "smollm3"}


def write_gguf(lora: Path, output: Path, base: str | None = None) -> None:
    """Write the LoRA in a folder as a GGUF file.

    Where all layers have one rank it is `adapter.lora.alpha`; where not that is 0, which llama.cpp
    reads as a scale of 1 in every layer.

    Args:
        lora: the folder.
        output: the file to create.
        base: its base model; as its configuration says if None. Of a hub model the configuration
            alone is downloaded.

    Raises:
        SvdtuneError: the package gguf is missing, the base's architecture is none of
            `ARCHITECTURES`, the LoRA changes something that llama.cpp does not take, or `output`
            cannot be written.
    """
    with needs("writing a GGUF file needs the package gguf", "gguf"):
        import gguf

    change = read_change(lora)
    named = base or change.config.base_model_name_or_path
    if not named:
        raise SvdtuneError(
            "the adapter does not name its base model, whose configuration the GGUF file follows: give it, --base MODEL on "
            "the command line, base=… in Python"
        )
    revision = change.config.revision if base is None else None
    model = open_checkpoint(locate(named), revision=revision, weights=False)
    architecture = _architecture(model)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.model.config.num_hidden_layers)
    tensors = {
        name: part
        for layer, pair in _pairs(change, model).items()
        for name, part in _stored(layer, pair, model, architecture, names.get_name(layer))
    }
    ranks = {len(part) for name, part in tensors.items() if name.endswith("lora_a")}
    with explain_write_errors(output), fresh_file(output) as path:
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
        for name, part in tensors.items():
            writer.add_tensor(name, part.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def known_architectures() -> list[str]:
    """The model types whose LoRAs can be written with the installed gguf."""
    from gguf import MODEL_ARCH_NAMES

    return [kind for kind, architecture in ARCHITECTURES.items() if architecture in MODEL_ARCH_NAMES.values()]


def _architecture(base: Checkpoint) -> str:
    kind = base.model.config.model_type
    if kind not in (known := known_architectures()):
        raise SvdtuneError(
            f"the base {base.name} is of the type {kind!r}, whose LoRA is not written as GGUF here; types that are: "
            f"{', '.join(known)}. Export --to lora and convert that with llama.cpp's convert_lora_to_gguf.py, or merge"
        )
    return ARCHITECTURES[kind]


def _pairs(change: SavedChange, base: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """By module: A [r, in] and B [out, r]."""
    if trained := change.others.keys() - change.base_weights:
        raise SvdtuneError(
            f"the adapter also trains {min(trained).removeprefix(PEFT_ROOT)}, and llama.cpp takes low-rank changes "
            "alone; merge it into the model instead"
        )
    pairs = {layer: (A.mT, B) for layer, (A, B) in change.pairs.items()}
    modules = dict(base.model.named_modules())
    for layer, (A, B) in pairs.items():
        shape = tuple(modules[layer].weight.shape) if layer in modules else None
        if shape != (len(B), A.shape[-1]):
            raise SvdtuneError(
                f"the adapter's layer {layer!r} is {len(B)} × {A.shape[-1]}, and in the base {base.name} it is "
                f"{'not there' if shape is None else ' × '.join(map(str, shape))}; name the base that it was trained on"
            )
    return pairs


def _stored(
    layer: str, pair: tuple[Tensor, Tensor], base: Checkpoint, architecture: str, name: str | None
) -> Iterator[tuple[str, Tensor]]:
    """The two tensors of a layer, by their names in the file; `name` is the layer's there."""
    config = base.model.config
    if name is None or (layer == "lm_head" and config.tie_word_embeddings):
        raise SvdtuneError(
            f"llama.cpp has no weight of its own for the layer {layer!r} of {base.name}; leave it out of target_modules, or "
            "merge the adapter instead"
        )
    A, B = pair
    if architecture in NEIGHBOURS and layer.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
        B = B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    yield f"{name}.weight.lora_a", A
    yield f"{name}.weight.lora_b", B
