"""RWKV-6 (Finch), written out from the equations of "Eagle and Finch: RWKV with Matrix-Valued
States and Dynamic Recurrence" (Peng et al., 2024), for neither Transformers nor any library that
runs on a CPU trains it.

Its tensors have the names and shapes of the published checkpoint `RWKV/v6-Finch-7B-HF`, whose own
code it stands in for. This file is such code too: `save_with_code` puts it beside a configuration,
where `trust_remote_code` finds it.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class FinchConfig(PretrainedConfig):
    """The settings of the checkpoint that give shapes; those of 7B unless told."""

    model_type = "rwkv6"

    def __init__(self, hidden_size=4096, num_hidden_layers=32, head_size=64, vocab_size=65536, **others):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.head_size = head_size
        self.vocab_size = vocab_size
        super().__init__(**{"tie_word_embeddings": False} | others)


def before(x: torch.Tensor) -> torch.Tensor:
    """The token before each one, zero before the first, (batch, length, width)."""
    return F.pad(x, (0, 0, 1, -1))


def wkv(r: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The paper's state, token by token: r, w, k, v (batch, length, heads, head size), w in (0, 1),
    and u (heads, head size) → (batch, length, heads, head size)."""
    state, out = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(r.shape[1]):
        new = k[:, t, :, :, None] * v[:, t, :, None]
        out.append(torch.einsum("bhi,bhij->bhj", r[:, t], u[..., None] * new + state))
        state = w[:, t, ..., None] * state + new
    return torch.stack(out, 1)


class TimeMix(nn.Module):
    """A matrix-valued state per head, that each token decays in its own way."""

    def __init__(self, config):
        super().__init__()
        width, heads = config.hidden_size, config.hidden_size // config.head_size
        mixing, decaying = (64, 128) if width == 4096 else (32, 64)
        for name in ("x", "w", "k", "v", "r", "g"):
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.rand(1, 1, width)))
        self.time_maa_w1 = nn.Parameter(torch.randn(width, 5 * mixing) / width**0.5)
        self.time_maa_w2 = nn.Parameter(torch.randn(5, mixing, width) / mixing**0.5)
        self.time_decay = nn.Parameter(torch.randn(1, 1, width))
        self.time_decay_w1 = nn.Parameter(torch.randn(width, decaying) / width**0.5)
        self.time_decay_w2 = nn.Parameter(torch.randn(decaying, width) / decaying**0.5)
        self.time_faaaa = nn.Parameter(torch.randn(heads, config.head_size))
        for name in ("receptance", "key", "value", "gate", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ln_x = nn.GroupNorm(heads, width, eps=64e-5)

    def mixed(self, x):
        """The paper's ddlerp: x and the token before it, mixed for the w, k, v, r and g of each
        token."""
        gap = before(x) - x
        low = torch.tanh((x + gap * self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))
        lora = torch.einsum("btnr,nrd->nbtd", low, self.time_maa_w2)
        weights = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        return [x + gap * (weight + own) for weight, own in zip(weights, lora, strict=True)]

    def forward(self, x):
        w, k, v, r, g = self.mixed(x)
        decay = self.time_decay + torch.tanh(w @ self.time_decay_w1) @ self.time_decay_w2
        heads = self.time_faaaa.shape
        w = torch.exp(-torch.exp(decay.float())).unflatten(-1, heads)
        r, k, v = (
            linear(part).float().unflatten(-1, heads)
            for linear, part in ((self.receptance, r), (self.key, k), (self.value, v))
        )
        rows = wkv(r, w, k, v, self.time_faaaa).flatten(0, 1).flatten(1).to(x.dtype)
        return self.output(self.ln_x(rows).view_as(x) * F.silu(self.gate(g)))


class ChannelMix(nn.Module):
    """What stands where other models have their feed-forward layer."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * 3.5) // 32 * 32
        self.time_maa_k, self.time_maa_r = (nn.Parameter(torch.rand(1, 1, width)) for _ in range(2))
        self.key = nn.Linear(width, inner, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        gap = before(x) - x
        key = F.relu(self.key(x + gap * self.time_maa_k)).square()
        return torch.sigmoid(self.receptance(x + gap * self.time_maa_r)) * self.value(key)


class Block(nn.Module):
    def __init__(self, config, first):
        super().__init__()
        self.pre_ln = nn.LayerNorm(config.hidden_size) if first else None
        self.ln1, self.ln2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention, self.feed_forward = TimeMix(config), ChannelMix(config)

    def forward(self, x):
        x = x if self.pre_ln is None else self.pre_ln(x)
        x = x + self.attention(self.ln1(x))
        return x + self.feed_forward(self.ln2(x))


class Finch(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i == 0) for i in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids):
        x = self.embeddings(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.ln_out(x)


class FinchForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FinchConfig
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.rwkv = Finch(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: the layers start as PyTorch's do, the rest as written above."""

    def get_input_embeddings(self):
        return self.rwkv.embeddings

    def get_output_embeddings(self):
        return self.head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None, **others):
        """Logits (batch, length, vocabulary). The recurrence reads padding as tokens: put it at
        the right, where no token comes after it."""
        logits = self.head(self.rwkv(input_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoModelForCausalLM.register(FinchConfig, FinchForCausalLM)
