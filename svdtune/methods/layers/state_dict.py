"""StateDictLayer: an adapted layer takes its values from an adapter's file, and refuses to run
without them."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdtune.errors import SvdtuneError
from svdtune.methods.layers.frozen import FrozenTensors
from svdtune.methods.layers.rounding import Unrounded


class StateDictLayer(Unrounded):
    """The part of an adapted layer that loads."""

    trained: ClassVar[tuple[str, ...]]
    frozen: ClassVar[tuple[str, ...]]

    @abstractmethod
    def adapter_tensor(self, name: str, adapter: str) -> Tensor | None:
        """One tensor of an adapter, None where its settings leave it out."""

    def _start_loading(self) -> None:
        self._awaited: set[str] = set()
        self.register_load_state_dict_post_hook(StateDictLayer._after_load)

    def awaits(self, adapter: str) -> bool:
        """Whether an adapter still waits for its values from a checkpoint."""
        return adapter in self._awaited

    def _check_in_memory(self, active: Collection[str], x: Tensor) -> None:
        """Raise `SvdtuneError` for an adapter whose values were offloaded: PyTorch's products in
        place take whatever lies in memory for them, and say nothing."""
        if x.is_meta:
            return
        for adapter in active:
            # Offloading takes all values of a layer, so that the first one tells.
            tensors = (self.adapter_tensor(name, adapter) for name in self.trained)
            if next(tensor.is_meta for tensor in tensors if tensor is not None):
                raise SvdtuneError(
                    f"the values of adapter {adapter!r} are on the meta device: they were offloaded with the model "
                    "(accelerate's cpu_offload, disk_offload or dispatch_model), which brings them back for no call. Offload "
                    "the base model first, and put the adapter on after that"
                )

    def filled_elsewhere(self, adapter: str) -> None:
        """Note that another process starts an adapter, and hands out its values later, with the
        base weights."""
        self._awaited.discard(adapter)

    @torch.no_grad()
    def fill(self, adapter: str, tensors: Mapping[str, Tensor], keys: Collection[str]) -> None:
        """Take an adapter's values from a checkpoint.

        PyTorch's `load_state_dict` would look at every key once for each of a module's children.

        Args:
            adapter: which.
            tensors: by name in `trained` and `frozen`.
            keys: of those tensors in the state dict of the whole model; the `load_state_dict` that
                follows will not miss them.
        """
        for name, tensor in tensors.items():
            own = self.adapter_tensor(name, adapter)
            of_name = self._modules[name]
            if isinstance(of_name, FrozenTensors):
                if of_name.share(adapter, tensor):
                    continue
                if own is not None and of_name.is_shared(adapter):
                    of_name[adapter] = own = nn.Parameter(own.detach().clone(), requires_grad=False)
            if own is None or not own.is_meta:
                self._modules[name][adapter].copy_(tensor)  # type: ignore[index]  # a ParameterDict
            else:
                # A tensor that is mapped from the file lies at an address of the file's alignment.
                # Aligned as when it was saved, products round as they did: outputs are the same to
                # the bit.
                value = tensor.clone() if tensor.data_ptr() % 64 else tensor
                getattr(self, name)[adapter] = nn.Parameter(value, own.requires_grad)
        self._awaited.discard(adapter)
        self._filled = keys
        self.keep_values()

    def _after_load(self, incompatible_keys: Any) -> None:
        keys, self._filled = self._filled, ()
        if keys:
            missing, own = incompatible_keys.missing_keys, len(self.state_dict(keep_vars=True))
            missing[-own:] = [key for key in missing[-own:] if key not in keys]

    _filled: Collection[str] = ()

    def _check_loaded(self, active: Collection[str]) -> None:
        for adapter in active:
            if adapter in self._awaited:
                raise SvdtuneError(
                    f"adapter {adapter!r} has no values: its configuration comes from a saved adapter (initialized=True), "
                    "so nothing was decomposed, but no weights were loaded. Load them with PeftModel.from_pretrained, or "
                    "set `initialized=False` in the configuration to start a new adapter"
                )


def parameters_go_to_meta() -> bool:
    """Whether PEFT's low_cpu_mem_usage is on. PEFT does not tell the tuner, but sends new
    parameters to the meta device."""
    return nn.ParameterDict({"probe": nn.Parameter(torch.empty(0))})["probe"].is_meta
