"""Saved here, loaded in a fresh process: the same logits, bit for bit, in fp32 and bf16, for every
method."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

import new_process
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from tiny import tiny_llama

CONFIGS = {
    "sara": SaraConfig(threshold=0.2),
    "mosara": MoSaraConfig(threshold=0.5, num_heads=3),
    "sorsa": SorsaConfig(r=4),
}
TOKENS = torch.arange(1, 25).view(2, 12)


def compare_logits(folder: Path) -> int:
    """Load every adapter in a folder and compare its logits with those beside it; how many there
    were."""
    adapters = 0
    for dtype in (torch.float32, torch.bfloat16):
        for adapter in sorted(folder.glob(f"*-{dtype}")):
            base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
            model = PeftModel.from_pretrained(base, adapter).eval()
            with torch.no_grad():
                got = model(input_ids=TOKENS).logits
            assert torch.equal(got, torch.load(adapter / "logits.pt")), adapter.name
            adapters += 1
    return adapters


def test_logits_are_the_same(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16):
        for name, config in CONFIGS.items():
            base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
            model = get_peft_model(base, config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn_like(parameter)
                folder = tmp_path / f"{name}-{dtype}"
                model.save_pretrained(folder)
                torch.save(model(input_ids=TOKENS).logits, folder / "logits.pt")
    assert new_process.start(compare_logits, tmp_path).result() == 2 * len(CONFIGS)
