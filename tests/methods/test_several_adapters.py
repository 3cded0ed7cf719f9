"""Several adapters on one model: what works, and where PEFT or the methods refuse."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.export.lora import export_lora
from tiny import tiny_llama as base

TOKENS = torch.arange(1, 25).view(2, 12)


def sorsa(*targets):
    return SorsaConfig(r=4, target_modules=list(targets or ["q_proj"]), task_type="CAUSAL_LM")


def mosara(*targets):
    config = MoSaraConfig(r=4, num_heads=1, target_modules=list(targets or ["q_proj"]), task_type="CAUSAL_LM")
    return config


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


class TestOneMethod:
    def test_an_adapter_is_renamed_by_loading_it_under_another_name(self, tmp_path):
        model = move(get_peft_model(base(), sorsa(), adapter_name="old")).eval()
        before = logits(model)
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path / "old", "new")
        model.set_adapter("new")
        model.delete_adapter("old")
        assert list(model.peft_config) == ["new"]
        assert torch.equal(logits(model), before)

    def test_two_active_at_once_add_up(self):
        model = move(get_peft_model(base(), sorsa())).eval()
        first = logits(model)
        model.add_adapter("second", sorsa("up_proj"))
        model.set_adapter("second")
        move(model)
        model.base_model.set_adapter(["default", "second"])
        together = logits(model)
        assert not torch.allclose(together, first, atol=1e-4)
        merged = model.merge_and_unload(adapter_names=["default", "second"])
        assert torch.allclose(logits(merged), together, atol=1e-5)

    def test_a_weighted_sum_names_the_command(self):
        model = get_peft_model(base(), sorsa())
        with pytest.raises(SvdtuneError, match=r"`svdtune combine first=0\.7 second=0\.3 --output combined`"):
            model.add_weighted_adapter(["default"], [1.0], "sum")


class TestTwoMethods:
    @pytest.mark.usefixtures("transformers_takes_peft")
    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    def test_on_different_layers(self, tmp_path):
        """Through Transformers' own add_adapter: switching, disabling, saving, deleting; each file
        loads alone."""
        model = base()
        alone = logits(model)
        model.add_adapter(sorsa("q_proj"), "first")
        model.add_adapter(mosara("v_proj"), "second")
        expected = {}
        for name in ("first", "second"):
            model.set_adapter(name)
            expected[name] = logits(move(model))
            model.save_pretrained(tmp_path / name)
            assert not torch.allclose(expected[name], alone, atol=1e-4)
        for name in ("first", "second"):
            model.set_adapter(name)
            assert torch.equal(logits(model), expected[name])
            loaded = PeftModel.from_pretrained(base(), tmp_path / name).eval()
            assert torch.allclose(logits(loaded), expected[name], atol=1e-6)
        model.disable_adapters()
        assert torch.equal(logits(model), alone)
        model.enable_adapters()
        model.delete_adapter("first")
        model.set_adapter("second")
        assert torch.equal(logits(model), expected["second"])

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    @pytest.mark.parametrize("way", ["nested", "transformers"])
    def test_on_one_layer_is_refused(self, way, request):
        model = base()
        match = r"layer '\S*q_proj' has a SORSA adapter, and a Mo-SARA adapter cannot .* Exported to LoRA"
        if way == "nested":
            model = get_peft_model(model, sorsa())
            with pytest.warns(UserWarning, match="second time"), pytest.raises(SvdtuneError, match=match):
                get_peft_model(model, mosara())
        else:
            request.getfixturevalue("transformers_takes_peft")
            model.add_adapter(sorsa(), "first")
            with pytest.raises(SvdtuneError, match=match):
                model.add_adapter(mosara(), "second")
        found = {type(module).__name__ for module in model.modules() if isinstance(module, BaseTunerLayer)}
        assert found == {"SorsaLinear"}

    def test_in_one_peft_model_is_refused(self, tmp_path):
        get_peft_model(base(), mosara()).save_pretrained(tmp_path)
        model = move(get_peft_model(base(), sorsa())).eval()
        before = logits(model)
        match = "Cannot combine adapters with different peft types"
        for add in (lambda: model.add_adapter("b", mosara()), lambda: model.load_adapter(tmp_path, "b")):
            with pytest.raises(ValueError, match=match):
                add()
        with pytest.raises(ValueError, match=match):
            get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).add_adapter("b", mosara())
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), before)

    def test_the_way_round(self, tmp_path):
        """Exported to LoRA they stand on the same layers of one model, and are chosen for each
        sample."""
        expected = []
        for name, config in (("first", sorsa()), ("second", SaraConfig(r=3, target_modules=["q_proj"]))):
            model = move(get_peft_model(base(), config)).eval()
            expected.append(logits(model))
            model.save_pretrained(tmp_path / name)
            export_lora(tmp_path / name, tmp_path / f"{name}-lora")
        model = PeftModel.from_pretrained(base(), tmp_path / "first-lora", adapter_name="first").eval()
        model.load_adapter(tmp_path / "second-lora", "second")
        with torch.no_grad():
            mixed = model(input_ids=TOKENS, adapter_names=["first", "second"]).logits
        assert torch.allclose(mixed[0], expected[0][0], atol=1e-5)
        assert torch.allclose(mixed[1], expected[1][1], atol=1e-5)


class TestWherePeftKnowsAFixedList:
    def test_mixed_models(self):
        with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
            get_peft_model(base(), sorsa(), mixed=True)

    def test_hotswap(self, tmp_path):
        model = get_peft_model(base(), sorsa())
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Hotswapping only supports LORA but SORSA was passed"):
            hotswap_adapter(model, tmp_path, "default")


@pytest.mark.usefixtures("transformers_takes_peft")
def test_transformers_saves_over_an_earlier_adapter(tmp_path):
    """It writes the configuration before the weights, so what lies there then must not be taken for
    what is saved."""
    model = base()
    model.add_adapter(sorsa(), "first")
    for _ in range(2):
        move(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
        assert torch.equal(logits(loaded), logits(model))
