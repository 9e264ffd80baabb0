"""Training in fp64, where no value falls to the other side of a code's border.

Fused code, another order of sums or another instruction set moves an fp64 value by about 1e-15. The
quantizers round to fp32 first, so two runs keep the same codes and their losses can be compared.
Not a test module.
"""

import torch
from torch import Tensor


def rotary64(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """bitnet.model.rotary in fp64: a cosine in fp32 is another one on another CPU."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = positions.double().unsqueeze(-1) * theta ** (-pairs / head_dim)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()
