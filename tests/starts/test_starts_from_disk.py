"""A stock LoRA started from a checkpoint is PEFT's own exact start, loads without svdtune, and
holds one weight at a time."""

import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import new_process
import stock_peft
import svdtune
from svdtune import SaraConfig, SorsaConfig, SvdtuneError
from svdtune.checkpoint import open_checkpoint
from svdtune.cli import app
from svdtune.starts.disk import start_lora
from tiny import tiny_gpt2, tiny_llama
from watched import Watched

TOKENS = torch.arange(1, 25).view(2, 12)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
STARTS = ["pissa", "pissa_niter_4", "olora", "mica"]


def model_of(family, dtype=torch.float32):
    made = tiny_gpt2() if family == "gpt2" else tiny_llama(num_key_value_heads=2, tie_word_embeddings=False)
    return made.to(dtype)


def lora(init, family="llama", **settings):
    given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | settings
    return LoraConfig(init_lora_weights=init, fan_in_fan_out=family == "gpt2", **given)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits.float()


def layers(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A") and layer.lora_A}


def product(layer):
    A, B = (getattr(layer, f"lora_{part}")["default"].weight.detach().double() for part in "AB")
    return layer.scaling["default"] * B @ A


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", STARTS)
def test_it_is_pefts_own_exact_start(init, family, dtype, tmp_path):
    model_of(family, dtype).save_pretrained(tmp_path / "base", max_shard_size="12KB")
    made = svdtune.start(tmp_path / "base", lora(init, family), tmp_path / "made")
    assert (made.residual is None) == (init == "mica")
    base = AutoModelForCausalLM.from_pretrained(made.residual or tmp_path / "base", dtype="auto")
    assert base.dtype == dtype
    ours = PeftModel.from_pretrained(base, made.adapter, is_trainable=True)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logits(ours), logits(before), rtol=0, atol=8 * rounding + 1e-5)
    assert set(made.ranks.values()) == {4}
    assert made.trained == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    if (init, family) == ("olora", "gpt2"):
        return  # which PEFT cannot start
    exact = "pissa" if init.startswith("pissa") else init
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"), lora(exact, family))
    found, expected = layers(ours), layers(theirs)
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        other = expected[name]
        width = float(other.get_base_layer().weight.abs().max() + product(other).abs().max())
        close = {"rtol": 0, "atol": 2 * rounding * width + 2e-6}
        torch.testing.assert_close(product(layer), product(other), **close)
        torch.testing.assert_close(layer.get_base_layer().weight, other.get_base_layer().weight, **close)
        grads = [[p.requires_grad for p in each.parameters()] for each in (layer, other)]
        assert grads[0] == grads[1]
    untouched = set(before.state_dict()) - {f"{name.removeprefix('base_model.model.')}.weight" for name in found}
    left = base.state_dict() if made.residual is None else load_weights(made.residual)
    assert all(torch.equal(left[name], before.state_dict()[name]) for name in untouched & left.keys())


def load_weights(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("components", ["first", "middle", "last", (2, 6)], ids=str)
def test_a_loaded_model_starts_as_from_disk(components, tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    made = svdtune.start(tmp_path / "base", lora("pissa"), tmp_path / "made", components=components)
    model = svdtune.start(model_of("llama"), lora("pissa"), components=components)
    found, left = load_weights(made.adapter), load_weights(made.residual)
    for name in made.ranks:
        layer = model.get_base_model().get_submodule(name)
        A, B = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")
        A0, B0 = (found[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(B @ A, B0 @ A0, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.get_base_layer().weight, left[f"{name}.weight"], rtol=0, atol=1e-5)


def test_a_loaded_model_starts_as_peft_starts_it_after_the_same_seed():
    config = SaraConfig(r=3, target_modules=["q_proj"])
    base, other = model_of("llama"), model_of("llama")
    before = torch.get_rng_state()
    ours = svdtune.start(base, config, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    theirs = get_peft_model(other, config)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("components", ["middle", "last", (2, 6)], ids=str)
def test_a_band_leaves_the_rest_of_the_spectrum(components, tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    made = svdtune.start(tmp_path / "base", lora("pissa"), tmp_path / "made", components=components)
    whole, left = (open_checkpoint(folder) for folder in (tmp_path / "base", made.residual))
    for name in made.ranks:
        s, t = (torch.linalg.svdvals(each.weight(name).double()) for each in (whole, left))
        n = len(s)
        start = {"middle": (n - 4) // 2, "last": n - 4, (2, 6): 2}[components]
        kept = torch.cat([s[:start], s[start + 4 :], torch.zeros(4, dtype=s.dtype)])
        torch.testing.assert_close(t, kept, rtol=0, atol=1e-6)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.residual), made.adapter)
    torch.testing.assert_close(logits(ours), logits(model_of("llama")), rtol=0, atol=1e-5)


def test_stock_peft_loads_it_where_svdtune_is_not_installed(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    for init in STARTS:
        svdtune.start(tmp_path / "base", lora(init), tmp_path / init / "lora")
    new_process.start(stock_peft.save_logits, tmp_path).result()
    expected = logits(model_of("llama"))
    for init in STARTS:
        torch.testing.assert_close(torch.load(tmp_path / init / "lora.pt"), expected, rtol=0, atol=1e-5)
        text = "".join(path.read_text() for path in (tmp_path / init / "lora").rglob("*.json"))
        assert "svdtune" not in text


def test_by_the_command_line_and_a_recipe(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    recipe = {
        "model": str(tmp_path / "base"),
        "method": {"name": "lora", "r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj"]},
        "data": {"train": "rows.jsonl"},
        "training": {"learning_rate": 1e-3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    settings = ["--method", "lora", "--r", "4", "--target-modules", "q_proj", "--method.init_lora_weights", "pissa"]
    words = {
        "model": [tmp_path / "base", *settings, "--components", "last"],
        "band": [tmp_path / "base", *settings, "--components", "28:32"],
        "recipe": [tmp_path / "recipe.yaml", "--components", "last"],
    }
    written = {}
    for name, some in words.items():
        result = CliRunner().invoke(app, ["init", *map(str, some), "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert "the model without what the adapter starts with" in result.output
        written[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    for other in ("band", "recipe"):
        assert all(torch.equal(written[other][key], tensor) for key, tensor in written["model"].items())


@pytest.mark.parametrize(("given", "advised"), [("last", "last"), ("2:6", "'[2, 6]'")], ids=["word", "band"])
def test_the_command_line_names_sorsas_own_setting(given, advised, tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    words = ["init", str(tmp_path / "base"), "--components", given, "--output", str(tmp_path / "made")]
    result = CliRunner().invoke(app, words)
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2
    assert f"SORSA's in its configuration: --method.components {advised}" in said


def test_one_weight_is_there_at_a_time(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    watched = Watched(open_checkpoint(tmp_path / "base"))
    start_lora(watched.checkpoint, lora("pissa"), tmp_path / "made")
    assert (watched.read, watched.most) == (6, 0)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (lora(True), {}, "init_lora_weights='pissa', 'olora' or 'mica'; got True"),
        (lora("gaussian"), {}, "init_lora_weights='pissa', 'olora' or 'mica'; got 'gaussian'"),
        (lora("olora"), {"components": "last"}, "says which triplets PiSSA starts from, and 'olora' has its own"),
        (lora("pissa"), {"components": "best"}, "components must be one of first, middle, last, or"),
        (lora("pissa", rank_pattern={"q_proj": 2}), {"components": (0, 4)}, "stop − start = r, here 2"),
        (lora("pissa"), {"components": (0, 9)}, r"components \(0, 9\) must be \(start, stop\) with stop − start = r"),
        (lora("pissa"), {"components": (30, 34)}, "lies outside the spectrum"),
        (lora("pissa", r=17), {}, r"v_proj' \[16, 32\] has no 17 singular triplets; lower `r`"),
        (lora("pissa", use_dora=True), {}, "writes lora_A and lora_B of linear layers alone"),
        (lora("pissa", modules_to_save=["norm"]), {}, "writes lora_A and lora_B of linear layers alone"),
        (lora("pissa", bias="all"), {}, "writes lora_A and lora_B of linear layers alone"),
        (AdaLoraConfig(total_step=9), {}, "takes a SaraConfig, MoSaraConfig, SorsaConfig or LoraConfig of a new"),
        (SorsaConfig(r=2), {"components": "last"}, "give SORSA's in its configuration"),
    ],
)
def test_what_is_refused_leaves_nothing(config, more, message, tmp_path):
    tiny_llama(num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    with pytest.raises(SvdtuneError, match=message):
        svdtune.start(tmp_path / "base", config, tmp_path / "made", **more)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_weight_that_others_share_is_refused(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    with pytest.raises(SvdtuneError, match=r"'lm_head' is also '\S+', which would lose what the adapter starts with"):
        svdtune.start(tmp_path / "base", lora("pissa", target_modules=["lm_head"]), tmp_path / "made")


def test_a_shape_has_no_weights_to_start_from(tmp_path):
    with pytest.raises(SvdtuneError, match="is no folder of safetensors, and only such a checkpoint is written anew"):
        svdtune.start("llama-7b", lora("pissa"), tmp_path / "made")
