"""What a decoder keeps from step to step, all of it allocated once.

S rows, L columns, G key-value heads, E head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.model import ModelConfig, rotary

COLUMN_STEP = 64
"""A step on CPU reads columns up to the longest row's length, rounded up to a multiple of this."""


@dataclass(frozen=True)
class State:
    """Rows and their keys and values.

    A row has a column more than ``max_len`` (and what rounds it up): a row that is full or has
    ended goes on being computed, and what it writes must not fall on a column it holds.
    """

    max_len: int
    tokens: Tensor
    """int64 ``[S]``: the next input of each row."""
    lengths: Tensor
    """int32 ``[S]``: the columns filled."""
    active: Tensor
    """int32 ``[S]``: 1 where a step advances the row."""
    logits: Tensor
    """fp32 ``[S, V]``."""
    chosen: Tensor
    """int64 ``[S]``: the argmax of the logits, -1 where their maximum is not finite."""
    kv: Tensor
    """Keys, then values: float or int8 ``[n_layers, 2, S, G, L, E]``."""
    scale: Tensor | None
    """Of an int8 cache: fp32 ``[n_layers, 2, S, G, L]``."""
    cos: Tensor
    sin: Tensor
    """fp32 ``[L, E]``, by position."""

    @staticmethod
    def empty(
        config: ModelConfig,
        max_batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "State":
        """Rows without tokens; ``dtype`` is the cache's."""
        columns = COLUMN_STEP * math.ceil((max_len + 1) / COLUMN_STEP)
        shape = (config.n_layers, 2, max_batch, config.n_kv_heads, columns, config.head_dim)
        cos, sin = rotary(torch.arange(columns, device=device), config.head_dim, config.rope_theta)
        return State(
            max_len=max_len,
            tokens=torch.zeros(max_batch, dtype=torch.int64, device=device),
            lengths=torch.zeros(max_batch, dtype=torch.int32, device=device),
            active=torch.ones(max_batch, dtype=torch.int32, device=device),
            logits=torch.zeros(max_batch, config.vocab_size, device=device),
            chosen=torch.zeros(max_batch, dtype=torch.int64, device=device),
            kv=torch.zeros(shape, dtype=dtype, device=device),
            scale=torch.ones(shape[:-1], device=device) if dtype == torch.int8 else None,
            cos=cos,
            sin=sin,
        )

    def truncate(self, row: int, n: int) -> None:
        """Forget a row's columns from ``n`` on.

        On CPU they are zeroed: a step gives columns beyond a row's length the weight 0, and 0 times
        a NaN that stood there would be NaN. The kernels on CUDA do not read them.
        """
        if self.kv.device.type == "cpu":
            end = int(self.lengths[row]) + 1  # a row that is not active has written one more
            self.kv[:, :, row, :, n:end].zero_()
            if self.scale is not None:
                self.scale[:, :, row, :, n:end].zero_()
        self.lengths[row] = n

    def copy_prefix(self, source: int, target: int, n: int) -> None:
        """The first ``n`` columns of a row into another, which holds nothing."""
        self.kv[:, :, target, :, :n] = self.kv[:, :, source, :, :n]
        if self.scale is not None:
            self.scale[:, :, target, :, :n] = self.scale[:, :, source, :, :n]
        self.lengths[target] = n

    def others(self) -> list[Tensor]:
        """All that is not keys and values."""
        rows = [self.tokens, self.lengths, self.active, self.logits, self.chosen]
        return [*rows, self.cos, self.sin]
