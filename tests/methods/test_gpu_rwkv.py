"""RWKV-6 on a GPU: the kernels of flash-linear-attention, which the published checkpoints call, and
that library's own model."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

METHODS = ("sara", "mosara", "sorsa")


@pytest.fixture(scope="module")
def fla():
    return pytest.importorskip("fla", reason="pip install flash-linear-attention")


def test_the_state_of_the_equations_is_that_of_the_kernel_the_checkpoints_call(fla):
    from fla.ops.rwkv6 import fused_recurrent_rwkv6

    from finch import wkv

    torch.manual_seed(0)
    r, k, v, decay, to = (torch.randn(2, 24, 2, 32, device="cuda") for _ in range(5))
    u = torch.randn(2, 32, device="cuda")
    found = []
    for kernel in (False, True):
        given = [part.clone().requires_grad_() for part in (r, decay, k, v, u)]
        log = -torch.exp(given[1])
        if kernel:
            y = fused_recurrent_rwkv6(given[0], given[2], given[3], log, given[4], scale=1.0)[0]
        else:
            y = wkv(given[0], log.exp(), *given[2:])
        found.append([y, *torch.autograd.grad((y * to).sum(), given)])
    for by_loop, by_kernel in zip(*found, strict=True):
        torch.testing.assert_close(by_kernel, by_loop, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # of the library, about itself
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_merges_on_the_librarys_model(fla, method, tmp_path):
    from fla.models import RWKV6Config, RWKV6ForCausalLM
    from peft import PeftModel, get_peft_model

    import svdtune

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "expand_k": 1.0, "vocab_size": 64}
    base = RWKV6ForCausalLM(RWKV6Config(**sizes)).cuda()
    # up to 64 tokens the library takes the kernel above; that of chunks is first tuned for minutes
    tokens = torch.randint(0, 64, (4, 48), device="cuda")
    names = r".*attn\.([rkvg]_proj\.linear|o_proj)"
    config = {
        "sara": svdtune.SaraConfig(threshold=0.3, target_modules=names),
        "mosara": svdtune.MoSaraConfig(threshold=0.5, target_modules=names),
        "sorsa": svdtune.SorsaConfig(r=8, target_modules=names),
    }[method]
    untouched = base(tokens).logits.detach().clone()
    model = get_peft_model(base, config)
    assert sum(hasattr(layer, "base_layer") for layer in model.modules()) == 2 * 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    trained = model(tokens).logits.detach()
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, untouched)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(again(tokens).logits, trained)
    if method != "mosara":  # its router depends on the token
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, trained, rtol=1e-3, atol=1e-3)
