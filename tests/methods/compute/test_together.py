"""Layers that work together give what each gives by itself: outputs, gradients, and nothing that is
out of date."""

import copy

import pytest
import torch
from test_kvcache import CACHE
from test_peft_verbs import TOKENS, adapted, layers, logits, move
from test_training_step import LABELS, assert_same, gradients
from transformers import DynamicCache

from pairwise import all_pairs
from svdtune.methods.compute.changes import changes_at_once
from svdtune.methods.compute.lowrank import FIELDS, LowRankLinear, stacked
from svdtune.methods.compute.together import Together

NAMES = ["sara", "sorsa"]


def together(model) -> Together:
    return model.base_model.together


def on(model):
    """The model with its layers working together from now on, one pass having been watched."""
    together(model).enabled = True
    with torch.no_grad():
        model(input_ids=TOKENS)
    return model


@pytest.fixture
def nodes(monkeypatch):
    """How many layers each autograd node computed."""
    sizes = []
    apply = LowRankLinear.apply

    def counted(x, x_adapter, p, *tensors):
        sizes.append(len(tensors) // FIELDS)
        return apply(x, x_adapter, p, *tensors)

    monkeypatch.setattr(LowRankLinear, "apply", counted)
    return sizes


WAYS = ["in one node", "all changes at once"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Which of the two ways of working together a test takes."""
    monkeypatch.setattr(
        "svdtune.methods.compute.together.SMALL_LAYER", 1e9 if request.param == "all changes at once" else 0
    )
    return request.param


@pytest.mark.parametrize(("name", "family", "way"), all_pairs(NAMES, ["llama", "gpt2"], WAYS), indirect=["way"])
def test_gradients_are_those_of_single_layers(name, family, nodes, way):
    model = adapted(name, family, moved=0.1)
    want, before = gradients(model), logits(model)
    assert set(nodes) == {1}
    on(model)
    nodes.clear()
    assert_same(gradients(model), want)
    if way == "all changes at once":
        assert not nodes
    else:
        assert (max(nodes) > 1) == (family == "llama")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast(name, way):
    model = adapted(name, moved=0.05)

    def found():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=TOKENS, labels=LABELS).loss
        loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    want = found()
    together(model).enabled = True
    found()
    for key, gradient in found().items():
        assert float((gradient - want[key]).norm()) <= 0.05 * float(want[key].norm()) + 1e-3, key


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_work_alone(use_reentrant, way):
    model = adapted("sorsa", moved=0.1).train()
    want = gradients(model)
    on(model).gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for _ in range(3):
        assert_same(gradients(model), want)


def test_an_optimizers_step_is_seen(way):
    """Fused optimizers change parameters without moving their version."""
    model = on(adapted("sorsa", moved=0.1))
    twin = adapted("sorsa", moved=0.1)
    for one in (model, twin):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2, fused=True)
        for _ in range(3):
            one(input_ids=TOKENS, labels=LABELS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(logits(model), logits(twin), atol=1e-4)


def test_two_forwards_before_two_backwards(way):
    model = adapted("sorsa", moved=0.1)
    want = gradients(model, parts=2)
    on(model).zero_grad()
    halves = zip(TOKENS.chunk(2), LABELS.chunk(2), strict=True)
    for loss in [model(input_ids=tokens, labels=labels).loss / 2 for tokens, labels in halves]:
        loss.backward()
    assert_same({key: p.grad for key, p in model.named_parameters() if p.requires_grad}, want)


def test_a_switch_of_adapters_between_passes(way):
    model = adapted("sorsa", moved=0.1)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    want = gradients(model)
    on(model).set_adapter("second")
    gradients(model)
    gradients(model)
    model.set_adapter("default")
    assert_same(gradients(model), want)


def test_a_block_called_by_itself_sees_new_values(way):
    model = on(adapted("sorsa", moved=0.1))
    gradients(model)
    layer = layers(model)[0]
    x = torch.randn(2, 3, layer.in_features)
    before = layer(x)
    move(model, 0.1, seed=5)
    assert not torch.equal(layer(x), before)


def test_after_an_error_nothing_is_left_over():
    model = on(adapted("sorsa", moved=0.1))
    gradients(model)
    with pytest.raises(Exception, match=r"."):
        model(input_ids=TOKENS.float() + 0.5)
    assert together(model)._pass is None


class Pair(torch.nn.Module):
    """Two layers that may or may not read one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(6, 4)
        self.shared, self.skipped = True, False

    def forward(self, x):
        y = self.first(x)
        return y.sum() if self.skipped else y.sum() + self.second(x if self.shared else x * 2).sum()


def pair():
    from peft import get_peft_model

    from svdtune import SaraConfig

    torch.manual_seed(0)
    model = get_peft_model(Pair(), SaraConfig(r=2, target_modules=["first", "second"]))
    together(model).enabled = True
    return model


@pytest.mark.parametrize("change", ["shared", "skipped"])
def test_layers_that_cease_to_share_their_input(change, nodes, monkeypatch):
    monkeypatch.setattr("svdtune.methods.compute.together.SMALL_LAYER", 0)
    model, x = pair(), torch.randn(3, 6, requires_grad=True)
    for _ in range(2):
        model(x).backward()
    assert nodes == [1, 1, 2]
    inner = model.base_model.model
    setattr(inner, change, not getattr(inner, change))
    model.zero_grad()
    model(x).backward()
    second = inner.second.sara_U["default"]
    assert (second.grad is None) == (change == "skipped")
    twin = copy.deepcopy(model)
    together(twin).enabled = False
    for one in (model, twin):
        one.zero_grad()
        one(x).backward()
    got, want = ({k: p.grad for k, p in one.named_parameters() if p.grad is not None} for one in (model, twin))
    assert_same(got, want)
    nodes.clear()
    model(x).backward()
    assert set(nodes) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_generating_forms_each_pair_once(name, monkeypatch):
    model = adapted(name, moved=0.1).eval()
    together(model).enabled = False
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    want = model.generate(input_ids=TOKENS[:1, :4], **settings)
    together(model).enabled = None
    formed = []
    monkeypatch.setattr("svdtune.methods.compute.together.stacked", lambda *a: formed.append(1) or stacked(*a))
    for _ in range(2):
        formed.clear()
        got = model.generate(input_ids=TOKENS[:1, :4], **settings)
        assert len(formed) == len(layers(model))
        assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    del got
    assert not together(model)._kept


def test_a_cache_that_begins_anew_forms_pairs_anew():
    model = adapted("sorsa", moved=0.1).eval()
    cache = DynamicCache()
    given = {CACHE: cache}
    with torch.no_grad():
        model(input_ids=TOKENS, **given)
        move(model, 0.1, seed=5)
        cache.reset()
        if cache.get_seq_length() > 0:
            pytest.skip("this release of transformers puts zeros into the cache and keeps its length")
        got = model(input_ids=TOKENS, **given).logits
        assert torch.equal(got, model(input_ids=TOKENS).logits)


def test_a_copy_watches_itself_and_unloading_takes_the_hooks_away():
    model = on(adapted("sorsa"))
    twin = copy.deepcopy(model)
    assert together(twin) is not together(model)
    assert layers(twin)[0].together is together(twin)
    together(twin).enabled = True
    gradients(twin)
    assert together(twin)._plan[0].layer is layers(twin)[0]
    twin.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert len(twin.base_model.model._forward_pre_hooks) == 1
    for one in (model, twin):
        base = one.unload()
        assert not base._forward_pre_hooks
        assert not base._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sara", "without s", "sorsa"])
def test_changes_formed_at_once(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def parameter(*shape, trained=True):
        return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=wide), requires_grad=trained)

    jobs = []
    for out, n, r in [(5, 6, 3), (5, 6, 3), (7, 6, 2), (5, 6, 3)]:
        s = None if kind == "without s" else parameter(r)
        taken = (parameter(out, r, trained=False), parameter(n, r, trained=False)) if kind == "sorsa" else (None, None)
        jobs.append(((parameter(out, r), s, parameter(n, r), *taken), dtype))
    formed = changes_at_once(jobs)
    unused = 1  # a layer that the pass does not reach
    upstream = [torch.randn(one.delta.shape, generator=generator, dtype=wide) for one in formed]
    used = [n for n in range(len(jobs)) if n != unused]
    torch.autograd.backward([formed[n].delta for n in used], [upstream[n].to(dtype) for n in used])
    tolerance = {"atol": 0.2, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    for n, ((U, s, V, P0, V0), _) in enumerate(jobs):
        trained = [tensor for tensor in (U, s, V) if tensor is not None]
        got = [tensor.grad for tensor in trained]
        if n == unused:
            assert got == [None] * len(trained)
            continue
        delta = V @ (U if s is None else U * s).mT - (0 if P0 is None else V0 @ P0.mT)
        assert formed[n].delta.dtype == dtype
        assert torch.allclose(formed[n].delta.to(wide), delta, **tolerance)
        want = torch.autograd.grad(delta, trained, upstream[n])
        for mine, its in zip(got, want, strict=True):
            assert torch.allclose(mine, its, **tolerance)


def test_an_untouched_sorsa_adapter_changes_nothing():
    model = on(adapted("sorsa"))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=TOKENS)
        got = model(input_ids=TOKENS).logits
        with model.disable_adapter():
            want = model(input_ids=TOKENS).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("small", [False, True])
def test_small_models_form_all_changes_at_once(small, nodes, monkeypatch):
    monkeypatch.setattr("svdtune.methods.compute.together.SMALL_LAYER", 1e9 if small else 0)
    model = on(adapted("sorsa", target_modules="all-linear"))
    nodes.clear()
    gradients(model)
    assert nodes == ([] if small else [3, 1, 2, 1] * 2)  # q, k and v; o; gate and up; down
    nodes.clear()
    logits(model)
    # without gradients every layer works alone, so outputs repeat to the bit
    assert set(nodes) == {1}


@pytest.mark.slow
def test_a_compiled_model_is_one_graph():
    model = on(adapted("sorsa", moved=0.1))
    want = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    logits = compiled(input_ids=TOKENS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()).backward()
    assert_same({key: p.grad for key, p in model.named_parameters() if p.requires_grad}, want, 1e-4)
