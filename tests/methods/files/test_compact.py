"""compact=True leaves the frozen factors out of the file; loading recomputes them, checks them, and
gives the same outputs."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import new_process
import svdtune
from pairwise import all_pairs
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.linalg import top_factors
from svdtune.methods.files.compact import check_probes, probe
from svdtune.methods.layers.base import SvdLayer
from tiny import moved, tiny_gpt2, tiny_llama

CONFIGS = {
    "sara": (SaraConfig, {"r": 3}),
    "mosara": (MoSaraConfig, {"threshold": 0.5, "num_heads": 3}),
    "sorsa": (SorsaConfig, {"r": 4}),
}
TOKENS = torch.arange(1, 25).view(2, 12)


def base(family="llama", dtype=torch.float32):
    return (tiny_gpt2() if family == "gpt2" else tiny_llama()).to(dtype)


def trained(name, family="llama", dtype=torch.float32, **settings):
    cls, own = CONFIGS[name]
    model = get_peft_model(base(family, dtype), cls(**own, **({"compact": True} | settings), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("name", "family", "dtype", "low_cpu_mem_usage"),
    all_pairs(CONFIGS, ["llama", "gpt2"], [torch.float32, torch.bfloat16], [False, True]),
    ids=str,
)
def test_reloads_to_the_same_outputs(name, family, dtype, low_cpu_mem_usage, tmp_path):
    model = trained(name, family, dtype)
    model.save_pretrained(tmp_path)
    kept = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert not any(key.startswith("frozen") and not key.endswith("_probe") for key in kept)
    loaded = PeftModel.from_pretrained(base(family, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again)  # what was recomputed can be left out again
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again))
    assert all(torch.equal(first[key], second[key]) for key in first | second)


@pytest.mark.parametrize("name", ["mosara", "sorsa"])
def test_the_file_holds_little_more_than_what_is_trained(name, tmp_path):
    model = get_peft_model(
        nn.Sequential(nn.Linear(400, 400)), CONFIGS[name][0](r=40, target_modules=["0"], compact=True)
    )
    model.save_pretrained(tmp_path)
    elements = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    probes = 2 * 4 * 40 * 8
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * elements + probes + 2000


@pytest.mark.parametrize("name", ["mosara", "sorsa"])
def test_a_base_in_another_dtype_is_refused(name, tmp_path):
    """Its fingerprint agrees, its factors do not."""
    trained(name).save_pretrained(tmp_path)
    other = base(dtype=torch.bfloat16)
    before = logits(other)
    with pytest.raises(SvdtuneError, match=r"recomputed from this base model, is not what .* in the same dtype"):
        PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(logits(other), before)
    assert type(other.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("name", ["mosara", "sorsa"])
def test_made_on_the_bf16_copy_it_loads_on_the_base_itself(name, tmp_path):
    """The probes say which of the two it was, also beside an adapter that was made on the other."""
    trained(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    trained(name, dtype=torch.bfloat16, compact=False).save_pretrained(tmp_path / "whole")
    trained(name).save_pretrained(tmp_path / "own")
    model = PeftModel.from_pretrained(base(), tmp_path / "own")
    for folder in ("rounded", "whole"):
        model.load_adapter(tmp_path / folder, folder)
    svdtune.load_adapters(model, {"again": tmp_path / "rounded"})
    frozen = [module for module in model.modules() if isinstance(module, SvdLayer)]
    assert frozen
    for layer in frozen:
        for part in layer.frozen:
            own, whole = (layer.adapter_tensor(part, folder) for folder in ("default", "whole"))
            for made in ("rounded", "again"):
                torch.testing.assert_close(layer.adapter_tensor(part, made), whole, rtol=0, atol=1e-5)
            assert not torch.equal(whole, own)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["rounded"])
    first, second = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("rounded", "saved/rounded"))
    assert all(torch.equal(first[key], second[key]) for key in first | second)


@pytest.mark.parametrize("name", ["mosara", "sorsa"])
def test_made_on_the_bf16_copy_it_merges_into_the_checkpoint(name, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    settings = {"num_heads": 1} if name == "mosara" else {}
    rounded = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    config = CONFIGS[name][0](**CONFIGS[name][1] | settings, compact=True, task_type="CAUSAL_LM")
    moved(get_peft_model(rounded, config)).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = logits(loaded.eval())
    svdtune.merge(tmp_path / "adapter", tmp_path / "merged", check=False)
    svdtune.export_lora(tmp_path / "adapter", tmp_path / "lora")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    lora = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    for again in (merged, lora):
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


def test_resuming_beside_other_adapters(tmp_path):
    """Trainer loads a checkpoint over the adapter that it made; no weight is decomposed again."""
    for name in CONFIGS:
        model = trained(name)
        before = logits(model)
        model.save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, "default", is_trainable=True)
        assert torch.equal(logits(model.eval()), before)
        model.load_adapter(tmp_path / name, "second")
        model.set_adapter("second")
        assert torch.allclose(logits(model), before, atol=1e-5)


def test_switching_it_off_saves_everything(tmp_path):
    trained("sorsa").save_pretrained(tmp_path / "compact")
    model = PeftModel.from_pretrained(base(), tmp_path / "compact").eval()
    model.peft_config["default"].compact = False
    model.save_pretrained(tmp_path / "whole")
    other = base(dtype=torch.bfloat16).float()  # a base that the factors cannot be recomputed from
    loaded = PeftModel.from_pretrained(other, tmp_path / "whole").eval()
    frozen = [module for module in loaded.modules() if hasattr(module, "frozen_P0")]
    expected = [module for module in model.modules() if hasattr(module, "frozen_P0")]
    assert all(
        torch.equal(a.frozen_P0["default"], b.frozen_P0["default"]) for a, b in zip(frozen, expected, strict=True)
    )


def test_it_cannot_be_switched_on_later(tmp_path):
    model = trained("sorsa", compact=False)
    model.peft_config["default"].compact = True
    with pytest.raises(
        SvdtuneError, match="cannot be saved with compact=True: its frozen factors were not computed for that"
    ):
        model.save_pretrained(tmp_path)
    with pytest.raises(SvdtuneError, match="`compact` needs `init_weights=True`"):
        SorsaConfig(compact=True, init_weights=False)


def test_probes_notice_what_matters():
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(300, 8)).Q
    probes = {"frozen_U": probe(U)}
    check_probes("layer", {"frozen_U": U * (1 + 1e-7)}, probes)
    turned = U.clone()
    turned[:, 2:4] = U[:, 2:4] @ torch.tensor([[0.99999, -0.0045], [0.0045, 0.99999]])
    for other in (U * torch.tensor([1, 1, 1, -1, 1, 1, 1, 1]), U[:, [1, 0, *range(2, 8)]], turned, U[:, :7]):
        with pytest.raises(SvdtuneError, match=r"frozen_U of layer 'layer'"):
            check_probes("layer", {"frozen_U": other}, probes)


def test_exact_factors_agree_with_lapacks_to_fp32():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    weight[:, 100:] *= 1e-4  # the Gram matrix would lose these
    U, s, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    for r in (5, 150):
        found = top_factors(weight, r, exact=True)
        signs = (found.Vh * Vh[:r]).sum(1).sign()
        assert torch.allclose(found.s.double(), s[:r], rtol=1e-6)
        assert float((found.U - (U[:, :r] * signs)).abs().max()) < 1e-6
        assert float((found.Vh - signs[:, None] * Vh[:r]).abs().max()) < 1e-6


def save_logits(folder, threads):
    torch.set_num_threads(threads)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter").eval()
    torch.save(logits(model), folder / "logits.pt")


@pytest.mark.parametrize("name", ["mosara", "sorsa"])
def test_a_new_process_with_more_threads(name, tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = trained(name)
    model.save_pretrained(tmp_path / "adapter")
    new_process.start(save_logits, tmp_path, torch.get_num_threads() + 1).result()
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), logits(model), atol=1e-5)
