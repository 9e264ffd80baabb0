"""A step on a CPU by the model's own layers, called as modules, with keys and values kept.

It takes every model: each layer, whatever it contains (hooks, biases, norms inside, scales per
group, layers of QAT, adapters), is called as the model itself calls it, with the model's arithmetic
in the model's dtype. The native step (:mod:`bitnet.engine.cpu`) is many times as fast, but takes
fewer models.

A packed layer whose product the native library does not compute would unpack its codes in every
call, which for one token takes several times as long as the product. So the codes are unpacked
once, to int8, and kept beside the packed ones.

B rows, T tokens per row, G key-value heads, C columns read, E head_dim, D d_model, V vocabulary.
"""

from itertools import groupby

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.engine.state import State
from bitnet.engine.weights import Dense, Int8, ModelWeights, replaced
from bitnet.linear import TernaryLinear
from bitnet.model import Transformer
from bitnet.modules import hooked
from bitnet.quant import output_dtype
from bitnet_kernels.cpu import int_mm, native
from bitnet_kernels.reference import absmax_int8


class ModuleRunner:
    """The steps and prefills of a model on a CPU.

    Arguments:
        model: a :func:`bitnet.engine.weights.packed_copy`. weights: the model's. state: the rows.
        chunk: the approximate maximum of tokens that a prefill computes at a time.
    """

    def __init__(self, model: Transformer, weights: ModelWeights, state: State, chunk: int) -> None:
        self.weights, self.state, self.chunk = weights, state, chunk
        self._unpacked: list[_Unpacked] = []
        self.model = replaced(model, self._unpack)

    def step(self, batch: int) -> None:
        """Feed the next token of each of the first ``batch`` rows."""
        state = self.state
        self._advance(slice(0, batch), state.tokens[:batch].unsqueeze(1))
        state.lengths[:batch].add_(state.active[:batch]).clamp_(max=state.max_len)

    def prefill(self, tokens: Tensor, n_valid: list[int]) -> None:
        """Append the first ``n_valid[row]`` of each row's tokens, int64 ``[B, T]``."""

        def together(row: int) -> tuple[int, int]:
            """The group of a row: neighbors with the same number of tokens, so that nothing is
            padded, about ``chunk`` in all."""
            return n_valid[row], row * n_valid[row] // self.chunk

        for (n, _), group in groupby(range(len(n_valid)), together):
            first, *others = group
            rows = slice(first, first + 1 + len(others))
            if n:
                self._advance(rows, tokens[rows, :n])
                self.state.lengths[rows] += n

    def workspace(self) -> list[Tensor]:
        """All that a step reads besides weights and state."""
        return [layer.codes for layer in self._unpacked]

    def _unpack(self, layer: nn.Module) -> nn.Module | None:
        if type(layer) is not TernaryLinear or hooked(layer):
            return None
        if native.library() is not None and layer.granularity != "group":
            return None
        self._unpacked.append(_Unpacked(layer))
        return self._unpacked[-1]

    def _advance(self, rows: slice, tokens: Tensor) -> None:
        """Compute tokens ``[B, T]`` of these rows: write their keys and values, and the rows'
        logits, chosen and next tokens. A full row writes to the column after its last."""
        state, t = self.state, tokens.shape[1]
        steps = torch.arange(t, dtype=torch.int64, device="cpu")
        places = state.lengths[rows, None].clamp(max=state.max_len) + steps  # [B, T]
        columns = torch.arange(int(places.max()) + 1, dtype=torch.int64, device="cpu")
        seen = rearrange(columns <= places.unsqueeze(-1), "b t c -> b 1 t c")
        beyond = columns > places[:, -1:]
        cos, sin = state.cos[places].unsqueeze(1), state.sin[places].unsqueeze(1)
        x = F.embedding(tokens, self.weights.embedding)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, _Columns(state, i, rows, places, beyond), seen)
        logits = self._logits(self.model.norm(x[:, -1]))
        peak, best = logits.max(-1)
        state.logits[rows] = logits
        state.chosen[rows] = torch.where(peak.isfinite(), best, -1)
        state.tokens[rows] = state.chosen[rows].clamp(min=0)

    def _logits(self, x: Tensor) -> Tensor:
        """Normed ``[B, D]`` -> fp32 ``[B, V]``."""
        head = self.weights.head
        if isinstance(head, Int8):
            return head.logits(x)
        if isinstance(head, Dense):
            return F.linear(x.to(head.weight.dtype), head.weight).float()
        return self.model.lm_head(x).float()


class _Columns:
    """The cache of one layer, as its attention sees it.

    Arguments:
        rows: of the state. places: int64 ``[B, T]``, the column of each token.
        beyond: bool ``[B, C]``, the columns past each row's last token.
    """

    def __init__(
        self, state: State, layer: int, rows: slice, places: Tensor, beyond: Tensor
    ) -> None:
        self.kv = state.kv[layer, :, rows]
        self.scale = None if state.scale is None else state.scale[layer, :, rows]
        self.places, self.beyond = places, beyond

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, G, T, E]``; return all columns, ``[B, G, C, E]``, in the dtype of ``k``."""
        row = torch.arange(len(k), dtype=torch.int64, device="cpu").unsqueeze(1)
        at = (slice(None), row, slice(None), self.places)
        new = rearrange([k, v], "s b g t e -> b t s g e")
        if self.scale is None:
            self.kv[at] = new.to(self.kv.dtype)
        else:
            self.kv[at], self.scale[at] = absmax_int8(new)
        end = self.beyond.shape[1]
        held = self.kv[..., :end, :]
        if self.scale is not None:
            held = held.float() * self.scale[..., :end, None]
        held = held.to(k.dtype)
        if self.beyond.any():  # their weight is 0, but 0 times an old NaN there is NaN
            held = held.masked_fill(rearrange(self.beyond, "b c -> b 1 c 1"), 0.0)
        return held[0], held[1]


class _Unpacked(nn.Module):
    """A packed layer with its codes unpacked, int8 ``[N, K]``: the same outputs to the last bit."""

    def __init__(self, layer: TernaryLinear) -> None:
        super().__init__()
        self.layer, self.codes = layer, layer.codes()

    def forward(self, x: Tensor) -> Tensor:
        """Float ``[B, T, K]`` -> ``[B, T, N]``."""
        layer = self.layer
        if layer.rms_norm is not None:
            x = layer.rms_norm(x)
        x_q, s_x = absmax_int8(x.flatten(0, -2))
        y = int_mm.scaled_matmul(
            x_q, s_x, self.codes, layer.scale, layer.bias, output_dtype(x), layer.group_size
        )
        return y.unflatten(0, x.shape[:-1])
