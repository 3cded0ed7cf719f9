"""What cannot be adapted, loaded or merged is refused by name."""

import pytest
import torch
from peft import get_peft_model
from test_peft_verbs import TOKENS, adapted, layers, model_of

from svdtune import SaraConfig, SorsaConfig, SvdtuneError


class TestClearErrors:
    def test_rank_larger_than_a_layer(self):
        model = model_of("llama")
        with pytest.raises(
            SvdtuneError, match=r"r = 20 is larger than layer 'model.layers.0.self_attn.k_proj' \[16, 32\]"
        ):
            get_peft_model(model, SorsaConfig(r=20))
        assert not layers(model)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, bad):
        model = model_of("llama")
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
        with pytest.raises(SvdtuneError, match=r"model.layers.1.mlp.up_proj.*NaN or infinity"):
            get_peft_model(model, SorsaConfig(r=4))
        assert not layers(model)

    def test_a_module_that_is_no_linear_layer(self):
        with pytest.raises(SvdtuneError, match=r"'model.embed_tokens' is a Embedding; .* `exclude_modules`"):
            get_peft_model(model_of("llama"), SorsaConfig(r=4, target_modules=["embed_tokens"]))

    def test_a_projection_that_is_never_called(self):
        model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 16))
        with pytest.raises(
            SvdtuneError, match=r"'0.self_attn.out_proj' is the output projection of a torch.nn.Multihead"
        ):
            get_peft_model(model, SorsaConfig(r=4, target_modules=["out_proj", "linear1"]))
        get_peft_model(model, SorsaConfig(r=4, target_modules=["linear1", "linear2"]))

    def test_a_threshold_without_weights(self):
        with pytest.raises(SvdtuneError, match="low_cpu_mem_usage=True reads no weights"):
            get_peft_model(model_of("llama"), SaraConfig(), low_cpu_mem_usage=True)

    def test_a_saved_configuration_without_its_weights(self, tmp_path):
        adapted("sorsa").save_pretrained(tmp_path)
        model = get_peft_model(model_of("llama"), SorsaConfig.from_pretrained(tmp_path))
        with pytest.raises(SvdtuneError, match=r"adapter 'default' has no values: .*initialized=False"):
            model(input_ids=TOKENS)

    def test_a_saved_configuration_for_another_model(self, tmp_path):
        adapted("sara").save_pretrained(tmp_path)
        config = SaraConfig.from_pretrained(tmp_path)
        for targets, message in (
            (
                {"o_proj"},
                r"no layer 'model.layers.0.self_attn.q_proj' to adapt \(4 of the adapter's 4 layers are missing\)",
            ),
            ({"q_proj", "v_proj", "o_proj"}, r"no rank for 'model.layers.0.self_attn.o_proj' \(2 layers in all\)"),
        ):
            config.target_modules = targets
            with pytest.raises(SvdtuneError, match=message):
                get_peft_model(model_of("llama"), config)

    def test_a_merge_that_is_not_finite(self):
        model = adapted("sorsa")
        layers(model)[0].sorsa_s["default"].data.fill_(float("inf"))
        with pytest.raises(SvdtuneError, match="NaN or infinity"):
            model.merge_and_unload(safe_merge=True)
