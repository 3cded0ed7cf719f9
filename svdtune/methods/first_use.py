"""Warnings about the first passes and the first training step of an adapter, each given once: the
model calls some adapted layers never, factors get no gradient, SORSA is trained without its
regularizer, or SARA does not start at the reference.

None of these is an error for certain, and none shows in a loss curve. A hook on the model watches a
pass and then removes itself. PyTorch's hook on every optimizer watches the step.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from svdtune.errors import SvdtuneWarning
from svdtune.methods.layers.base import SvdLayer

SHOWN = 3

# The layers whose adapters have not been trained a step yet, with their names.
_unstepped: WeakKeyDictionary[SvdLayer[Any], str] = WeakKeyDictionary()
_looked_at: WeakSet[torch.optim.Optimizer] = WeakSet()


def watch_first_use(model: nn.Module, layers: Mapping[str, SvdLayer[Any]]) -> None:
    """Watch the next pass of `model` and the first training step of these layers, which are given
    by name."""
    _unstepped.update({layer: name for name, layer in layers.items()})
    _looked_at.clear()
    hooks = [after_pass]
    if any(layer.starts_moved() for layer in layers.values()):
        hooks.append(after_reference)
    for hook in hooks:
        if hook not in model._forward_hooks.values():
            model.register_forward_hook(hook)


def forget_first_use(model: nn.Module) -> None:
    """Take the hooks off a model."""
    _take_off(model, after_pass)
    _take_off(model, after_reference)


def forget_reference(model: nn.Module) -> None:
    """Stop watching for a reference: the user was told already that training begins away from
    it."""
    _take_off(model, after_reference)


def _take_off(model: nn.Module, hook: Callable[..., None]) -> None:
    for key, there in list(model._forward_hooks.items()):
        if there is hook:
            model._forward_hooks.pop(key, None)


def after_pass(model: nn.Module, *_: Any) -> None:
    """Warn of adapted layers that the model did not call; a hook that runs after a model's first
    pass."""
    if torch.compiler.is_compiling():
        return
    _take_off(model, after_pass)
    modules = dict(model.named_modules())
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules.values()):
        return  # compiled layers do not note that they are called
    # a module that is trained whole stands there twice, and one copy is used
    copied = re.compile(r"\.(original_module|modules_to_save)\.")
    layers = {
        name: module for name, module in modules.items() if isinstance(module, SvdLayer) and not copied.search(name)
    }
    called = {name for name, layer in layers.items() if layer.called or layer.is_silent()}
    if passed_over := _but_experts(layers, called):
        warnings.warn(
            f"the model ran and did not call {_listed(passed_over)}, which an adapter is on: it changed no output. If the "
            "model calls them for other inputs (of images, say), all is well; if it only reads their weights, name them in "
            "`exclude_modules`",
            SvdtuneWarning,
            stacklevel=2,
        )


def after_reference(model: nn.Module, *_: Any) -> None:
    """Warn if training starts away from the reference; a hook that runs after each pass until the
    first step."""
    if torch.compiler.is_compiling() or not model.training:
        return
    layers = [layer for layer in model.modules() if isinstance(layer, SvdLayer) and layer.starts_moved()]
    waiting = [layer for layer in layers if layer in _unstepped]
    if waiting and not all(layer.disable_adapters for layer in waiting):
        return
    _take_off(model, after_reference)
    if waiting:
        warnings.warn(
            "the model ran for training with its adapter switched off before the adapter was trained a step, as DPO, KTO and "
            "GRPO do for their reference. SARA changes the model at step 0, as in its paper, so that training begins away "
            'from the reference; SaraConfig(init="zero_v") begins at it',
            SvdtuneWarning,
            stacklevel=2,
        )


def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Warn of what the first step of an adapter lacked; a hook that runs after the steps of all
    optimizers."""
    if not _unstepped or optimizer in _looked_at:
        return
    _looked_at.add(optimizer)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    factors: dict[str, nn.Parameter] = {}
    bare: list[str] = []
    for layer, layer_name in list(_unstepped.items()):
        own = {f"{layer_name}.{name}": p for name, p in layer.trained_parameters() if id(p) in stepped}
        if own:
            del _unstepped[layer]
            layer.forget_values()
            factors |= own
            if layer.lacks_regularizer():
                bare.append(layer_name)
    with_gradient = {name for name, factor in factors.items() if factor.grad is not None}
    if lacking := _but_experts(factors, with_gradient):
        warnings.warn(
            f"the optimizer stepped, and {_listed(lacking)} had no gradient: the loss does not depend on it. If the model uses "
            "that layer for other inputs, all is well; else name the layer in `exclude_modules`",
            SvdtuneWarning,
            stacklevel=2,
        )
    if bare:
        warnings.warn(
            f"SORSA is trained without its regularizer ({_listed(bare)}): gamma > 0 in its configuration does nothing by "
            "itself. Give a Trainer callbacks=[svdtune.SorsaRegularizer()], call svdtune.regularize(optimizer, model) before "
            "a loop of your own, or set gamma=0",
            SvdtuneWarning,
            stacklevel=2,
        )


def _but_experts(names: Iterable[str], used: Collection[str]) -> list[str]:
    """The names that were not used. Experts are left out if another expert of their block was used:
    a router passes over some in every pass."""
    blocks = {_as_one_expert(name) for name in used}
    return [name for name in names if name not in used and _as_one_expert(name) not in blocks]


def _as_one_expert(name: str) -> str:
    return re.sub(r"(expert\w*)\.\d+\.", r"\1.", name)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


register_optimizer_step_post_hook(after_step)
