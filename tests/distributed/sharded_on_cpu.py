"""`svdtune` with Accelerate made to shard on the CPU, where it otherwise takes FSDP's settings for DDP's.

Run by torchrun, with the environment that `accelerate launch` makes of configs/accelerate/fsdp2.yaml.
"""

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from svdtune.cli import main

_begin = PartialState.__init__


def _begin_as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    _begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _begin_as_on_gpus
    main()
