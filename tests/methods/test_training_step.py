"""The training step under everything loops do to it: accumulation, checkpointing, autocast,
compilation, several losses.

All of it must give the literal form's gradients.
"""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_peft_verbs import CONFIGS, TOKENS, adapted, config_of, layers, logits, model_of, move
from torch.nn import functional as F

from svdtune.methods.first_use import forget_first_use
from svdtune.methods.mosara import reference as mosara_reference
from svdtune.methods.sara import reference as sara_reference
from svdtune.methods.sorsa import reference as sorsa_reference

LABELS = TOKENS.flip(1)


def literal(model):
    """The same model computing the papers' equations as written."""
    forget_first_use(model.get_base_model())  # the layers' own forward never runs
    for layer in layers(model):

        def forward(x, layer=layer):
            base = layer.get_base_layer()
            flat = x.reshape(-1, x.shape[-1])
            weight = base.weight.mT if layer._is_conv1d else base.weight
            if layer.method == "mosara":
                y = mosara_reference.mosara_linear(flat, weight, base.bias, *layer._tensors("default"))
            elif layer.method == "sara":
                y = sara_reference.sara_linear(flat, weight, base.bias, *layer.product("default")[:3])
            else:
                y = sorsa_reference.sorsa_linear(flat, weight, base.bias, *layer.product("default"))
            return y.view(*x.shape[:-1], -1)

        layer.forward = forward
    return model


def gradients(model, tokens=TOKENS, labels=LABELS, parts=1):
    model.zero_grad()
    for some, wanted in zip(tokens.chunk(parts), labels.chunk(parts), strict=True):
        (model(input_ids=some, labels=wanted).loss / parts).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}


def assert_same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.allclose(got[key], value, atol=tolerance * float(value.abs().max() + 1e-3)), key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_literal_forms(name, family):
    model = adapted(name, family, moved=0.1)
    want = gradients(literal(copy.deepcopy(model)))
    assert_same(gradients(model), want, 1e-4)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
class TestLoops:
    def test_accumulation(self, name):
        model = adapted(name, moved=0.1)
        assert_same(gradients(model, parts=2), gradients(model))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing(self, name, use_reentrant):
        model = adapted(name, moved=0.1).train()
        want = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        assert_same(gradients(model), want)

    def test_two_forwards_before_two_backwards(self, name):
        model = adapted(name, moved=0.1)
        want = gradients(model, parts=2)
        model.zero_grad()
        losses = [model(input_ids=t, labels=y).loss / 2 for t, y in zip(TOKENS.chunk(2), LABELS.chunk(2), strict=True)]
        for loss in losses:
            loss.backward()
        assert_same({k: p.grad for k, p in model.named_parameters() if p.requires_grad}, want)

    def test_evaluation_between_steps(self, name):
        model = adapted(name, moved=0.1)
        want = gradients(model)
        before = logits(model)
        assert_same(gradients(model), want)
        move(model, 0.1, seed=5)
        assert not torch.equal(logits(model), before)
        assert torch.allclose(logits(model), literal_logits(model), atol=1e-4)

    def test_bf16_autocast(self, name):
        model = adapted(name, moved=0.05)
        want = gradients(literal(copy.deepcopy(model)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=TOKENS, labels=LABELS).loss
        loss.backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == torch.float32
                difference = float((parameter.grad - want[key]).norm())
                assert difference <= 0.1 * float(want[key].norm()) + 2e-3, key

    def test_pure_bf16(self, name):
        model = adapted(name, dtype=torch.bfloat16, moved=0.05)
        model(input_ids=TOKENS, labels=LABELS).loss.backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == torch.float32
                assert torch.isfinite(parameter.grad).all()

    def test_a_frozen_factor_gets_no_gradient(self, name):
        model = adapted(name, moved=0.1)
        want = gradients(model)
        frozen = next(key for key, p in model.named_parameters() if p.requires_grad)
        model.get_parameter(frozen).requires_grad_(False)
        model.zero_grad()
        model(input_ids=TOKENS, labels=LABELS).loss.backward()
        assert model.get_parameter(frozen).grad is None
        got = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        assert_same(got, {key: value for key, value in want.items() if key != frozen})

    @pytest.mark.family(1)
    def test_full_graph_compilation(self, name):
        """No graph break in our layers, and the same gradients."""
        model = adapted(name, moved=0.1, depth=1)
        want = gradients(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        model.zero_grad()
        F.cross_entropy(compiled(input_ids=TOKENS).logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()).backward()
        assert_same({k: p.grad for k, p in model.named_parameters() if p.requires_grad}, want, 1e-4)


def literal_logits(model):
    return logits(literal(copy.deepcopy(model)))


def test_layers_alone_work_too():
    """`inject_adapter_in_model` and modules taken out of their model go the same way."""
    model = get_peft_model(model_of("llama"), config_of("sorsa"))
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
def test_an_optimizers_step_is_seen_by_the_next_forward(name, fused):
    """Fused optimizers write to parameters without moving their version counters: nothing here may
    rely on those."""
    model = adapted(name, moved=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=fused)
    for _ in range(3):
        gradients(model)
        optimizer.step()
        assert torch.allclose(logits(model), literal_logits(model), atol=1e-4)


@pytest.mark.parametrize("name", ["sara", "mosara", "sorsa"])
@pytest.mark.family(1)
def test_a_hundred_steps_follow_the_literal_forms(name):
    """In float64, where rounding errors have no time to grow."""
    fast = adapted(name, dtype=torch.float64, moved=0.05, depth=1).double().train()
    slow = literal(copy.deepcopy(fast))
    fast.base_model.together.enabled = True
    curves = []
    for model in (fast, slow):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(100):
            loss = model(input_ids=TOKENS, labels=LABELS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][-1] < curves[0][0]
