"""FrozenTensors: one frozen tensor of a layer, by adapter, which is out of sight while the layer is
merged.

Whoever hands the weights of a merged model to another program walks its parameters and leaves out
those with the method's prefix: TRL does before vLLM generates. Frozen tensors lack that prefix, by
which PEFT's tools know what is trained, and would be sent as weights of the base. Nothing computes
with them while the base weight holds the adapter, so for that time they are buffers. At other times
they are parameters: DistributedDataParallel broadcasts buffers before each pass, FSDP rounds them
for good under mixed precision, and neither FSDP nor ZeRO-3 shards them.
"""

from torch import nn


class FrozenTensors(nn.ParameterDict):
    """Frozen tensors by adapter. Their keys in a state dict are the same in sight and out of it."""

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
