"""The processes that train one model: which one this is, and what they compute together.

Every process holds the whole model and takes its share of each batch. A wrapper around the model
(DistributedDataParallel) averages the gradients, and :class:`World` the loss. With one process,
which is all that train.py starts, everything here is the identity.
"""

import dataclasses

import torch
import torch.distributed
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all of a run.

    More than one need an initialized process group of torch.distributed.
    """

    device: torch.device
    """The device of this process."""
    rank: int = 0
    """The number of this process, from 0."""
    size: int = 1
    """The number of processes."""

    def share(self, batch: Tensor) -> Tensor:
        """The rows of a whole batch that this process trains on: ``[B, ...]`` ->
        ``[B / size, ...]``, on its device."""
        assert len(batch) % self.size == 0, "the processes' shares of a batch are equal"
        return batch.chunk(self.size)[self.rank].to(self.device)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, on each of them."""
        if self.size == 1:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total / self.size
