"""FrozenTensors: one frozen tensor of a layer, by adapter. It is hidden while the layer is merged.

TRL hands the weights of a merged model to vLLM: it walks the model's parameters and leaves out
those with the method's prefix. Frozen tensors lack that prefix, since PEFT's tools take a name with
it for trained. So they would be sent as weights of the base. While the base weight holds the
adapter nothing computes with them, so they are buffers then. At other times they are parameters:
DistributedDataParallel broadcasts buffers before each pass, FSDP's mixed precision rounds them for
good, and neither FSDP nor ZeRO-3 shards them.

Adapters of one rank have the same frozen tensors, which follow from the base weight. A thousand
adapters keep them in memory once.
"""

import torch
from torch import Tensor, nn


class FrozenTensors(nn.ParameterDict):
    """Frozen tensors by adapter. Their keys in a state dict are the same whether they are shown or
    hidden."""

    def share(self, adapter: str, tensor: Tensor) -> bool:
        """Share another adapter's parameter if one equals `tensor`. Return whether one does."""
        own = self._parameters.get(adapter)
        dtype = tensor.dtype if own is None else own.dtype
        seen: set[int] = set()  # its own is there where it is shared already, and stays so
        for name, other in reversed(self._parameters.items()):
            # sharded ones are of other types
            if name == adapter or type(other) is not nn.Parameter or id(other) in seen:
                continue
            seen.add(id(other))
            alike = other.dtype == dtype and other.shape == tensor.shape and not (other.is_meta or tensor.is_meta)
            if alike and torch.equal(other, tensor.to(other)):
                self[adapter] = other
                return True
        return False

    def is_shared(self, adapter: str) -> bool:
        """Whether another adapter has the very parameter of this one."""
        own = self._parameters.get(adapter)
        return any(other is own for name, other in self._parameters.items() if name != adapter)

    def hide(self) -> None:
        """Make them buffers."""
        for adapter, tensor in list(self._parameters.items()):
            delattr(self, adapter)
            self.register_buffer(adapter, tensor)

    def show(self) -> None:
        """Make them parameters again: the same objects, unless the model was moved or cast
        since."""
        for adapter, tensor in list(self._buffers.items()):
            assert tensor is not None
            kept = isinstance(tensor, nn.Parameter)
            setattr(self, adapter, tensor if kept else nn.Parameter(tensor, requires_grad=False))
