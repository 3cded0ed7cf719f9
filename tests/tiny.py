"""Tiny random models with weights from seed 0: one Llama and one GPT-2, with whatever a test wants
different."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def with_template(folder: Path, model: Path, template: str) -> Path:
    """A new folder with the model of another one, and a chat template."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder
