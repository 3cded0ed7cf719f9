"""A GGUF file as a Transformers model: Transformers maps names and layout, the package gguf
dequantizes tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from svdtune.checkpoint.architecture import build_model, check_depth
from svdtune.errors import SvdtuneError
from svdtune.system import explain_damage, needs


def check_gguf_support(path: Path) -> None:
    """Refuse a GGUF file where the packages here cannot read it.

    Raises:
        SvdtuneError: naming the package, and what is installed.
    """
    with needs(f"reading {path.name} needs the package gguf", "gguf"):
        import gguf  # noqa: F401
    if int(transformers.__version__.split(".")[0]) < 5:
        raise SvdtuneError(
            f"reading {path.name} needs Transformers 5.0 or newer, and {transformers.__version__} is installed: "
            "pip install --upgrade transformers"
        )


def reading(path: Path) -> AbstractContextManager[None]:
    """Around whatever reads a GGUF file: explains a damaged one."""
    return explain_damage(f"{path} cannot be read as a GGUF model", "; download it again")


def open_gguf(
    path: Path, architecture: str | None = None, labels: int | None = None
) -> tuple[PreTrainedModel, dict[str, Callable[[], Tensor]]]:
    """The model on the meta device, and a reader by parameter name for each that the file holds.

    Args:
        path: of the file.
        architecture, labels: as for `open_checkpoint`.

    Raises:
        SvdtuneError: if GGUF files cannot be read here, or the file is damaged.
    """
    check_gguf_support(path)
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    with reading(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        reader = GGUFReader(path)
        check_depth(config, len(reader.tensors))
        model = build_model(config, architecture, labels=labels)
        kind = bytes(reader.fields["general.architecture"].parts[-1]).decode()
        processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(model, processor)

    def read(tensor: Any) -> Tensor:
        with reading(path):
            weights = dequantize(tensor.data, tensor.tensor_type)
            processed = processor.process(
                weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters={}
            )
            return torch.from_numpy(processed.weights.copy())

    stored = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
    return model, {name: partial(read, tensor) for name, tensor in stored.items()}
