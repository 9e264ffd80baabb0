"""The memory of a decoder, all of it allocated once: its rows, and the buffers of a step.

S rows, L columns, G key-value heads, E head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitnet.engine.weights import Dense, Int8, ModelWeights, Ternary
from bitnet.model import ModelConfig, rotary

COLUMN_STEP = 64
"""A step on a CPU reads columns up to the longest row's length, rounded up to a multiple of it."""


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
    unfinished: dict[int, int] = field(default_factory=dict)
    """On a CPU: the rows that a prefill is writing, each with the column where it will end."""

    @staticmethod
    def empty(
        config: ModelConfig,
        max_batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "State":
        """Make rows without tokens; ``dtype`` is that of keys and values."""
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

    def truncate(self, row: int, n: int) -> None:
        """Forget a row's columns from ``n`` on.

        On a CPU they are zeroed: a step gives columns beyond a row's length the weight 0, and 0
        times a NaN would be NaN. The kernels on CUDA do not read them.
        """
        if self.kv.device.type == "cpu":
            # An inactive row has written one column more.
            self._zero(row, n, int(self.lengths[row]) + 1)
        self.lengths[row] = n

    def clean(self) -> None:
        """Zero the columns that a prefill, broken off, wrote beyond its rows' lengths, which may
        hold NaN: see :meth:`truncate`."""
        for row, end in self.unfinished.items():
            self._zero(row, int(self.lengths[row]), end)
        self.unfinished.clear()

    def _zero(self, row: int, start: int, end: int) -> None:
        self.kv[:, :, row, :, start:end].zero_()
        if self.scale is not None:
            self.scale[:, :, row, :, start:end].zero_()

    def copy_prefix(self, source: int, target: int, n: int) -> None:
        """Copy the first ``n`` columns of a row into another row, which holds nothing."""
        self.kv[:, :, target, :, :n] = self.kv[:, :, source, :, :n]
        if self.scale is not None:
            self.scale[:, :, target, :, :n] = self.scale[:, :, source, :, :n]
        self.lengths[target] = n

    def others(self) -> list[Tensor]:
        """All tensors except keys, values and their scales."""
        rows = [self.tokens, self.lengths, self.active, self.logits, self.chosen]
        return [*rows, self.cos, self.sin]


class Scratch:
    """One flat buffer. Each use takes a contiguous view of its front, in the shape it needs."""

    def __init__(self, numel: int, dtype: torch.dtype = torch.float32) -> None:
        self.buffer = torch.zeros(numel, dtype=dtype, device="cpu")

    def __call__(self, *shape: int) -> Tensor:
        """A view of the front."""
        return self.buffer[: torch.Size(shape).numel()].view(shape)


class Workspace:
    """The buffers of the steps and prefills on a CPU.

    For at most M tokens at a time, and K inputs of the widest matrix. The uses of a buffer follow
    one another.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, state: State, chunk: int
    ) -> None:
        self.dtype = dtype = weights.embedding.dtype
        rows, columns = state.tokens.shape[0], state.kv.shape[4]
        h, g, e = config.n_heads, config.n_kv_heads, config.head_dim
        self.most = m = max(rows, chunk)  # tokens at a time
        d, f, v = config.d_model, config.d_ff, config.vocab_size
        inner, outer = max(d, f), m * max((h + 2 * g) * e, 2 * f)
        head = rows * v
        quantized_head = isinstance(weights.head, Ternary | Int8)
        self.x = Scratch(m * d, dtype)  # the residual stream
        self.y = Scratch(m * inner, dtype)  # the input of a matrix
        self.z = Scratch(outer, dtype)  # the output of a matrix
        self.hidden = Scratch(m * inner, dtype)  # inside a block
        self.wide = Scratch(m * max(inner, (h + 2 * g) * e))  # fp32 input of a norm
        self.square = Scratch(m * max(inner, 2 * g * e))
        self.moment = Scratch(m * (h + 2 * g))
        self.step_size = Scratch(m * (h + 2 * g))
        self.codes = Scratch(m * max(inner, 2 * g * e), torch.int8)
        self.acc = Scratch(max(outer, head if quantized_head else 0), torch.int32)
        self.scaled = Scratch(max(outer, head if quantized_head else 0))
        self.rotated = Scratch(m * (h + 2 * g) * e)
        self.queries = Scratch(m * d)
        self.scores = Scratch(h * m * columns)
        self.attended = Scratch(m * d)
        self.by_head = Scratch(chunk * d)
        self.narrow = Scratch(0 if dtype == torch.float32 else m * (h + 2 * g) * e, dtype)
        other = state.kv.dtype != torch.float32
        self.stored = Scratch(m * 2 * g * e if other else 0, state.kv.dtype)
        self.widened = Scratch(2 * g * columns * e if other else 0)
        cast = isinstance(weights.head, Dense) and weights.head.weight.dtype != dtype
        low_head = isinstance(weights.head, Dense) and weights.head.weight.dtype != torch.float32
        head_dtype = weights.head.weight.dtype if isinstance(weights.head, Dense) else dtype
        self.head_in = Scratch(rows * d if cast else 0, head_dtype)
        self.head_out = Scratch(head if low_head else 0, head_dtype)
        self.columns = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self.cos, self.sin = Scratch(m * e), Scratch(m * e)
        self.mask = Scratch(rows * g * columns)
        self.beyond = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
        self.all_columns = torch.arange(columns, device="cpu", dtype=torch.int64)
        self.signed_sin = state.sin.clone()
        self.signed_sin[:, : e // 2].neg_()
        self.causal = torch.full((chunk, chunk), -torch.inf, dtype=torch.float32, device="cpu")
        self.causal.triu_(1)
        self.peak = Scratch(rows)
        self.finite = torch.zeros(rows, dtype=torch.bool, device="cpu")
        self.none = torch.tensor(-1, device="cpu", dtype=torch.int64)
        self._constants: dict[float, Tensor] = {}

    def workspace(self) -> list[Tensor]:
        """All buffers besides weights and state."""
        values = [*vars(self).values(), *self._constants.values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        return tensors + [value.buffer for value in values if isinstance(value, Scratch)]

    def constant(self, value: float) -> Tensor:
        """A number as an fp32 ``[]``, made once."""
        if value not in self._constants:
            self._constants[value] = torch.tensor(value, dtype=torch.float32, device="cpu")
        return self._constants[value]
