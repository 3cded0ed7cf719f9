"""No pair is formed twice in a generation, whatever a release calls the argument that holds the
key-value cache."""

import inspect

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from test_math_runs import hooked
from test_peft_verbs import TOKENS, adapted, config_of, layers, move
from test_training_step import literal
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Cache

from operations import Operations
from svdtune import SorsaConfig
from svdtune.methods.compute.lowrank import stacked
from svdtune.methods.compute.together import growing_cache, is_empty

WAYS = {
    "by place": lambda cache: ((cache,), {}),
    "past_key_values": lambda cache: ((), {"past_key_values": cache}),
    "cache": lambda cache: ((), {"cache": cache}),
    "a name of no release": lambda cache: ((), {"use_cache": True, "memory": cache}),
}
(CACHE,) = (
    name
    for name, parameter in inspect.signature(tf.LlamaForCausalLM.forward).parameters.items()
    if "Cache" in str(parameter.annotation)
)
SIZES = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class Keys(nn.Module):
    """A layer whose output goes into the cache among the arguments."""

    def __init__(self):
        super().__init__()
        self.k = nn.Linear(6, 4)

    def forward(self, x, *places, **names):
        (cache,) = [given for given in (*places, *names.values()) if isinstance(given, Cache)]
        keys = self.k(x)[:, None]
        return cache.update(keys, keys, 0)[0]


@pytest.fixture
def formed(monkeypatch):
    """One entry for each pair that was formed."""
    found = []
    monkeypatch.setattr("svdtune.methods.compute.together.stacked", lambda *a: found.append(1) or stacked(*a))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_is_formed_once_whatever_the_cache_is_called(way, formed):
    torch.manual_seed(0)
    model = get_peft_model(Keys(), SorsaConfig(r=2, target_modules=["k"])).eval()
    places, names = WAYS[way](DynamicCache())
    with torch.no_grad():
        for tokens in (3, 1, 1):
            keys = model(torch.randn(2, tokens, 6), *places, **names)
    assert keys.shape == (2, 1, 5, 4)
    assert len(formed) == 1


def decoder():
    return adapted("sorsa", moved=0.1)


def encoder_and_decoder():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2}
    base = tf.T5ForConditionalGeneration(tf.T5Config(**SIZES | sizes)).eval()
    return get_peft_model(base, SorsaConfig(r=2, target_modules=["q", "v"]))


def recurrent():
    base = tf.MambaForCausalLM(tf.MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    return get_peft_model(base, SorsaConfig(r=2, target_modules=["in_proj"]))


@pytest.mark.parametrize("make", [decoder, encoder_and_decoder, recurrent])
def test_generating_is_the_same_with_kept_pairs(make, formed):
    """Each pair is formed once, under an encoder too, and in a model of states if the release
    caches those in a `Cache`."""
    torch.manual_seed(0)
    model = make()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    model.base_model.together.enabled = False
    want = model.generate(input_ids=TOKENS[:1, :4], **settings)
    model.base_model.together.enabled = None
    formed.clear()
    got = model.generate(input_ids=TOKENS[:1, :4], **settings)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    if growing_cache(got.values()) is not None:
        # called once, by itself
        encoder = layers(model.get_encoder()) if make is encoder_and_decoder else []
        assert len(formed) == len(layers(model)) - len(encoder)
    else:
        assert make is recurrent


OPERATIONS = {"sara": 2, "sorsa": 2, "mosara": 7, "mosara-front": 7, "mosara-one-head": 3}
"""What a layer adds to the base's for a decoded token: the two products with its pair, and what a
gate needs."""


def decoded(model):
    """What a model says after a token that extends a cache, and how many operations it took."""
    cache = DynamicCache()
    with torch.no_grad():
        for tokens in TOKENS[:1, :6].split((3, 1, 2), 1):  # a pass each; with the last all but once is done
            with Operations() as counted:
                found = model(input_ids=tokens, use_cache=True, **{CACHE: cache}).logits
    return found, counted.count


@pytest.mark.parametrize("reads", [True, False], ids=["weight", "output"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_decoded_token_takes_few_operations(name, reads):
    """Where a layer reads its base's weight, and where it adds to the output of one that it must
    call; LoRA takes four."""
    model = adapted(name, moved=0.1)
    if not reads:
        hooked(model)
    found, count = decoded(model)
    with model.disable_adapter():
        _, base = decoded(model)
    assert count - base == OPERATIONS[name] * len(layers(model))
    with torch.no_grad():
        want = literal(adapted(name, moved=0.1))(input_ids=TOKENS[:1, :6]).logits[:, -2:]
    assert torch.allclose(found, want, atol=1e-5)


def test_several_adapters_keep_a_pair_each():
    model = adapted("sorsa", moved=0.1)
    model.add_adapter("other", config_of("sorsa"))
    model.base_model.set_adapter(["default", "other"])
    _, count = decoded(move(model, 0.1))
    with model.disable_adapter():
        _, base = decoded(model)
    assert count - base == 4 * len(layers(model))


def test_which_caches_grow():
    cache, config = DynamicCache(), adapted("sorsa").config
    pair = EncoderDecoderCache(cache, DynamicCache())
    assert growing_cache([TOKENS, None, cache]) is cache
    assert growing_cache([pair]) is cache
    assert growing_cache([]) is None
    assert growing_cache([TOKENS, None, 3, StaticCache(config=config, max_cache_len=8)]) is None
    assert is_empty(cache)
    cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0)
    assert not is_empty(cache)
