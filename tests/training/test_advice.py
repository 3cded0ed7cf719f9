"""Advice on batch settings follows the work of a pass."""

from peft import get_peft_model
from torch import nn

from svdtune import SaraConfig
from svdtune.training.compilation import launch_bound


def model(width: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(width, width, bias=False))
    return get_peft_model(net, SaraConfig(r=1, target_modules=["0"], init="zero_v"))


def test_small_batches_of_a_small_model():
    sentence = launch_bound(model(100), batch_size=2, tokens=100.0)
    assert "2 rows of about 100 tokens" in sentence
    assert "training.batch_size: 4000 " in sentence  # 4e9 / (100 tokens × 100 × 100)


def test_no_advice_where_arithmetic_is_enough_or_nothing_is_adapted():
    assert launch_bound(model(100), batch_size=4000, tokens=100.0) is None
    assert launch_bound(nn.Linear(3, 3), batch_size=1, tokens=1.0) is None
