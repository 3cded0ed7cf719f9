"""DPO as trainers run it: the policy is the model with its adapter, the reference the same model
with the adapter disabled."""

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from tiny import tiny_llama

CONFIGS = {
    "sara": (SaraConfig, {"threshold": 0.2}),
    "mosara": (MoSaraConfig, {"r": 5, "num_heads": 2}),
    "sorsa": (SorsaConfig, {"r": 4}),
}
CHOSEN, REJECTED = torch.arange(1, 25).view(2, 12), torch.arange(25, 49).view(2, 12)


def base(dtype):
    return tiny_llama().to(dtype).train()


def log_probability(model, ids):
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.gather(F.log_softmax(logits, -1), 2, ids[:, 1:, None]).sum((1, 2))


@pytest.mark.filterwarnings("ignore:.*SARA changes the model at step 0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_stays_the_base_bit_for_bit(name, dtype):
    with torch.no_grad():
        expected = base(dtype)(input_ids=CHOSEN).logits
    cls, settings = CONFIGS[name]
    model = get_peft_model(base(dtype), cls(**settings, dropout=0.1)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(input_ids=CHOSEN).logits, expected)
            reference = log_probability(model, CHOSEN) - log_probability(model, REJECTED)
        policy = log_probability(model, CHOSEN) - log_probability(model, REJECTED)
        loss = -F.logsigmoid(0.1 * (policy - reference)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
