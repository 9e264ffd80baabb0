"""The rows of a decoder: their tokens, keys and values, allocated once.

S rows, L columns, G key-value heads, E head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.model import ModelConfig, rotary

COLUMN_STEP = 64
"""The number of columns is a multiple of this."""


@dataclass(frozen=True)
class State:
    """Rows and their keys and values.

    A row has at least one column more than ``max_len``: a row that is full or inactive is computed
    too, and must not overwrite a column that it holds.
    """

    max_len: int
    tokens: Tensor
    """int64 ``[S]``: the next input of each row."""
    lengths: Tensor
    """int32 ``[S]``: the columns filled."""
    active: Tensor
    """int32 ``[S]``: 1 if a step advances the row."""
    logits: Tensor
    """fp32 ``[S, V]``."""
    chosen: Tensor
    """int64 ``[S]``: the argmax of the logits, -1 if their maximum is not finite."""
    kv: Tensor
    """Keys, then values: float or int8 ``[n_layers, 2, S, G, L, E]``."""
    scale: Tensor | None
    """The scales of an int8 cache: fp32 ``[n_layers, 2, S, G, L]``."""
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
        """Make rows without tokens; ``dtype`` is the dtype of keys and values."""
        columns = COLUMN_STEP * math.ceil((max_len + 1) / COLUMN_STEP)
        shape = (config.n_layers, 2, max_batch, config.n_kv_heads, columns, config.head_dim)
        fp32 = torch.float32
        cos, sin = rotary(
            torch.arange(columns, device=device, dtype=torch.int64),
            config.head_dim,
            config.rope_theta,
        )
        return State(
            max_len=max_len,
            tokens=torch.zeros(max_batch, dtype=torch.int64, device=device),
            lengths=torch.zeros(max_batch, dtype=torch.int32, device=device),
            active=torch.ones(max_batch, dtype=torch.int32, device=device),
            logits=torch.zeros(max_batch, config.vocab_size, dtype=fp32, device=device),
            chosen=torch.zeros(max_batch, dtype=torch.int64, device=device),
            kv=torch.zeros(shape, dtype=dtype, device=device),
            scale=torch.ones(shape[:-1], dtype=fp32, device=device)
            if dtype == torch.int8
            else None,
            cos=cos,
            sin=sin,
        )

    def copy_prefix(self, source: int, target: int, n: int) -> None:
        """Copy the first ``n`` columns of a row into another row, which must be empty."""
        self.kv[:, :, target, :, :n] = self.kv[:, :, source, :, :n]
        if self.scale is not None:
            self.scale[:, :, target, :, :n] = self.scale[:, :, source, :, :n]
        self.lengths[target] = n

    def others(self) -> list[Tensor]:
        """All tensors except keys, values and their scales."""
        rows = [self.tokens, self.lengths, self.active, self.logits, self.chosen]
        return [*rows, self.cos, self.sin]
