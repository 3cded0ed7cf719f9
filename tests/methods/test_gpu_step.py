"""The training step on a GPU, where the kernels and the aligned shapes are: against the literal
forms. Skips without CUDA."""

import copy

import pytest
import torch
from peft import get_peft_model
from test_peft_verbs import CONFIGS, config_of, layers, move
from test_training_step import literal

from svdtune import regularize
from svdtune.methods.compute import kernels
from svdtune.methods.compute.lowrank import Product, low_rank_linear
from tiny import tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS = torch.arange(0, 240).view(4, 60)


def adapted(name: str, dtype=torch.float32, **settings):
    model = tiny_llama(hidden_size=128, intermediate_size=192, vocab_size=256).to(dtype).train()
    return move(get_peft_model(model, config_of(name, **settings)), 0.05).cuda()


def gradients(model, autocast=False):
    tokens = TOKENS.cuda()
    for _ in range(2):  # in the second pass layers work together
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}


# layers with one input in one node, or all changes at once
@pytest.mark.parametrize("small_layer", [0, 4e9])
@pytest.mark.parametrize("name", CONFIGS)
def test_fp32(name, small_layer, monkeypatch):
    monkeypatch.setattr("svdtune.methods.compute.together.SMALL_LAYER", small_layer)
    model = adapted(name)
    want = gradients(literal(copy.deepcopy(model)))
    for key, gradient in gradients(model).items():
        assert float((gradient - want[key]).norm()) <= 1e-3 * float(want[key].norm()) + 1e-5, key


# layers with one input in one node, or all changes at once
@pytest.mark.parametrize("small_layer", [0, 4e9])
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_autocast_is_no_worse_than_the_literal_form(name, small_layer, monkeypatch):
    monkeypatch.setattr("svdtune.methods.compute.together.SMALL_LAYER", small_layer)
    model = adapted(name)
    truth = gradients(literal(copy.deepcopy(model)))
    rough = gradients(literal(copy.deepcopy(model)), autocast=True)
    for key, gradient in gradients(model, autocast=True).items():
        allowed = max(3 * float((rough[key] - truth[key]).norm()), 0.05 * float(truth[key].norm()))
        assert float((gradient - truth[key]).norm()) <= allowed + 1e-4, key


@pytest.mark.parametrize("name", ["sara", "sorsa"])
@pytest.mark.parametrize("r", [7, 16])
def test_dropout_in_the_kernels(name, r, monkeypatch):
    """The same outputs and gradients as dropout on a stored input with the same mask."""
    seed = torch.tensor(1234567, device="cuda")
    monkeypatch.setattr("svdtune.methods.compute.kernels.dropout_seed", lambda device: seed)
    p, torch_seed = 0.3, torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=torch_seed)

    x, weight, bias = random(70, 96), random(80, 96), random(80)
    U, s, V = random(80, r), random(r), random(96, r)
    frozen = (random(80, r), random(96, r)) if name == "sorsa" else (None, None)
    leaves = [t.clone().requires_grad_() for t in (x, U, s, V)]
    mine, U1, s1, V1 = leaves
    got = low_rank_linear(mine, weight, bias, Product(U1, s1, V1, *frozen), p=p)
    upstream = random(70, 80)
    got.backward(upstream)
    twins = [t.clone().requires_grad_() for t in (x, U, s, V)]
    plain, U2, s2, V2 = twins
    mask = kernels.dropout_mask(x.shape, p, seed, "cuda")
    want = low_rank_linear(plain, weight, bias, Product(U2, s2, V2, *frozen), x_adapter=plain * mask / (1 - p))
    want.backward(upstream)
    assert float((got - want).detach().norm() / want.detach().norm()) < 2e-3
    for one, other in zip(leaves, twins, strict=True):
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < 2e-3


def test_dropout_in_a_model_trains():
    model = adapted("sorsa", dtype=torch.bfloat16, dropout=0.1).train()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, autocast=True).values())
    assert any(layer.training for layer in layers(model))


@pytest.mark.parametrize("name", ["sara", "sorsa", "mosara"])
def test_a_step_as_a_cuda_graph(name):
    """Forward, backward and a fused optimizer captured once and replayed: the same losses as step
    by step."""
    losses = {}
    for graphed in (False, True):
        model = adapted(name, dtype=torch.bfloat16).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True, capturable=True)
        tokens = TOKENS.cuda()

        def step(model=model, optimizer=optimizer, tokens=tokens):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [step().clone() for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
            for _ in range(3):
                graph.replay()
                found.append(loss.clone())
        else:
            found += [step().clone() for _ in range(3)]
        losses[graphed] = [float(loss) for loss in found]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)
    assert losses[True][-1] < losses[True][0]


def test_a_step_with_clipping_and_the_regularizer_waits_for_nothing():
    model = adapted("sorsa", dtype=torch.bfloat16).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    hook = regularize(optimizer, model)
    tokens = TOKENS.cuda()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(hook.last)
