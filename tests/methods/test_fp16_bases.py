"""On a base in fp16, whose largest number is 65,504, factors are decomposed, trained and kept in
fp32."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from tiny import tiny_llama

CONFIGS = {
    "sara": (SaraConfig, {}),
    "mosara": (MoSaraConfig, {}),
    "sorsa": (SorsaConfig, {}),
}
TOKENS = torch.arange(5)[None]


def base() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_llama(**sizes, vocab_size=9).half()


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_are_fp32_and_a_step_is_finite(name: str, tmp_path) -> None:
    cls, settings = CONFIGS[name]
    before = base()(TOKENS).logits
    model = get_peft_model(base(), cls(r=4, task_type="CAUSAL_LM", **settings)).eval()
    if name != "sara":  # which starts from a change
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=2e-3, atol=2e-3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in trained)
    torch.optim.SGD(trained, lr=0.01).step()
    after = model(TOKENS).logits
    assert after.dtype == torch.float16
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path).eval()(TOKENS).logits, after)


@pytest.mark.parametrize("name", ["sara", "sorsa"])
def test_a_merge_that_overflows_is_refused_and_leaves_the_base(name: str) -> None:
    cls, settings = CONFIGS[name]
    model = get_peft_model(base(), cls(r=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "q_proj" in parameter_name:
                parameter.fill_(1e3)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights|does not fit"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)
