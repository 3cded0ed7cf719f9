"""Registering with PEFT: the enum member, harmless repetition, and giving way to a method PEFT has
itself."""

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from svdtune import MoSaraConfig, MoSaraModel, SaraConfig, SaraModel, SorsaConfig, SorsaModel, SvdtuneWarning
from svdtune.methods.registration import register

METHODS = [(SaraConfig, SaraModel), (MoSaraConfig, MoSaraModel), (SorsaConfig, SorsaModel)]


@pytest.mark.parametrize(("config", "tuner"), METHODS)
def test_peft_knows_the_method(config, tuner):
    member = PeftType(config.method.upper())
    assert member is getattr(PeftType, config.method.upper())
    assert member in list(PeftType)
    assert member == config.method.upper()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is tuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == tuner.prefix == f"{config.method}_"


@pytest.mark.parametrize(("config", "tuner"), METHODS)
def test_registering_again_changes_nothing(config, tuner):
    before = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register(config, tuner)
    assert (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def test_pefts_own_method_stays():
    class LoraConfig(SaraConfig):
        method = "lora"

    own = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    with pytest.warns(SvdtuneWarning, match="PEFT has a method named 'lora' of its own"):
        register(LoraConfig, SaraModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is own
