"""Tiny random models under the names that PEFT's tests ask the hub for; built from configurations,
no network."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from conformance.fetch import cache_folder

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_OPT = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 4, "vocab_size": 99, "word_embed_proj_dim": 16}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def _bart() -> tf.PreTrainedModel:
    sizes = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=99, d_model=16, **sizes, **heads, **_ENDS))


def _gemma3() -> tf.PreTrainedModel:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8, **_ENDS))


def _gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, **_ENDS))


def _gptj() -> tf.PreTrainedModel:
    return tf.GPTJForCausalLM(tf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=99, **_ENDS))


def _llama() -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED, **_ENDS))


def _opt(layers: int = 5) -> tf.PreTrainedModel:
    return tf.OPTForCausalLM(tf.OPTConfig(**_OPT, num_hidden_layers=layers, **_ENDS))


_MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/opt-125m": lambda: _opt(12),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED, **_ENDS)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": lambda: tf.BertModel(tf.BertConfig(**_SIZES)),
    "peft-internal-testing/tiny-random-BloomForCausalLM": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=5, n_head=4, **_ENDS)
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**_SIZES, **_ENDS)
    ),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**_SIZES, **_ENDS)
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5)
    ),
    "peft-internal-testing/tiny-random-t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _llama,
}


def build_models() -> Path:
    """A folder with every model of the list, each in the folder of its hub name; built where it is
    not there yet."""
    root = cache_folder() / f"models-transformers-{tf.__version__}"
    for name, build in _MODELS.items():
        if not (root / name / "config.json").is_file():
            torch.manual_seed(0)
            _tokenizer().save_pretrained(root / name)
            build().save_pretrained(root / name)
    return root


def _tokenizer() -> tf.PreTrainedTokenizerFast:
    tokens = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", "Hello", "world"])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
