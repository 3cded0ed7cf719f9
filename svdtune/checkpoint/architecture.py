"""The model of a configuration without its weights, in the class that training would load it in."""

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from svdtune.errors import SvdtuneError

# For a model without weights, which would tell.
MOST_LAYERS = 1000


def build_model(
    config: PretrainedConfig,
    architecture: str | None = None,
    *,
    labels: int | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode, every parameter on the meta device.

    The first of these is its class: `architecture`; the class with a head that it was saved from; a
    causal language model, if this kind has one; the bare model.

    Args:
        config: of the model.
        architecture: a class of Transformers by name; one that Transformers does not have is passed
            over.
        labels: outputs of a classifier, if not those that `config` says.
        trust_remote_code: allow code from the model's folder to run.
    """
    if labels is not None:
        config.num_labels = labels
    saved_from = list(getattr(config, "architectures", None) or [])
    known = [name for name in [architecture, *saved_from] if name and hasattr(transformers, name)]
    wanted = [name for name in known if name == architecture or "For" in name or "LMHead" in name]
    remote = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote:
        wanted.append("AutoModelForCausalLM")
    name = [*wanted, *known, "AutoModel"][0]
    cls = getattr(transformers, name)
    with torch.device("meta"):
        if name.startswith("Auto"):
            return cls.from_config(config, trust_remote_code=trust_remote_code).eval()
        return cls(config).eval()


def check_depth(config: PretrainedConfig, tensors: int) -> None:
    """Refuse a damaged number of layers: building them would fill the memory.

    Args:
        config: of a model.
        tensors: number of its stored tensors, or `MOST_LAYERS`.

    Raises:
        SvdtuneError: there are more layers than that allows.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > 2 * tensors + 10:  # layers may share their weights
        raise SvdtuneError(
            f"the configuration asks for {layers:,} layers, and the weights are {tensors:,} tensors: they do not belong "
            "together, or are damaged; download the model again"
        )
