"""Inside `fast_starts`, PEFT's own call gives PEFT's own exact starts; outside it, PEFT is as it
was."""

import importlib.util
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import loftq_utils
from torch import nn
from transformers.pytorch_utils import Conv1D

from pairwise import all_pairs
from svdtune import SvdtuneError, fast_starts
from svdtune.linalg import all_factors
from svdtune.starts import inside_peft
from tiny import tiny_gpt2, tiny_llama

SHAPES = {"square": (40, 40), "wide": (24, 56), "tall": (56, 24), "deficient": (40, 40), "Conv1D": (24, 56)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What PEFT's own start is, exactly, for each that svdtune takes.
EXACT = {"pissa": "pissa", "pissa_niter_4": "pissa", "olora": "olora", "mica": "mica"}
R, ALPHA = 6, 9


def one_layer(shape: str, dtype: torch.dtype) -> nn.Module:
    out, inside = SHAPES[shape]
    torch.manual_seed(1)
    layer = Conv1D(out, inside) if shape == "Conv1D" else nn.Linear(inside, out)
    rows, columns = layer.weight.shape
    n = min(rows, columns)
    values = 4 * 0.9 ** torch.arange(n)  # apart, so that the first and last triplets are settled
    if shape == "deficient":
        values[4:] = 0
    U, V = (torch.linalg.qr(torch.randn(size, n)).Q for size in (rows, columns))
    layer.weight = nn.Parameter((U * values) @ V.mT)
    return nn.Sequential(layer).to(dtype)


def started(model: nn.Module, init: str, **settings: Any) -> Any:
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["0"], **settings}
    return get_peft_model(model, LoraConfig(init_lora_weights=init, **config))


def parts(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LoraLayer]:
    """scaling · B A [out, in], B and the base weight [out, in] of the one layer, in fp64."""
    layer = model.base_model.model[0]
    A, B = (getattr(layer, f"lora_{part}")["default"].weight.detach().double() for part in "AB")
    base = layer.get_base_layer().weight.detach().double()
    return layer.scaling["default"] * B @ A, B, base.mT if layer.fan_in_fan_out else base, layer


@pytest.mark.parametrize(("init", "shape", "dtype"), all_pairs(list(EXACT), list(SHAPES), DTYPES), ids=str)
def test_the_start_is_pefts_own(init, shape, dtype):
    if init == "olora" and shape in ("Conv1D", "deficient"):
        pytest.skip("PEFT factorises Conv1D as it is stored; a deficient weight has many Q")
    conv = {"fan_in_fan_out": True} if shape == "Conv1D" else {}
    theirs = started(one_layer(shape, dtype), EXACT[init], **conv)
    with fast_starts():
        ours = started(one_layer(shape, dtype), init, **conv)
    (product, B, base, layer), (expected, B0, base0, layer0) = parts(ours), parts(theirs)
    for name in ("lora_A", "lora_B"):
        got, stock = (getattr(each, name)["default"].weight for each in (layer, layer0))
        assert (got.shape, got.dtype, got.requires_grad) == (stock.shape, stock.dtype, stock.requires_grad)
    own, stock = layer.get_base_layer().weight, layer0.get_base_layer().weight
    assert (own.dtype, own.shape, own.stride()) == (stock.dtype, stock.shape, stock.stride())
    # PEFT rounds A, B and what is left of the weight to the weight's dtype
    rounding = 2 * torch.finfo(dtype).eps * float(base0.abs().max() + expected.abs().max())
    torch.testing.assert_close(base, base0, rtol=0, atol=rounding + 5e-6)
    torch.testing.assert_close(product, expected, rtol=0, atol=rounding + 5e-6)
    if init == "mica":
        if shape == "deficient":  # of the null space any basis is right
            return
        torch.testing.assert_close(B @ B.mT, B0 @ B0.mT, rtol=0, atol=max(1e-4, 4 * torch.finfo(dtype).eps))


@pytest.fixture
def preprocess_corda(monkeypatch):
    """PEFT's function; of attrs, which PEFT does not require, it takes no more than `dataclass`."""
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora import corda

    monkeypatch.setitem(sys.modules, corda.__name__, corda)
    return corda.preprocess_corda


@pytest.mark.parametrize(
    ("method", "shape", "dtype"), all_pairs(["ipm", "kpm"], ["square", "wide", "tall", "Conv1D"], DTYPES[:2]), ids=str
)
def test_cordas_start_is_pefts_own(method, shape, dtype, preprocess_corda):
    """The data are PEFT's, the triplets of W C are svdtune's."""
    found = []
    for block in (nullcontext(), fast_starts()):
        model = one_layer(shape, dtype)
        rows = torch.randn(64, SHAPES[shape][1], generator=torch.Generator().manual_seed(2)).to(dtype)
        config = LoraConfig(
            r=R,
            lora_alpha=ALPHA,
            target_modules=["0"],
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=method),
            fan_in_fan_out=shape == "Conv1D",
        )
        with block:
            preprocess_corda(model, config, run_model=lambda model=model, rows=rows: model(rows))
            found.append((model[0].eigens, parts(get_peft_model(model, config))))
    (theirs, (expected, _, base0, _)), (ours, (product, _, base, _)) = found
    for name in ("S_WC", "U_WC", "V_WC"):
        got, stock = getattr(ours, name), getattr(theirs, name)
        assert (got.shape, got.dtype, got.device) == (stock.shape, stock.dtype, stock.device)
    scale = float(base0.abs().max() + expected.abs().max())
    tolerance = (2 * torch.finfo(dtype).eps + 2e-5) * scale
    torch.testing.assert_close(product, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(base, base0, rtol=0, atol=tolerance)


def test_corda_without_data_is_refused_by_peft(preprocess_corda):
    config = LoraConfig(init_lora_weights="corda", target_modules=["0"], corda_config=CordaConfig(corda_method="ipm"))
    with fast_starts(), pytest.raises(ValueError, match="run_model must be specified"):
        preprocess_corda(one_layer("square", torch.float32), config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_model_begins_as_it_was(init):
    tokens = torch.arange(1, 25).view(2, 12)
    for make, targets in ((tiny_llama, ["q_proj", "down_proj"]), (tiny_gpt2, ["c_attn", "c_proj"])):
        if make is tiny_gpt2 and init == "olora":
            continue
        before = make()(input_ids=tokens).logits
        with fast_starts():
            model = started(make(), init, target_modules=targets, fan_in_fan_out=make is tiny_gpt2)
        torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=2e-5)


def test_dora_on_pissa_takes_its_magnitude_from_what_is_left():
    theirs = started(one_layer("wide", torch.float32), "pissa", use_dora=True)
    with fast_starts():
        ours = started(one_layer("wide", torch.float32), "pissa", use_dora=True)
    magnitudes = [parts(each)[3].lora_magnitude_vector["default"].weight for each in (ours, theirs)]
    torch.testing.assert_close(*magnitudes, rtol=1e-5, atol=1e-5)


def test_loftqs_decomposition():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    theirs = loftq_utils._low_rank_decomposition(weight, reduced_rank=5)
    with fast_starts():
        ours = loftq_utils._low_rank_decomposition(weight, reduced_rank=5)
    assert ours.keys() == theirs.keys()
    assert [ours[part].shape for part in "LR"] == [theirs[part].shape for part in "LR"] == [(30, 5), (5, 20)]
    torch.testing.assert_close(ours["L"] @ ours["R"], theirs["L"] @ theirs["R"], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["S"], theirs["S"][:5])


@pytest.mark.parametrize(("shape", "dtype"), all_pairs(["square", "wide", "tall", "deficient"], DTYPES), ids=str)
def test_osfs_frozen_and_trained_triplets_on_a_gpu(shape, dtype, monkeypatch):
    """The path that a GPU takes; a weight whose triplets no Gram matrix settles is PEFT's."""
    asked: list[Any] = []
    monkeypatch.setattr(inside_peft, "_has_gpu", lambda: True)
    monkeypatch.setattr(inside_peft, "all_factors", lambda weight: asked.append(all_factors(weight)) or asked[-1])
    config = OSFConfig(effective_rank=5, target_modules=["0"])
    theirs = get_peft_model(one_layer(shape, dtype), config).base_model.model[0]
    with fast_starts():
        ours = get_peft_model(one_layer(shape, dtype), config).base_model.model[0]
    if shape != "deficient" or dtype == torch.float32:  # rounding fills a null space, more or less
        assert [found is None for found in asked] == [shape == "deficient"]
    tolerance = 1e-5 + 4 * torch.finfo(dtype).eps
    products = []
    for layer in (theirs, ours):
        trained = {name: value.detach().double() for name, value in layer.osf_svd_params["default"].items()}
        frozen = [layer._osf_U_high, layer._osf_V_high]
        held = [each["default"].double() if "default" in each else None for each in frozen]
        spans = [held[0], None if held[1] is None else held[1].mT]
        products.append((trained["U_low"] * trained["S_low"] @ trained["V_low"], spans))
        assert {value.dtype for value in layer.osf_svd_params["default"].values()} == {torch.float32}  # by PEFT
    (expected, (U0, V0)), (product, (U, V)) = products
    torch.testing.assert_close(product, expected, rtol=0, atol=4 * tolerance)
    for one, other in ((U, U0), (V, V0)):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one @ one.mT, other @ other.mT, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("init", "settings", "dtype"),
    [
        ("pissa", {}, torch.float64),
        ("pissa_niter_x", {}, torch.float32),
        ("mica", {"r": 99}, torch.float32),
        ("olora", {}, torch.float64),
    ],
)
def test_what_peft_refuses_is_refused_by_peft(init, settings, dtype):
    with pytest.raises((TypeError, ValueError)) as theirs:
        started(one_layer("wide", dtype), init, **settings)
    with pytest.raises((TypeError, ValueError)) as ours, fast_starts():
        started(one_layer("wide", dtype), init, **settings)
    assert (str(ours.value), type(ours.value)) == (str(theirs.value), type(theirs.value))


@pytest.mark.parametrize("components", ["lst", (3,), (5, 3), (-6, 0), (0.0, 6.0)], ids=str)
def test_components_that_name_no_triplets_are_refused_on_entering(components):
    with (
        pytest.raises(SvdtuneError, match=r"one of first, middle, last, or whole numbers .*; got"),
        fast_starts(components),
    ):
        raise AssertionError("entered")
    assert inside_peft._Patches.inside == 0


@pytest.mark.parametrize(
    ("init", "components", "settings", "words"),
    [
        ("pissa", (3, 8), {}, r"\(3, 8\) must be \(start, stop\) with stop − start = r, here 6"),
        ("pissa_niter_4", (0, 7), {}, r"\(0, 7\) must be"),
        ("pissa", (0, 6), {"rank_pattern": {"0": 4}}, "stop − start = r, here 4"),
        ("pissa", "last", {"r": 50}, "has fewer triplets than r, and takes the first ones"),
        ("olora", "last", {}, "'olora_init' has its own; leave it out"),
        ("mica", (0, 6), {}, "'mica_init' has its own"),
    ],
    ids=["length", "niter", "pattern", "rank", "olora", "mica"],
)
def test_components_that_no_start_would_heed_are_refused(init, components, settings, words):
    model = one_layer("wide", torch.float32)
    before = model[0].weight.clone()
    with pytest.raises(SvdtuneError, match=words), fast_starts(components):
        started(model, init, **settings)
    assert torch.equal(model[0].weight, before)


def test_no_random_number_is_drawn():
    torch.manual_seed(3)
    layer = one_layer("wide", torch.float32)
    peft_draws = started(one_layer("wide", torch.float32), "pissa")  # lora_A's own, before the start
    del peft_draws
    after_exact = torch.rand(1)
    with fast_starts():
        started(one_layer("wide", torch.float32), "pissa_niter_4")
    assert torch.equal(torch.rand(1), after_exact)
    assert layer[0].weight.requires_grad


@pytest.mark.parametrize("init", ["olora", "mica"])  # tests/spectra has pissa's, which goes through `factors`
def test_weights_are_decomposed_on_the_device_for_work_and_stay_where_they_are(init, monkeypatch):
    asked = []

    def elsewhere(decompose, weight, device):
        asked.append(device)
        return decompose(weight)

    monkeypatch.setattr(inside_peft, "devices_for_work", lambda: [torch.device("cuda", 7)])
    monkeypatch.setattr(inside_peft, "on_device", elsewhere)
    with fast_starts():
        model = started(one_layer("tall", torch.float32), init)
    assert asked == [torch.device("cuda", 7)]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(("init", "dora"), [*((init, False) for init in EXACT), ("pissa", True)], ids=str)
def test_what_a_start_replaces_is_made_on_the_gpu_of_the_base(init, dora, monkeypatch):
    """Here the base's device is told from the others by another default."""
    monkeypatch.setattr(inside_peft, "_is_on_gpu", lambda _: True)
    model = one_layer("square", torch.float32)
    with torch.device("meta"), fast_starts():
        made = started(model, init, use_dora=dora)
    assert {parameter.device.type for parameter in made.parameters()} == {"cpu"}
    expected = started(one_layer("square", torch.float32), EXACT[init], use_dora=dora)
    torch.testing.assert_close(parts(made)[0], parts(expected)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("init", "settings"),
    [("gaussian", {}), (True, {"lora_bias": True}), (False, {}), ("orthogonal", {}), ("pissa", {"shared": True})],
    ids=str,
)
def test_what_stays_as_it_is_drawn_is_drawn_by_peft(init, settings, monkeypatch):
    monkeypatch.setattr(inside_peft, "_is_on_gpu", lambda _: True)
    model = one_layer("square", torch.float32)
    model[0].bias = nn.Parameter(torch.zeros(40))
    if "shared" in settings:  # by DeepSpeed
        model[0].weight.ds_id = 0
    around: list[Any] = []
    monkeypatch.setattr(
        inside_peft,
        "_on_the_gpu",
        lambda *a, own=inside_peft._on_the_gpu, **k: around.append(own(*a, **k)) or around[-1],
    )
    with fast_starts():
        started(model, init, lora_bias="lora_bias" in settings)
    assert [type(each) for each in around] == [nullcontext]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("init", list(EXACT))
def test_for_a_base_on_a_gpu_nothing_is_drawn_on_the_cpu(init):
    theirs = started(one_layer("tall", torch.float32).cuda(), EXACT[init])
    model = one_layer("tall", torch.float32).cuda()
    state = torch.get_rng_state()
    with fast_starts():
        ours = started(model, init)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.device.type for parameter in ours.parameters()} == {"cuda"}
    torch.testing.assert_close(parts(ours)[0], parts(theirs)[0], rtol=0, atol=2e-3)  # PEFT's SVD there is of fp32


def layers_of(model: Any) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


@pytest.mark.parametrize("tied", [1, 2, 4])
def test_all_layers_of_an_adapter_are_decomposed_together_as_pefts_are_in_turn(tied, monkeypatch):
    """Of tied weights each next one is what the start before left."""

    def model() -> nn.Module:
        torch.manual_seed(2)
        made = nn.Sequential(*(nn.Linear(40, 40) for _ in range(1 + tied)))
        for layer in made[2:]:
            layer.weight = made[0].weight
        return made

    asked, engine = [], inside_peft.factors
    monkeypatch.setattr(inside_peft, "factors", lambda w, r, **s: asked.append(len(r)) or engine(w, r, **s))
    with fast_starts():
        ours = started(model(), "pissa", target_modules=[str(at) for at in range(1 + tied)])
    theirs = started(model(), "pissa", target_modules=[str(at) for at in range(1 + tied)])
    assert asked == [2, *[1] * (tied - 1)]
    for one, other in zip(layers_of(ours), layers_of(theirs), strict=True):
        torch.testing.assert_close(
            one.get_delta_weight("default"), other.get_delta_weight("default"), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(one.get_base_layer().weight, other.get_base_layer().weight, rtol=0, atol=1e-5)


def test_an_adapter_that_peft_cannot_make_leaves_none_waiting():
    with fast_starts():
        with pytest.raises(ValueError, match="not supported"):
            started(nn.Sequential(nn.Linear(40, 40), nn.ReLU()), "pissa", target_modules=["0", "1"])
        assert inside_peft._waiting.get() is None
        assert parts(started(one_layer("wide", torch.float32), "pissa"))[1].any()


def test_a_weight_is_let_go_once_what_is_left_of_it_stands_in_its_place(monkeypatch):
    """Each is looked up three times: to be taken, to be decomposed, and for what is left."""
    held, alive, take_off = [], [], inside_peft._take_off
    looked_up, matrix = [], inside_peft._matrix
    monkeypatch.setattr(inside_peft, "_matrix", lambda layer: looked_up.append(layer) or matrix(layer))

    def watched(layer, weight, pair, scaling):
        alive.append(sum(one() is not None for one in held))
        held.append(weakref.ref(weight))
        take_off(layer, weight, pair, scaling)

    monkeypatch.setattr(inside_peft, "_take_off", watched)
    names = [str(number) for number in range(12)]
    with fast_starts():
        started(nn.Sequential(*(nn.Linear(40, 40) for _ in names)), "pissa", target_modules=names)
    assert len(alive) == 12
    assert max(alive) <= 1
    assert len(looked_up) == 36
