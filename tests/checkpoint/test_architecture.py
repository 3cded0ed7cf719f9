"""The class that a model without weights is built in."""

import json

import pytest
import torch
import transformers as tf
from transformers import dynamic_module_utils

from svdtune.checkpoint import open_checkpoint
from svdtune.checkpoint.architecture import build_model
from svdtune.errors import SvdtuneError
from tiny import LLAMA, tiny_llama

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(
    ("saved_from", "asked", "built"),
    [
        (["LlamaForSequenceClassification"], None, "LlamaForSequenceClassification"),
        (["LlamaModel"], None, "LlamaForCausalLM"),
        (["LlamaModel"], "LlamaModel", "LlamaModel"),
        (["LlamaForCausalLM"], "AutoModel", "LlamaModel"),
        (["LlamaForCausalLM"], "NobodyKnows", "LlamaForCausalLM"),
        (["NobodyKnowsForCausalLM"], None, "LlamaForCausalLM"),
        (None, None, "LlamaForCausalLM"),
    ],
)
def test_a_language_model(saved_from, asked, built):
    model = build_model(tf.LlamaConfig(**LLAMA, architectures=saved_from), asked)
    assert type(model).__name__ == built
    assert not model.training
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("saved_from", "built"), [("T5EncoderModel", "T5EncoderModel"), (None, "T5Model")])
def test_a_kind_without_causal_language_models(saved_from, built):
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 4, "num_layers": 1, "vocab_size": 60}
    config = tf.T5Config(**sizes, architectures=saved_from and [saved_from])
    assert type(build_model(config)).__name__ == built


def test_code_of_the_folder_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, model = tmp_path / "model", tiny_llama()
    model.save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        SvdtuneError, match=r"config\.json describes no model that can be built: .*contains custom code"
    ):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, trust_remote_code=True)
    assert type(checkpoint.model).__name__ == "OwnForCausalLM"
    assert checkpoint.has_weights
    assert torch.equal(checkpoint.weight("lm_head"), model.lm_head.weight)


def with_architectures(folder, architectures):
    tiny_llama().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": architectures}))
    return folder


@pytest.mark.parametrize("architectures", [[], None, ["LlamaConfig"], "LlamaForCausalLM"])
def test_a_name_that_is_no_model_is_passed_over(architectures, tmp_path):
    checkpoint = open_checkpoint(with_architectures(tmp_path, architectures))
    assert type(checkpoint.model) is tf.LlamaForCausalLM


@pytest.mark.parametrize("architectures", [[3], 3, ["ForcedBOSTokenLogitsProcessor"]])
def test_a_damaged_name_is_refused(architectures, tmp_path):
    with pytest.raises(SvdtuneError, match="describes no model that can be built"):
        open_checkpoint(with_architectures(tmp_path, architectures))
