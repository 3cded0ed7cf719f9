"""The estimate of a step's own memory beside every tensor that is alive while a small model takes
one."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from pairwise import all_pairs
from svdtune import SorsaConfig
from svdtune.checkpoint import Checkpoint
from svdtune.planning import Setting, anatomy, estimate, plan

BATCH, LENGTH, RANK = 4, 64, 8
CONFIGS = {"sorsa": SorsaConfig, "lora": LoraConfig}


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside, and the most that were alive at once; those in
    `known` do not count."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage):
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key):
        self.now -= self.sizes.pop(key, 0)


def model_of(vocabulary, key_value_heads):
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_key_value_heads=key_value_heads, vocab_size=vocabulary, use_cache=False)
    return LlamaForCausalLM(config)


def measured(method, vocabulary, key_value_heads, checkpointing):
    model = get_peft_model(
        model_of(vocabulary, key_value_heads).bfloat16().train(), CONFIGS[method](r=RANK, target_modules="all-linear")
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH))
    with Live((*model.parameters(), *model.buffers(), tokens)) as live, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens, labels=tokens).loss.backward()
    return live.most


def estimated(method, vocabulary, key_value_heads, checkpointing):
    with torch.device("meta"):
        checkpoint = Checkpoint("tiny", model_of(vocabulary, key_value_heads), {}, 0)
    sizes = anatomy(plan(checkpoint, CONFIGS[method](r=RANK, target_modules="all-linear")), checkpoint.model)
    setting = Setting(batch_size=BATCH, length=LENGTH, gradient_checkpointing=checkpointing)
    memory = estimate(sizes, setting)
    workspace = 64 * 2**20
    return memory.activations + memory.logits + memory.temporaries - workspace + memory.gradients + 2 * sizes.copies


@pytest.mark.parametrize(
    ("method", "vocabulary", "key_value_heads", "checkpointing"), all_pairs(CONFIGS, [64, 4096], [8, 2], [False, True])
)
@pytest.mark.family(1)
def test_a_step_takes_what_is_estimated_and_no_more(method, vocabulary, key_value_heads, checkpointing):
    above = 1.65 if checkpointing else 1.2
    case = method, vocabulary, key_value_heads, checkpointing
    assert 0.98 <= estimated(*case) / measured(*case) <= above
