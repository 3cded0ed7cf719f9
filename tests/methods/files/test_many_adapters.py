"""`load_adapters` puts on what `model.load_adapter` does, with the same checks."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError, load_adapters
from tiny import tiny_gpt2, tiny_llama

CONFIGS = {
    "sara": (tiny_llama, SaraConfig, {"target_modules": ["q_proj"]}),
    "sorsa": (tiny_llama, SorsaConfig, {"target_modules": ["q_proj"]}),
    "mosara": (tiny_llama, MoSaraConfig, {"target_modules": ["q_proj"]}),
    "compact": (tiny_llama, MoSaraConfig, {"target_modules": ["q_proj"], "compact": True}),
    "fused": (tiny_gpt2, MoSaraConfig, {"target_modules": ["c_attn"], "fused_slices": "auto"}),
}
TOKENS = torch.arange(1, 13).view(2, 6)


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def saved(request, tmp_path):
    """A model, and two adapters of it in the folders "a" and "b"."""
    base, kind, settings = CONFIGS[request.param]
    for name in "ab":
        moved(get_peft_model(base(), kind(r=3, **settings))).save_pretrained(tmp_path / name)
    return base, tmp_path


def every(configs=CONFIGS):
    return pytest.mark.parametrize("saved", configs, indirect=True)


@every()
def test_outputs_are_those_of_pefts_own_loading(saved):
    base, folder = saved
    model = PeftModel.from_pretrained(base(), folder / "a").eval()
    assert load_adapters(model, {"second": folder / "b", "third": str(folder / "a")}) == ["second", "third"]
    theirs = PeftModel.from_pretrained(base(), folder / "a").eval()
    theirs.load_adapter(folder / "b", "second")
    theirs.load_adapter(folder / "a", "third")
    assert not [name for name, tensor in model.named_parameters() if tensor.requires_grad or tensor.is_meta]
    assert set(model.state_dict()) == set(theirs.state_dict())
    for name in ("default", "second", "third"):
        for one in (model, theirs):
            one.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, theirs(TOKENS).logits)
    model.save_pretrained(folder / "again")
    assert load_file(folder / "again" / "second" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("kind", [SaraConfig, SorsaConfig, MoSaraConfig])
def test_an_adapter_in_half_precision_is_loaded_in_fp32(kind, tmp_path):
    config = kind(r=2, target_modules=["q_proj"])
    half = get_peft_model(tiny_llama(num_hidden_layers=1).bfloat16(), config, autocast_adapter_dtype=False)
    moved(half).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1).bfloat16(), tmp_path)
    load_adapters(model, {"second": tmp_path})
    of = {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".default", ".second"))}
    assert {tensor.dtype for tensor in of.values()} == {torch.float32}
    for name, tensor in of.items():
        assert torch.equal(tensor, of[name.replace(".second", ".default")])


@pytest.mark.parametrize("kind", [SorsaConfig, MoSaraConfig])
def test_frozen_factors_stay_shared_and_a_model_of_several_is_saved(kind, tmp_path):
    def several():
        model = get_peft_model(tiny_llama(num_hidden_layers=1), kind(r=2, target_modules=["q_proj"]))
        model.add_adapter("second", kind(r=2, target_modules=["q_proj"]))
        return model

    model = moved(several())
    model.save_pretrained(tmp_path)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for name, folder in {"default": tmp_path, "second": tmp_path / "second"}.items():
        model.load_adapter(folder, name)
        for part in layer.frozen:
            assert getattr(layer, part)["default"] is getattr(layer, part)["second"]
    save_model(model, str(tmp_path / "all.safetensors"))
    again = several()
    load_model(again, tmp_path / "all.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [SaraConfig, SorsaConfig, MoSaraConfig])
def test_set_adapter_of_several_keeps_values_and_trains_the_chosen_one_alone(kind, dtype, tmp_path):
    """The frozen factors that they share belong to every adapter, and to no gradient."""

    def base():
        return tiny_llama(num_hidden_layers=1).to(dtype)

    moved(get_peft_model(base(), kind(r=2, target_modules=["q_proj"]))).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path)
    model.load_adapter(tmp_path, "second")
    load_adapters(model, {"third": tmp_path, "fourth": tmp_path})
    names = ("default", "second", "third", "fourth")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    loaded = {name: tensor.clone() for name, tensor in layer.state_dict(keep_vars=True).items()}
    for chosen in ("third", "default", "fourth", "second"):
        model.set_adapter(chosen)
        held = layer.state_dict(keep_vars=True)
        assert held.keys() == loaded.keys()
        assert all(tensor.dtype == loaded[name].dtype for name, tensor in held.items())
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in held.items())
        for part in layer.frozen:
            assert {id(getattr(layer, part)[name]) for name in names} == {id(getattr(layer, part)[chosen])}
        model.zero_grad()
        model(TOKENS).logits.square().mean().backward()
        own = {id(layer.adapter_tensor(part, chosen)) for part in layer.trained}
        given = [parameter for parameter in model.parameters() if parameter.grad is not None]
        assert {id(parameter) for parameter in given if parameter.grad.any()} == own
        assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == own


@pytest.mark.parametrize("split", ["first", "second"])
def test_a_split_adapter_stands_alone(split, tmp_path):
    for name in ("first", "second"):
        model = get_peft_model(tiny_llama(num_hidden_layers=1), SorsaConfig(r=2, target_modules=["q_proj"]))
        model.peft_config["default"].layout = "split" if name == split else "delta"
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), tmp_path / "first")
    with pytest.raises(SvdtuneError, match=r"layout='split'.* no second adapter can stand on that layer"):
        load_adapters(model, {"second": tmp_path / "second"})
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if name.endswith(".second")]


@every(["mosara"])
def test_other_layers_and_whole_modules_go_pefts_way(saved):
    base, folder = saved
    others = MoSaraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"])
    moved(get_peft_model(base(), others)).save_pretrained(folder / "c")
    model = PeftModel.from_pretrained(base(), folder / "a").eval()
    load_adapters(model, {"c": folder / "c", "b": folder / "b"})
    alone = PeftModel.from_pretrained(base(), folder / "c").eval()
    model.set_adapter("c")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, alone(TOKENS).logits)


@every(["mosara", "compact"])
class TestRefusedAsOne:
    def refused(self, model, name, folder, match):
        keys = set(model.state_dict())
        with pytest.raises(SvdtuneError, match=match):
            load_adapters(model, {name: folder})
        assert set(model.state_dict()) == keys
        assert list(model.peft_config) == ["default"]

    @pytest.mark.parametrize("name", ["default", "a.b", ""], ids=["taken", "dot", "empty"])
    def test_names(self, saved, name):
        base, folder = saved
        model = PeftModel.from_pretrained(base(), folder / "a")
        self.refused(model, name, folder / "b", rf"cannot be loaded as '{name}'.* Give another name, or delete_adapter")

    def test_another_base(self, saved):
        base, folder = saved
        with torch.no_grad():
            other = base()
            other.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
        moved(get_peft_model(other, MoSaraConfig(r=3, target_modules=["q_proj"]))).save_pretrained(folder / "c")
        model = PeftModel.from_pretrained(base(), folder / "a")
        self.refused(model, "c", folder / "c", r"made from another base model: the weight of 'model\.layers\.1\.")

    def test_a_file_that_was_altered(self, saved):
        base, folder = saved
        model = PeftModel.from_pretrained(base(), folder / "a")
        path = folder / "b" / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
        self.refused(model, "b", folder / "b", "is not the file that was saved with this adapter")

    def test_values_that_are_not_finite(self, saved):
        base, folder = saved
        model = PeftModel.from_pretrained(base(), folder / "a")
        other = PeftModel.from_pretrained(base(), folder / "b")
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            other.base_model.model.model.layers[1].self_attn.q_proj.mosara_v["default"].fill_(float("nan"))
            patch.setenv("SVDTUNE_FINITE_CHECK", "off")
            other.save_pretrained(folder / "c")
        self.refused(model, "c", folder / "c", "the adapter is not loaded: its .*mosara_v holds NaN")
