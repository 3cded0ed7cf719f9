"""A base model that Accelerate offloads: the adapter works on it, and is not offloaded with it."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from tiny import moved, tiny_llama

METHODS = {"sara": SaraConfig(r=3), "mosara": MoSaraConfig(r=3), "sorsa": SorsaConfig(r=3)}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_values_that_were_offloaded_are_refused(config):
    tokens = torch.arange(8)[None]
    model = moved(get_peft_model(tiny_llama(), copy.deepcopy(config)).eval())
    expected = model(tokens).logits
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device="cpu")
    with pytest.raises(SvdtuneError, match=r"were offloaded with the model .* put the adapter on after that"):
        offloaded(tokens)
    base = tiny_llama()
    cpu_offload(base, execution_device="cpu")
    torch.manual_seed(0)
    after = get_peft_model(base, copy.deepcopy(config)).eval()
    after.load_state_dict({key: t for key, t in model.state_dict().items() if config.method in key}, strict=False)
    torch.testing.assert_close(after(tokens).logits, expected, rtol=0, atol=1e-5)
