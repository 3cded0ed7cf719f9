"""The three methods on a tiny instance of every model family: train a step, save, load, merge and
export to LoRA."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from test_peft_verbs import layers
from torch import nn
from torch.nn import functional as F

from finch import FinchConfig, FinchForCausalLM
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.export.lora import export_lora
from svdtune.methods.layers.slices import FusedLinear

METHODS = {
    "sara": (SaraConfig, {"r": 3}),
    "mosara": (MoSaraConfig, {"r": 3, "num_heads": 1}),
    "sorsa": (SorsaConfig, {"r": 2}),
}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA = _SIZES | _ENDS | {"intermediate_size": 48, "num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60} | _ENDS
_FALCON = _SIZES | _ENDS | {"multi_query": True, "alibi": False}
_T5 = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 2,
}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGES = {"image_size": 16, "patch_size": 4}
_CLIP = {
    "text_config": _VIT | {"vocab_size": 60, "max_position_embeddings": 16} | _ENDS,
    "vision_config": _VIT | _IMAGES,
    "projection_dim": 16,
}
TOKENS = torch.arange(3, 27).view(2, 12)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()


class Family(NamedTuple):
    """A model, its input, and what to adapt: names, and the slices of fused projections."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Any]
    targets: list[str] | str
    slices: dict[str, list[str]] | None = None


class TinyUNet(nn.Module):
    """What a diffusion UNet is made of, at its smallest: strided and transposed convolutions, a
    skip, time, attention."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(8, 16)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample, timestep):
        skip = F.silu(self.conv_in(sample))
        steps = torch.outer(timestep.float(), torch.arange(8.0)).sin().to(sample.dtype)
        x = self.down(skip) + self.time(steps)[:, :, None, None]
        rows = x.flatten(2).mT
        mixed = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        x = F.silu(x + self.to_out(mixed).mT.view_as(x))
        return self.conv_out(torch.cat([self.up(x), skip], 1))


def diffusers_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _text(build: Callable[[], nn.Module], targets, slices=None) -> Family:
    return Family(build, {"input_ids": TOKENS}, targets, slices)


FAMILIES = {
    "llama": _text(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)), "all-linear"),
    "mistral": _text(lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA)), "all-linear"),
    "gemma": _text(lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_LLAMA, head_dim=8)), "all-linear"),
    "gemma3": _text(
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=8)), "all-linear"
    ),
    "qwen2": _text(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA)), "all-linear"),
    "qwen3": _text(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA, head_dim=8)), "all-linear"),
    "phi3": _text(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_LLAMA)),
        "all-linear",
        {"qkv_proj": ["q", "k", "v"], "gate_up_proj": ["gate", "up"]},
    ),
    "gpt2": _text(lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT)), ["c_attn", "c_proj"], {"c_attn": ["q", "v"]}),
    "gptj": _text(lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**_GPT, rotary_dim=4)), "all-linear"),
    "gpt_neox": _text(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, **_ENDS, intermediate_size=48)),
        "all-linear",
        {"query_key_value": ["q", "v"]},
    ),
    "bloom": _text(
        lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60, **_ENDS)),
        "all-linear",
        {"query_key_value": ["q", "v"]},
    ),
    "falcon": _text(
        lambda: tf.FalconForCausalLM(tf.FalconConfig(**_FALCON)), "all-linear", {"query_key_value": ["q", "v"]}
    ),
    "rwkv": _text(
        lambda: tf.RwkvForCausalLM(
            tf.RwkvConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, context_length=16, **_ENDS)
        ),
        ["key", "value", "receptance", "output"],
    ),
    "rwkv6": _text(
        lambda: FinchForCausalLM(FinchConfig(hidden_size=32, num_hidden_layers=2, head_size=8, vocab_size=60)),
        "all-linear",
    ),
    "t5": Family(
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]},
        ["q", "k", "v", "o", "wi", "wo"],
    ),
    "bert": _text(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SIZES, intermediate_size=48)),
        ["query", "value", "dense"],
    ),
    "vit": Family(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**_VIT, **_IMAGES)),
        {"pixel_values": PIXELS},
        r".*\.(projection|q_proj|v_proj|query|value|fc1|dense)",
    ),
    "clip": Family(
        lambda: tf.CLIPModel(tf.CLIPConfig(**_CLIP)),
        {"input_ids": TOKENS, "pixel_values": PIXELS},
        ["q_proj", "v_proj", "fc1", "patch_embedding"],
    ),
    "resnet": Family(
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        {"pixel_values": PIXELS},
        ["convolution"],
    ),
    "unet": Family(
        TinyUNet,
        {"sample": PIXELS, "timestep": torch.tensor([3, 70])},
        ["conv_in", "down", "time", "to_q", "to_k", "to_v", "to_out", "conv_out"],
    ),
    "unet-diffusers": Family(
        diffusers_unet,
        {
            "sample": PIXELS[:, :, :8, :8].repeat(1, 2, 1, 1)[:, :4],
            "timestep": torch.tensor(7),
            "encoder_hidden_states": torch.linspace(-1, 1, 2 * 3 * 12).view(2, 3, 12),
        },
        ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_shortcut", "proj_in"],
    ),
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, where nothing can be seen
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def output(model: nn.Module, family: str) -> torch.Tensor:
    got = model(**FAMILIES[family].inputs)
    if isinstance(got, torch.Tensor):
        return got
    for name in ("logits", "logits_per_image", "sample"):
        if getattr(got, name, None) is not None:
            return getattr(got, name)
    raise AssertionError(f"no output to compare in {type(got).__name__}")


def seen(model: nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return output(model, family)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_an_adapters_life(name, family, tmp_path):
    base = model_of(family)
    cls, own = METHODS[name]
    config = cls(**own, target_modules=FAMILIES[family].targets, fused_slices=FAMILIES[family].slices)
    before = seen(base, family)
    weights = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config)
    assert any(isinstance(module, FusedLinear) for module in model.modules()) == (FAMILIES[family].slices is not None)

    trained = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(2):  # Mo-SARA's λ has no gradient while v is 0
        output(model, family).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, p in model.named_parameters() if key in trained and not torch.equal(p, trained[key])}
    assert moved == set(trained)
    base.load_state_dict({k: v for k, v in weights.items() if "running" in k or "num_batches" in k}, strict=False)
    model.eval()
    after = seen(model, family)
    assert not torch.allclose(after, before, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(seen(model, family), before)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model_of(family), tmp_path / "adapter").eval()
    assert torch.equal(seen(loaded, family), after)

    scale = float(after.abs().max())
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    lora = PeftModel.from_pretrained(model_of(family), tmp_path / "lora").eval()
    assert torch.allclose(seen(lora, family), after, atol=1e-4 * scale)

    merged = model.merge_and_unload(safe_merge=True)
    assert not layers(merged)
    assert torch.allclose(seen(merged, family), after, atol=1e-4 * scale)


def test_rwkv6_gives_the_logits_of_the_published_package(tmp_path, monkeypatch):
    """`pip install rwkv` has inference alone, for files of the training code's names."""
    for name in ("RWKV_JIT_ON", "RWKV_CUDA_ON"):
        monkeypatch.setenv(name, "0")
    package = pytest.importorskip("rwkv.model", reason="pip install rwkv")
    model = model_of("rwkv6")
    names = {"rwkv.": "", "embeddings": "emb", "attention": "att", "feed_forward": "ffn", "pre_ln": "ln0"}
    published = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        published[key] = tensor.clone()
    torch.save(published, tmp_path / "model.pth")
    theirs = package.RWKV(str(tmp_path / "model"), strategy="cpu fp32", verbose=False)
    for tokens, logits in zip(TOKENS.tolist(), seen(model, "rwkv6"), strict=True):
        assert torch.equal(theirs.forward(tokens, None, full_output=True)[0], logits)
