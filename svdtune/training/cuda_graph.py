"""A model's body, forward and backward, recorded in two CUDA graphs while a run trains.

At small shapes the host, which launches kernels, takes longer than the GPU that runs them. A
recorded pass is launched at once: while the GPU runs its way back, the host is ahead with clipping,
regularizer and optimizer. The body is what `base_model_prefix` names; the head and the loss, which
look at how many labels there are, run as written.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdtune.errors import SvdtuneError
from svdtune.training.compilation import ROW_BOUNDS, layers_apart

_LEAST_ROWS = 64
_NOT_THE_BODYS = "num_items_in_batch"  # the loss's; some models hand it on to a body that does not read it
_HIDDEN = "last_hidden_state"
_INSTEAD = "Set training.compile: true, which compiles and records nothing"


@contextmanager
def recorded_body(model: Any, *, resumed: bool = False) -> Iterator["RecordedBody"]:
    """Record a model's body at its first training pass, and replay it until the `with` block ends.

    Args:
        model: of Transformers, with or without an adapter, on a CUDA device, whole in one process.
        resumed: whether the first pass may be of an epoch's last batch, which is a short one: it
            runs as written, and the second is recorded.

    Raises:
        SvdtuneError: a model without a body of its own; at the pass that is recorded, one that
            cannot be.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(base, getattr(base, "base_model_prefix", "") or "-", None)
    if not isinstance(body, nn.Module):
        raise SvdtuneError(
            f"training.compile: graph records the part of a model before its head, and {type(base).__name__} names none in "
            f"base_model_prefix. {_INSTEAD}"
        )
    before = body.__dict__.get("forward")
    recorded = RecordedBody(body, resumed)
    body.forward = recorded
    try:
        with layers_apart(model):
            yield recorded
    finally:
        del body.forward
        if before is not None:
            body.forward = before


class RecordedBody:
    """Stands in for a body's `forward`: replays what it recorded where everything is as it was
    then, and calls the body as written elsewhere.

    As it was: names, shapes and dtypes of all tensors, all other arguments, autocast, and the
    addresses of the parameters and which of them are trained. Where rows begin is padded, with rows
    of no token, to twice as many as the first batch had. One forward pass is followed by its
    backward pass before the next.

    Attributes:
        aside: how many training passes ran as written.
    """

    def __init__(self, body: nn.Module, resumed: bool):
        self.aside = 0
        self._body, self._written = body, body.forward
        self._waits = resumed
        self._rows = 0
        self._kind: Any = None
        self._replay: Any = None
        self._parameters: list[nn.Parameter] = []
        self._part: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._body.training or not torch.is_grad_enabled():
            return self._written(*args, **kwargs)
        if self._waits:
            self._waits, self.aside = False, 1
            with torch.compiler.set_stance("force_eager"):  # nothing is compiled for one pass
                return self._written(*args, **kwargs)
        given = self._padded(self._named(args, kwargs))
        if self._replay is None:
            self._parameters = list(self._body.parameters())
            self._kind, self._replay = self._kind_of(given), self._record(given)
        if self._kind_of(given) != self._kind:
            self.aside += 1
            return self._written(*args, **kwargs)
        self._move_gradients()
        hidden = self._replay(*[x for x in given.values() if isinstance(x, Tensor)])
        return self._part.output(**{_HIDDEN: hidden})

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name; some models hand on the first by its place."""
        parameters = inspect.signature(self._written).parameters.values() if args else ()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(names):
            raise SvdtuneError(
                f"training.compile: graph: {type(self._body).__name__} is called with {len(args)} arguments that have no name. "
                f"{_INSTEAD}"
            )
        return dict(zip(names, args, strict=False)) | kwargs

    def _padded(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in kwargs.items() if name != _NOT_THE_BODYS}
        for name in ROW_BOUNDS:
            bounds = given.get(name)
            if isinstance(bounds, Tensor):
                self._rows = self._rows or max(_LEAST_ROWS, 2 * len(bounds))
                given[name] = torch.cat([bounds, bounds[-1:].expand(max(0, self._rows - len(bounds)))])
        return given

    def _kind_of(self, given: dict[str, Any]) -> Any:
        arguments = [
            (name, x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else (name, type(x), x)
            for name, x in given.items()
        ]
        return arguments, _autocast(self._parameters[0]), [(p.data_ptr(), p.requires_grad) for p in self._parameters]

    def _record(self, given: dict[str, Any]) -> Any:
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in given.items() if name not in tensors}
        if unfit := [name for name, x in others.items() if not isinstance(x, bool | int | float | str | None)]:
            raise SvdtuneError(
                f"training.compile: graph: {type(self._body).__name__} is called with {', '.join(unfit)}, of which a graph "
                f"cannot tell whether it changed. {_INSTEAD}"
            )
        self._part = part = _Part(self._written, list(tensors), others, self._parameters)
        sample = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in tensors.values())
        first = self._parameters[0]
        try:
            # A resumed run draws what it would have drawn, and the way back has no autocast, as in
            # any loop.
            with (
                torch.random.fork_rng([first.device] if first.is_cuda else []),
                torch.autocast(first.device.type, enabled=False),
            ):
                return torch.cuda.make_graphed_callables(part, sample, allow_unused_input=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            raise SvdtuneError(
                f"training.compile: graph: {type(self._body).__name__} cannot be recorded in a CUDA graph: "
                f"{str(error).partition(chr(10))[0]}. {_INSTEAD}"
            ) from error

    def _move_gradients(self) -> None:
        """Copy gradients that are to be added to: they may lie where a replay writes its own."""
        having = {p: p.grad for p in self._parameters if p.grad is not None}
        if having:
            for p, kept in zip(having, torch._foreach_add(list(having.values()), 0.0), strict=True):
                p.grad = kept


def _autocast(like: Tensor) -> tuple[str, torch.dtype, bool]:
    device = like.device.type
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


class _Part(nn.Module):
    """A body's call as `make_graphed_callables` takes it: tensors in, the last hidden state out,
    and no parameters but the trained ones."""

    def __init__(
        self,
        written: Callable[..., Any],
        names: list[str],
        others: dict[str, Any],
        parameters: list[nn.Parameter],
    ):
        super().__init__()
        self.trained = nn.ParameterList(p for p in parameters if p.requires_grad)
        self.written, self.names, self.others = written, names, others
        self.autocast = _autocast(parameters[0])
        self.output: Any = None

    def forward(self, *tensors: Tensor) -> Tensor:
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            found = self.written(**dict(zip(self.names, tensors, strict=True)), **self.others)
        beyond = [name for name, value in found.items() if name != _HIDDEN and value is not None]
        if beyond:
            raise RuntimeError(f"beside {_HIDDEN} it returns {', '.join(beyond)}")
        self.output = type(found)
        hidden: Tensor = found[_HIDDEN]
        return hidden
