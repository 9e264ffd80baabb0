"""train.py with latent weights that keep 16 bits: rounded stochastically to bf16 after each update.

    python docs/results/bf16_latents.py CONFIG... [SECTION.KEY=VALUE...]     # as train.py

The values are those of bf16 in tensors of fp32, so the quality is that of storing bf16, and the
time is not. A value goes up or down to a neighbour with the probability that makes the mean exact:
to the lower 16 bits of its pattern a random number of 16 bits is added, and they are cut off. The
random numbers follow from the momentum, so that a resumed run draws the same ones.
"""

import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


def rounded(value: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 of any shape to bf16 values, in fp32, right in the mean. Finite values only."""
    noise = torch.randint(0, 2**16, value.shape, generator=generator, dtype=torch.int32)
    return ((value.view(torch.int32) + noise) & -(2**16)).view(torch.float32)


@torch.no_grad()
def round_matrices(optimizer: Optimizer, *_: Any) -> None:
    """Round the matrices that Muon has just updated."""
    if not isinstance(optimizer, torch.optim.Muon):
        return
    for group in optimizer.param_groups:
        for index, weight in enumerate(group["params"]):
            bits = optimizer.state[weight]["momentum_buffer"].view(torch.int32)
            seed = int(bits.sum(dtype=torch.int64)) % 2**62 + index
            generator = torch.Generator().manual_seed(seed)
            weight.copy_(rounded(weight, generator))


if __name__ == "__main__":
    register_optimizer_step_post_hook(round_matrices)
    train = Path(__file__).resolve().parent.parent.parent / "train.py"
    runpy.run_path(str(train), run_name="__main__")
