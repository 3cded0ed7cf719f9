"""An output head that has the embeddings' weight: it can be adapted, and the embeddings stay as
they are, merged too."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft_verbs import CONFIGS, MERGEABLE, logits, move

from tiny import tiny_gpt2, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def model_of(family: str):
    return tiny_gpt2(n_layer=1) if family == "gpt2" else tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)


def adapted(family: str, name: str):
    cls, own = CONFIGS[name]
    model = get_peft_model(model_of(family), cls(**own, target_modules=["lm_head"], task_type="CAUSAL_LM")).eval()
    return move(model, 0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_tied_head(name, family, tmp_path):
    base = model_of(family)
    want, embeddings = logits(base), base.get_input_embeddings().weight.clone()
    model = adapted(family, name)
    after = logits(model)
    assert not torch.allclose(after, want, atol=1e-3)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model_of(family), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), after)
    if name not in MERGEABLE:
        return
    model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert torch.allclose(logits(model), after, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), after)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().get_base_layer().weight
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(again), after, atol=1e-5)
    assert torch.equal(again.get_input_embeddings().weight, embeddings)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unloading_ties_again(family):
    base = model_of(family)
    want = logits(base)
    got = adapted(family, "sorsa").unload()
    assert got.get_input_embeddings().weight is got.get_output_embeddings().weight
    assert torch.equal(logits(got), want)
