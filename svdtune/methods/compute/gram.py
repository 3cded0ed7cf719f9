"""Gram matrices of trained factors, in a precision that does not depend on how a factor is stored
or what the user allowed."""

import torch
from torch import Tensor


def gram(factors: Tensor) -> Tensor:
    """MᵀM [n, r, r] of factors [n, d, r], long dimension first, in fp64 wherever the device has it.

    Straight after an SVD MᵀM − I is of the size of fp32's rounding. In fp64 it, and with it the
    direction of the penalty's gradient, follows from the factors alone, not from the order of a
    sum: sharded factors give what whole ones give.
    """
    factors = factors.float() if factors.device.type == "mps" else factors.double()
    with torch.autocast(factors.device.type, enabled=False):
        return factors.mT @ factors
