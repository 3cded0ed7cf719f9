"""Layers that no pass calls, factors without a gradient and a regularizer that nobody attached are
said once, by name."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import Trainer, TrainingArguments

from svdtune import (
    MoSaraConfig,
    SaraConfig,
    SorsaConfig,
    SorsaRegularizer,
    SvdtuneWarning,
    add_regularizer_gradients,
    regularize,
)
from tiny import tiny_llama

CONFIGS = {
    "sara": lambda **s: SaraConfig(r=2, **s),
    "mosara": lambda **s: MoSaraConfig(r=2, num_heads=2, **s),
    "sorsa": lambda **s: SorsaConfig(r=2, gamma=0, **s),
}
LAYERS = {
    "linear": lambda: nn.Linear(6, 6),
    "bf16": lambda: nn.Linear(6, 6, dtype=torch.bfloat16),
    "convolution": lambda: nn.Conv1d(6, 6, 1),
}


class Net(nn.Module):
    """A layer that is called, one of some kind that is read at most, and two experts of which the
    first is used."""

    def __init__(self, make):
        super().__init__()
        self.used, self.aside = nn.Linear(6, 6), make()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        return self.experts[0](torch.tanh(self.used(x)))


def said(call) -> list[str]:
    """The warnings of ours that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, SvdtuneWarning)]


def step(model, optimizer=None, loss=lambda model: model(torch.ones(3, 6)).square().sum()):
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss(model).backward()
    optimizer.step()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_no_pass_calls_is_named_once(method, kind):
    config = CONFIGS[method](target_modules=["used", "aside", "0", "1"])
    model = get_peft_model(Net(LAYERS[kind]), config)
    (message,) = said(lambda: model(torch.ones(3, 6)))
    assert "did not call aside," in message
    assert said(lambda: model(torch.ones(3, 6))) == []
    (message,) = said(lambda: step(model))
    assert "aside." in message
    assert "used" not in message
    assert "experts" not in message
    assert said(lambda: step(model)) == []


@pytest.mark.parametrize("method", CONFIGS)
def test_layers_that_are_all_used_are_not_spoken_of(method):
    model = get_peft_model(tiny_llama(), CONFIGS[method](target_modules="all-linear"))
    tokens = torch.arange(12)[None]
    assert said(lambda: step(model, loss=lambda model: model(input_ids=tokens, labels=tokens).loss)) == []


@pytest.mark.parametrize("method", CONFIGS)
def test_a_factor_that_the_loss_does_not_reach_is_named(method):
    model = get_peft_model(Net(LAYERS["linear"]), CONFIGS[method](target_modules=["used", "0"]))
    cut = model.base_model.model.used.register_forward_hook(lambda module, x, y: y.detach())
    (message,) = said(lambda: step(model))
    assert "used." in message
    assert "had no gradient" in message
    cut.remove()
    assert said(lambda: step(model)) == []


@pytest.mark.parametrize("method", CONFIGS)
def test_neither_unloading_nor_a_copy_leaves_a_hook(method):
    model = get_peft_model(Net(LAYERS["linear"]), CONFIGS[method](target_modules=["used", "aside"]))
    copied = copy.deepcopy(model)
    assert not model.unload()._forward_hooks
    (message,) = said(lambda: copied(torch.ones(3, 6)))
    assert "aside" in message
    assert not copied.unload()._forward_hooks


def test_compiled_layers_are_not_accused():
    model = get_peft_model(Net(LAYERS["linear"]), CONFIGS["sara"](target_modules=["used", "0"]))
    model.base_model.model.used.compile(backend="eager")
    assert said(lambda: model(torch.ones(3, 6))) == []


def sorsa_net(gamma=1e-3, put=get_peft_model):
    return put(Net(LAYERS["linear"]), SorsaConfig(r=2, gamma=gamma, target_modules=["used", "0"]))


@pytest.mark.parametrize("put", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_loop_without_the_regularizer_is_told_once(put, optimizer):
    model = sorsa_net(put=put)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    (message,) = said(lambda: step(model, optimizer))
    assert "without its regularizer" in message
    assert "used" in message
    assert said(lambda: step(model, optimizer)) == []


def test_regularized_and_unregularized_by_choice_are_not_told():
    assert said(lambda: step(sorsa_net(gamma=0))) == []
    model = sorsa_net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    regularize(optimizer, model)
    assert said(lambda: step(model, optimizer)) == []
    model = sorsa_net()
    add_regularizer_gradients(model, 1e-3)
    assert said(lambda: step(model)) == []


@pytest.mark.parametrize("callbacks", [[], [SorsaRegularizer]])
def test_a_trainer_is_told_unless_it_has_the_callback(callbacks, tmp_path):
    model = get_peft_model(tiny_llama(), SorsaConfig(r=2, target_modules=["q_proj"]))
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 2
    settings = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[callback() for callback in callbacks])
    messages = said(trainer.train)
    assert len(messages) == (not callbacks)
    assert all("without its regularizer" in message for message in messages)
