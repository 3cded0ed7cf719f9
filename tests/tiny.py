"""Tiny random models with weights from seed 0: a Llama, a GPT-2 and mixtures of experts, with
whatever a test wants different."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).eval()


def tiny_gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2 | changes)).eval()


def save_tiny_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A Transformers folder with the tokenizer and a Llama for it: fewer key and value heads, tied
    embeddings."""
    settings = {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    tiny_llama(**settings | changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def moved(model: Any, size: float = 0.1) -> Any:
    """The model with every trained parameter away from its start, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn_like(parameter)
    return model


def with_template(folder: Path, model: Path, template: str) -> Path:
    """A new folder with the model of another one, and a chat template."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def _sized(config: type[PretrainedConfig], **own: Any) -> PretrainedConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_experts_per_tok": 2}
    return config(**sizes | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 60} | own)


# The experts' parameters are [experts, 2 · inner, hidden] and [experts, hidden, inner]; those of
# gpt-oss are turned round, and have biases.
EXPERTS = {
    "qwen3_moe": lambda **own: _sized(Qwen3MoeConfig, num_experts=3, moe_intermediate_size=8, **own),
    "mixtral": lambda **own: _sized(MixtralConfig, num_local_experts=3, **own),
    "gpt_oss": lambda **own: _sized(GptOssConfig, num_local_experts=3, **own),
}


def tiny_experts(kind: str, **changes: Any) -> PreTrainedModel:
    """A model of one layer with three fused experts, whose spectra differ; no weight is 0."""
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("before Transformers 5 experts are layers")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(EXPERTS[kind](**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3)
            if parameter.ndim == 3:
                parameter[:, :, 0] *= torch.tensor([1.0, 5.0, 25.0])[:, None]
    return model
