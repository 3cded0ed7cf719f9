"""No weight of the base changes, in any bit, except by a merge: methods × kinds of layer × what is
done with adapters."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft_verbs import CONFIGS, MERGEABLE, TOKENS, config_of, logits, model_of, move

from svdtune.methods.layers.base import SvdLayer

KINDS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "slices": ("gpt2", {"target_modules": ["c_attn"], "fused_slices": {"c_attn": ["q", "v"]}}),
}


def base_weights(model) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a model but those of adapters, by their names before anything was
    adapted."""
    adapters = {id(p) for layer in model.modules() if isinstance(layer, SvdLayer) for p in own_parameters(layer)}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in adapters:
            found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor.detach().clone()
    return found


def own_parameters(layer: SvdLayer) -> list[torch.nn.Parameter]:
    return [p for name in (*layer.trained, *layer.frozen) for p in getattr(layer, name).values()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def a_step(model) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.eval()


def disabled(model) -> None:
    with model.disable_adapter():
        logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_no_weight_of_the_base_changes_except_by_a_merge(name, kind, dtype, tmp_path):
    family, settings = KINDS[kind]
    untouched = base_weights(model_of(family, dtype))
    model = move(get_peft_model(model_of(family, dtype), config_of(name, **settings)), 0.1).eval()
    model.save_pretrained(tmp_path)
    verbs = {
        "start": lambda: None,
        "forward": lambda: logits(model),
        "train": lambda: a_step(model),
        "disable": lambda: disabled(model),
        "add": lambda: model.add_adapter("second", config_of(name, **settings)),
        "switch": lambda: model.set_adapter("second"),
        "both at once": lambda: model.base_model.set_adapter(["default", "second"]),
        "forward of both": lambda: logits(model),
        "load over itself": lambda: model.load_adapter(tmp_path, "default", is_trainable=True),
        "load under a name twice": lambda: [model.load_adapter(tmp_path, "third") for _ in range(2)],
        "switch again": lambda: model.set_adapter("third"),
        "delete": lambda: model.delete_adapter("second"),
        "switch back": lambda: model.set_adapter("default"),
        "delete the other": lambda: model.delete_adapter("third"),
        "save": lambda: model.save_pretrained(tmp_path / "again"),
    }
    for verb, act in verbs.items():
        act()
        assert same(base_weights(model), untouched), verb
    if name in MERGEABLE:
        model.merge_adapter()
        assert not same(base_weights(model), untouched)
        model.unmerge_adapter()
        assert same(base_weights(model), untouched)
    assert same(base_weights(model.unload()), untouched)


@pytest.mark.parametrize("name", CONFIGS)
def test_nor_does_loading(name, tmp_path):
    base = model_of("llama")
    move(get_peft_model(base, config_of(name)), 0.1).save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(model_of("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert same(base_weights(loaded), base_weights(model_of("llama")))
        assert same(base_weights(loaded.unload()), base_weights(model_of("llama")))
