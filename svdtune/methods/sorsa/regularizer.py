"""SORSA's orthonormal regularizer, applied where it is exact: at the optimizer step, after
clipping.

Inside a forward pass the penalty would be counted once for every accumulated micro-batch and every
process. At the step it is counted once, whatever the loop. Three doors to one piece of code:

- `SorsaRegularizer`, a `transformers.TrainerCallback`:
  `Trainer(..., callbacks=[SorsaRegularizer()])`
- `regularize(optimizer, model)`: hooks any `torch.optim.Optimizer`, for loops of one's own
- `add_regularizer_gradients(model, max_learning_rate)`: adds the gradients now, between
  `clip_grad_norm_` and `step()`

The hook runs inside `optimizer.step()`: after clipping as in the authors' code, after a GradScaler
unscaled the gradients, and not at all where the scaler skips an overflowed step.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from svdtune.errors import SvdtuneError
from svdtune.methods.sorsa.config import SorsaConfig
from svdtune.methods.sorsa.layer import SorsaLinear
from svdtune.methods.sorsa.math import penalty
from svdtune.methods.sorsa.sharded import as_gradient, batches, rows, summed_grams
from svdtune.methods.sorsa.zero import ZeroFactors, is_zero


def sorsa_layers(model: nn.Module) -> list[SorsaLinear]:
    """The layers of a model that SORSA adapts."""
    return [layer for layer in model.modules() if isinstance(layer, SorsaLinear)]


def trained_factors(layers: nn.Module | list[SorsaLinear]) -> Iterator[tuple[nn.Parameter, SorsaConfig]]:
    """Every U and V of a SORSA adapter that is being trained, with its adapter's configuration."""
    for layer in sorsa_layers(layers) if isinstance(layers, nn.Module) else layers:
        for adapter, config in layer.configs.items():
            for name in ("sorsa_U", "sorsa_V"):
                factor = layer.adapter_tensor(name, adapter)
                assert isinstance(factor, nn.Parameter)
                if factor.requires_grad:
                    yield factor, config


@torch.no_grad()
def add_regularizer_gradients(
    model: nn.Module | list[SorsaLinear], max_learning_rate: float, *, grad_scale: Tensor | float = 1.0
) -> Tensor | None:
    """Add (γ / η_d) ∇L_reg (Eq. 6) to the gradients of every trained SORSA factor of a model.

    γ, the reduction over factor matrices and the smoothing come from each adapter's configuration.
    A factor without a gradient gets one. Factors of one rank are treated together in fp32, with a
    product for each length; nothing here waits for the device. Under DDP every process adds the
    same and nothing is sent; of factors that FSDP2 sharded, Gram matrices are summed in one
    message.

    Args:
        model: with SORSA adapters, or its `sorsa_layers`; a model without any is left alone.
        max_learning_rate: η_d, the largest learning rate of the schedule.
        grad_scale: what the gradients are still multiplied by (a fused optimizer under a
            GradScaler).

    Returns:
        L_reg as a 0-d tensor, reduced as configured and not multiplied by γ; None where no SORSA
        factor is trained.

    Raises:
        SvdtuneError: a learning rate that is not positive.
    """
    if not max_learning_rate > 0:
        raise SvdtuneError(f"max_learning_rate must be positive, the largest of the schedule; got {max_learning_rate}")
    layers = sorsa_layers(model) if isinstance(model, nn.Module) else model
    for layer in layers:
        if not layer.regularized:
            layer.regularized = True
    factors = list(trained_factors(layers))
    if not factors:
        return None
    grams = summed_grams(factor for factor, _ in factors)
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = defaultdict(list)
    for factor, config in factors:
        share = 1 / len(factors) if config.reduction == "mean" else 1.0
        groups[share, config.gamma, config.smooth_eps].append(factor)
    total: Tensor | None = None
    for (share, gamma, smooth_eps), group in groups.items():
        weight = share * gamma / max_learning_rate
        for batch, of_whole in batches(group, grams):
            scale = grad_scale.to(batch[0].device) if isinstance(grad_scale, Tensor) else grad_scale
            norms, gradients = penalty(
                [rows(factor.detach()) for factor in batch], smooth_eps, weight * scale, of_whole
            )
            part = norms.sum() * share
            total = part if total is None else total + part.to(total.device)
            if gamma > 0:
                _accumulate(batch, gradients)
    return total


def _accumulate(factors: list[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    with_grad = [
        (rows(factor.grad), new) for factor, new in zip(factors, gradients, strict=True) if factor.grad is not None
    ]
    if with_grad:
        torch._foreach_add_([grad for grad, _ in with_grad], [new for _, new in with_grad])
    for factor, new in zip(factors, gradients, strict=True):
        if factor.grad is None:
            factor.grad = as_gradient(new.to(factor.dtype, copy=True), factor)


class RegularizerHook:
    """What `regularize` returns: `last` is L_reg at the latest step (0-d tensor or None),
    `remove()` takes the hook away."""

    def __init__(self, model: nn.Module, max_learning_rate: float):
        self.layers, self.max_learning_rate = sorsa_layers(model), max_learning_rate
        self.last: Tensor | None = None
        self.watches_rate = False
        self._handle: RemovableHandle | None = None
        self._zero: ZeroFactors | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watches_rate:
            self._check_rate(optimizer)
        if self._zero is not None:
            self.last = self._zero.add_gradients(optimizer, self.max_learning_rate)
            return
        # A fused optimizer divides by GradScaler's scale inside its own kernel, so here the
        # gradients still carry it.
        scale = getattr(optimizer, "grad_scale", None)
        self.last = add_regularizer_gradients(
            self.layers, self.max_learning_rate, grad_scale=1.0 if scale is None else scale
        )

    def _check_rate(self, optimizer: torch.optim.Optimizer) -> None:
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        if rate > self.max_learning_rate * (1 + 1e-6):
            raise SvdtuneError(
                f"the learning rate is {rate:g} at this step, and SORSA's regularizer took {self.max_learning_rate:g} for the "
                "largest, from the optimizer's groups: a scheduler that rises above its start, such as CyclicLR, does not say "
                "how far, and the regularizer would be too strong. Give it: regularize(optimizer, model, max_learning_rate=...)"
            )

    def attach(self, optimizer: Any) -> None:
        """Act at every step of an optimizer from now on.

        Raises:
            SvdtuneError: it is of a kind whose steps cannot be told.
        """
        if type(optimizer).__module__.partition(".")[0] == "accelerate":  # what it prepared; the inner one steps
            optimizer = optimizer.optimizer
        if is_zero(optimizer):
            self._zero, optimizer = ZeroFactors(optimizer, list(trained_factors(self.layers))), optimizer.optimizer
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise SvdtuneError(
                f"SORSA's regularizer acts when a torch.optim.Optimizer steps; a {type(optimizer).__name__} does not say when. "
                "Under DeepSpeed use stage 2 or 3 without bf16 and fp16 sections (configs/accelerate), or set gamma=0"
            )
        self._handle = optimizer.register_step_pre_hook(self)

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        if self._handle is not None:
            self._handle.remove()


def regularize(
    optimizer: torch.optim.Optimizer, model: nn.Module, max_learning_rate: float | None = None
) -> RegularizerHook:
    """Apply the regularizer at every `optimizer.step()` from now on.

    Args:
        optimizer: any torch optimizer, or the one that Accelerate or DeepSpeed's ZeRO made of it.
        model: the model with SORSA adapters; layers adapted later are not seen.
        max_learning_rate: η_d. By default the largest `max_lr` (OneCycleLR's) or else `initial_lr`
            of the optimizer's groups, which other schedulers set to the rate they start from or
            rise to, or `lr` where there is no scheduler yet. A step at a larger one is refused.

    Returns: the hook; `remove()` ends it, and `last` is L_reg at the last step.

    Raises:
        SvdtuneError: the optimizer is of a kind whose steps cannot be told.
    """
    known = max_learning_rate is not None
    found = max_learning_rate if max_learning_rate is not None else largest_learning_rate(optimizer.param_groups)
    hook = RegularizerHook(model, found)
    hook.watches_rate = not known
    hook.attach(optimizer)
    return hook


def largest_learning_rate(groups: Iterable[dict[str, Any]]) -> float:
    """The largest learning rate that an optimizer's groups reach under a schedule that ends at or
    below its start."""
    return max(float(group.get("max_lr", group.get("initial_lr", group["lr"]))) for group in groups)


class SorsaRegularizer(TrainerCallback):
    """`regularize` for a `transformers.Trainer` (or TRL's): hooks its optimizer, and logs L_reg as
    `l_reg`.

    Does nothing for a model without SORSA adapters.
    """

    def __init__(self) -> None:
        self.hook: RegularizerHook | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        inner = getattr(
            optimizer, "optimizer", optimizer
        )  # Accelerate wraps the optimizer; the step is the inner one's
        if any(True for _ in trained_factors(model)):
            self.hook = regularize(inner, model, args.learning_rate)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.hook is not None and self.hook.last is not None and logs is not None and "loss" in logs:
            logs["l_reg"] = float(self.hook.last)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
