"""Whether a transform of torch.func is at work, which takes PyTorch's own operations alone."""

import torch


def under_transform() -> bool:
    """Whether grad, vmap, jvp or another transform of torch.func is active. Compiled code never
    asks."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
