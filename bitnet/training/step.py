"""One optimizer step of a run."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    """A model whose forward, with the loss in it, is one compiled graph; the weights are shared.

    torch (2.13) keeps compiled graphs in a folder, under a key that does not hold the vector width
    of the CPU. A graph written for AVX-512 is then read where the folder is shared with a machine
    that has AVX2 only, or where ATEN_CPU_CAPABILITY says so, and gives wrong numbers or a
    segmentation fault. So the width goes into the key, as torch's own tag.
    """
    width, tag = torch.backends.cpu.get_cpu_capability(), torch.compiler.config.cache_key_tag
    if width not in tag.split():
        torch.compiler.config.cache_key_tag = f"{tag} {width}".strip()
    return torch.compile(model, fullgraph=True)
