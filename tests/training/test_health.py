"""Trouble in numbers is told of once each."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from operations import Operations
from svdtune import SorsaConfig
from svdtune.methods.sorsa.regularizer import sorsa_layers
from svdtune.training.health import WatchNumbers


@pytest.fixture
def model() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Linear(12, 10)), SorsaConfig(r=4, target_modules=["0"]))


def told(model: nn.Module, caplog: pytest.LogCaptureFixture, fp16: bool = False, **logs: float) -> list[str]:
    watch = WatchNumbers()
    given: Any = SimpleNamespace(fp16=fp16)
    with caplog.at_level(logging.WARNING, "svdtune"):
        for step in (1, 2):
            state: Any = SimpleNamespace(global_step=step)
            watch.on_log(given, state, given, logs={"loss": 1.0, "grad_norm": 1.0} | logs, model=model)
    return [record.message for record in caplog.records]


def test_nothing_to_tell(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    assert told(model, caplog) == []
    assert told(nn.Linear(2, 2), caplog) == []


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(model: nn.Module, caplog: pytest.LogCaptureFixture, name: str, value: float) -> None:
    (sentence,) = told(model, caplog, **{name: value})
    assert sentence.startswith(
        f"step 1: {name} is {value}; what is trained from here on is lost. Start again with a lower"
    )


def test_a_scaler_that_looks_for_its_scale_is_no_trouble(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    assert told(model, caplog, fp16=True, grad_norm=float("inf")) == []


def test_factors_that_come_apart(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        sorsa_layers(model)[0].adapter_tensor("sorsa_U", "default").mul_(2)
    (sentence,) = told(model, caplog)
    assert sentence.startswith(
        "step 1: 1 of SORSA's 2 factors are no longer near orthonormal, ‖MᵀM − I‖/√r up to 3.00: raise"
    )


@pytest.mark.parametrize("blocks", [1, 8])
def test_a_look_takes_few_operations_however_many_layers(blocks: int, caplog: pytest.LogCaptureFixture) -> None:
    sizes = [nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 12)] * blocks
    model = get_peft_model(nn.Sequential(*sizes), SorsaConfig(r=4, target_modules=[str(i) for i in range(3 * blocks)]))
    operations = Operations()
    with operations:
        assert told(model, caplog) == []
    assert operations.count < 2 * 25


def test_factors_that_are_no_numbers(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        sorsa_layers(model)[0].adapter_tensor("sorsa_U", "default").fill_(float("nan"))
    (sentence,) = told(model, caplog)
    assert "1 of SORSA's 2 factors are no longer near orthonormal, ‖MᵀM − I‖/√r up to inf" in sentence


def test_singular_values_that_cross_zero(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    values = sorsa_layers(model)[0].adapter_tensor("sorsa_s", "default")
    with torch.no_grad():
        values[3] = 0.0  # where a weight starts when its rank is below r
    assert told(model, caplog) == []
    with torch.no_grad():
        values[2] = -0.1
    (sentence,) = told(model, caplog)
    assert sentence.startswith("step 1: 1 of SORSA's 4 singular values have fallen below 0: U and V now carry its sign")
