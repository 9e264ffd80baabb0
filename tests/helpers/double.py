"""Training in fp64, in which no value crosses the border between two codes.

Fused code, another order of sums or another instruction set changes an fp64 value by about 1e-15.
The quantizers round to fp32 first, so two runs have the same codes, and comparable losses.
Not a test module.
"""

import torch
from torch import Tensor


def rotary64(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """bitnet.model.rotary in fp64: fp32 cosines differ between CPUs."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = positions.double().unsqueeze(-1) * theta ** (-pairs / head_dim)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()
