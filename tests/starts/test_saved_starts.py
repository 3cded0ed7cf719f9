"""An adapter that was started inside `fast_starts` and saved gives its outputs again, or is
refused."""

import json

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

import svdtune
from svdtune import SorsaConfig, SvdtuneError, fast_starts
from svdtune.export.source import attach_adapter
from svdtune.training.method import adapt
from tiny import moved, tiny_llama

TOKENS = torch.arange(1, 25).view(2, 12)
BANDS = ["middle", "last", (2, 6)]


@pytest.fixture
def base(tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def lora(init):
    return LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=["q_proj", "down_proj"])


def trained(base, init, components="first"):
    """A model whose adapter was saved before training, in `start`, and after, in `trained`."""
    with fast_starts(components):
        model = get_peft_model(opened(base), lora(init))
    model.save_pretrained(base.parent / "start")
    torch.manual_seed(1)
    moved(model, 0.02).save_pretrained(base.parent / "trained")
    return model


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_1", "olora"])
def test_stock_peft_finds_the_start_again(init, base, tmp_path):
    model = trained(base, init)
    again = PeftModel.from_pretrained(opened(base), tmp_path / "trained")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    svdtune.merge(tmp_path / "trained", tmp_path / "merged", check=False)
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), logits(model), rtol=0, atol=1e-5)


def test_the_configuration_given_stays_as_it_is():
    config = lora("pissa_niter_4")
    with fast_starts():
        model = get_peft_model(tiny_llama(), config)
    assert (config.init_lora_weights, model.peft_config["default"].init_lora_weights) == ("pissa_niter_4", "pissa")


@pytest.mark.parametrize("components", BANDS, ids=str)
def test_of_other_triplets_stock_peft_refuses_to_load(components, base, tmp_path):
    """It would take the first ones off the base, which gives other outputs without a word."""
    model = trained(base, "pissa", components)
    with pytest.raises(ValueError, match=r"should be 'pissa' or 'pissa_niter_\S+ .*, got pissa_"):
        PeftModel.from_pretrained(opened(base), tmp_path / "trained")
    with pytest.raises(SvdtuneError, match=r"does not find the same start again .*set init_lora_weights to true"):
        svdtune.merge(tmp_path / "trained", tmp_path / "merged", check=False)
    with fast_starts(components):
        again = PeftModel.from_pretrained(opened(base), tmp_path / "trained")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_of_other_triplets_it_is_stock_on_what_is_left(base, tmp_path):
    """As the refusal advises."""
    model = trained(base, "pissa", "last")
    expected = logits(model)
    model.unload().save_pretrained(tmp_path / "residual")
    path = tmp_path / "trained" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": True}))
    again = PeftModel.from_pretrained(opened(tmp_path / "residual"), tmp_path / "trained")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


def started_by_data(base):
    """LoRA-GA's start comes from gradients, which a saved adapter does not have."""
    model, config = opened(base), lora("lora_ga")
    config.lora_ga_config = LoraGAConfig()
    preprocess_loraga(model, config, lambda: model(input_ids=TOKENS, labels=TOKENS).loss.backward())
    return get_peft_model(model, config)


STARTED = {
    "pissa_niter_1": lambda base: get_peft_model(opened(base), lora("pissa_niter_1")),
    "lora_ga": started_by_data,
}


@pytest.mark.parametrize("init", STARTED)
def test_a_start_that_peft_does_not_find_again_is_refused(init, base, tmp_path):
    """PEFT loads both without a word, and gives other outputs."""
    torch.manual_seed(0)
    model = STARTED[init](base)
    model.save_pretrained(tmp_path / "start")
    moved(model, 0.02).save_pretrained(tmp_path / "trained")
    assert (logits(PeftModel.from_pretrained(opened(base), tmp_path / "trained")) - logits(model)).abs().max() > 1e-3
    words = f"init_lora_weights='{init}' .*PEFT does not find the same start again.*--start BEFORE"
    with pytest.raises(SvdtuneError, match=words):
        svdtune.merge(tmp_path / "trained", tmp_path / "merged")
    with pytest.raises(SvdtuneError, match=words):
        attach_adapter(opened(base), tmp_path / "trained")
    with pytest.raises(
        SvdtuneError, match=rf"init_lora_weights='{init}'.*To have one, name the adapter as it was before"
    ):
        svdtune.export_lora(tmp_path / "trained", tmp_path / "lora")
    svdtune.export_lora(tmp_path / "trained", tmp_path / "lora", start=tmp_path / "start")  # as both advise
    again = PeftModel.from_pretrained(opened(base), tmp_path / "lora")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_what_has_no_start_that_comes_off(base, tmp_path):
    trained(base, "pissa")
    start, out = tmp_path / "start", tmp_path / "out"
    moved(opened(base)).save_pretrained(tmp_path / "tuned")
    with pytest.raises(SvdtuneError, match="tuned is a tuned model, which has no start to take off; got start="):
        svdtune.export_lora(tmp_path / "tuned", out, base=base, rank=2, start=start)
    get_peft_model(opened(base), SorsaConfig(r=2)).save_pretrained(tmp_path / "sorsa")
    with pytest.raises(SvdtuneError, match="is SORSA, which leaves its base's weights as they are"):
        svdtune.export_lora(tmp_path / "sorsa", out, start=start)
    path = tmp_path / "trained" / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}})
    )
    with pytest.raises(SvdtuneError, match="started by LoftQ, which leaves quantized weights"):
        svdtune.export_lora(tmp_path / "trained", out, start=start)
    with pytest.raises(SvdtuneError, match=r"--rank N --output FOLDER`$"):
        svdtune.export_lora(tmp_path / "trained", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("init", "components"),
    [("pissa", "first"), ("pissa_niter_1", "first"), ("olora", "first"), ("pissa", "last")],
    ids=str,
)
def test_less_its_start_it_is_a_lora_on_the_base(init, components, base, tmp_path):
    model = trained(base, init, components)
    svdtune.export_lora(tmp_path / "trained", tmp_path / "lora", start=tmp_path / "start")
    again = PeftModel.from_pretrained(opened(base), tmp_path / "lora")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    assert again.peft_config["default"].base_model_name_or_path == str(base)


def test_with_its_start_it_is_no_change_of_the_base(base, tmp_path):
    trained(base, "pissa")
    words = "has init_lora_weights='pissa', so it belongs on weights that its start was taken off.* --start BEFORE"
    for write in (
        lambda: svdtune.export_lora(tmp_path / "trained", tmp_path / "out", error=0.1),
        lambda: svdtune.export_lora(tmp_path / "trained", tmp_path / "out", to="gguf"),
        lambda: svdtune.combine({tmp_path / "trained": 1.0}, tmp_path / "out"),
    ):
        with pytest.raises(SvdtuneError, match=words):
            write()
    assert not (tmp_path / "out").exists()


def test_training_starts_exactly():
    options = {"r": 4, "init_lora_weights": "pissa_niter_1", "target_modules": ["q_proj"]}
    ours = adapt(tiny_llama(), "lora", options)
    theirs = get_peft_model(
        tiny_llama(), LoraConfig(**options | {"init_lora_weights": "pissa", "task_type": "CAUSAL_LM"})
    )
    assert ours.peft_config["default"].init_lora_weights == "pissa"
    for name, weight in theirs.get_base_model().named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(ours.get_base_model().get_parameter(name), weight, rtol=0, atol=1e-5)
