"""A step on a CPU: a list of torch calls, recorded once and bound to static tensors.

At one token per row, a layer costs its matrices and the overhead of a hundred small operations. So
a step is recorded once per batch size: torch functions with their inputs and their ``out=``, views
already taken. Running the recorded calls allocates nothing, decides nothing and looks nothing up.
Every 64 columns of context, a new recording replaces the last one.

The arithmetic is that of the model's modules, operator by operator, including the roundings to the
model's dtype: RMSNorm as ``nn.RMSNorm`` composes it, absmax int8, the exact int32 product and its
rescale in the same order. Only attention differs, in the order of its sums; it runs in fp32 for any
dtype of model and cache.

A prefill is recorded too, for one use: the tokens of all rows lie one after another without
padding, and only attention goes row by row. A prefill of one token per row is a step.

M tokens, D d_model, H query heads, G key-value heads, R = H / G, E head_dim, F d_ff, B rows,
C columns read, K in_features, N out_features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitnet.engine.state import COLUMN_STEP, State, Workspace
from bitnet.engine.weights import Dense, LayerWeights, Matrix, ModelWeights, Modules, Norm
from bitnet.model import ModelConfig
from bitnet_kernels.reference import EPS

_Attention = Callable[["_Calls", int, Tensor], Tensor]
"""Appends the keys and values of a layer's rotated ``[M, H + 2G, E]`` and attends: ``[M, D]``."""


class _Calls:
    """Recorded calls, with their tensors bound."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], Any]] = []

    def add(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._calls.append(partial(function, *args, **kwargs))

    def run(self) -> None:
        for call in self._calls:
            call()


class _Piece(NamedTuple):
    """The tokens of one row in a prefill, for columns ``start`` to ``start + n``."""

    row: int
    start: int
    n: int


class CpuRunner(Workspace):
    """The steps and prefills of a model on CPU.

    Arguments:
        weights: the model's, ternary ones unpacked. state: the rows.
        chunk: most tokens of a row in a prefill.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, state: State, chunk: int
    ) -> None:
        super().__init__(config, weights, state, chunk)
        self.config, self.weights, self.state = config, weights, state
        self._steps: dict[int, tuple[int, _Calls]] = {}

    # Running

    def step(self, batch: int) -> None:
        """Feed the next token of each of the first ``batch`` rows."""
        self.state.clean()
        longest = min(max(self.state.lengths[:batch].tolist()), self.state.max_len)
        columns = COLUMN_STEP * (longest // COLUMN_STEP + 1)
        recorded, calls = self._steps.get(batch, (0, None))
        if calls is None or recorded != columns:
            calls = self._step(batch, columns)
            self._steps[batch] = columns, calls
        calls.run()

    def prefill(self, tokens: Tensor, n_valid: list[int]) -> None:
        """Append the first ``n_valid[row]`` of each row's tokens, int64 ``[B, T]``."""
        state = self.state
        state.clean()
        if set(n_valid) == {1}:
            self._feed(tokens[:, 0])
            return
        pieces: list[_Piece] = []
        for row, (n, start) in enumerate(
            zip(n_valid, state.lengths[: len(n_valid)].tolist(), strict=True)
        ):
            # Pieces run together if their rows are neighbours, so that the logits lie in one piece
            # of memory, and if their tokens fit the buffers.
            if pieces and (not n or sum(piece.n for piece in pieces) + n > self.most):
                self._append(tokens, pieces)
                pieces = []
            if n:
                pieces.append(_Piece(row, start, n))
        if pieces:
            self._append(tokens, pieces)

    def _feed(self, tokens: Tensor) -> None:
        """Feed one token to each of the first rows, active or not."""
        state, b = self.state, tokens.shape[0]
        active = state.active[:b].clone()
        state.tokens[:b] = tokens
        state.active[:b] = 1
        try:
            self.step(b)
        finally:
            state.active[:b] = active

    def _append(self, tokens: Tensor, pieces: list[_Piece]) -> None:
        state = self.state
        state.unfinished.update((row, start + n) for row, start, n in pieces)
        self._chunk(torch.cat([tokens[row, :n] for row, _, n in pieces]), pieces).run()
        for row, start, n in pieces:
            state.lengths[row] = start + n
        state.unfinished.clear()

    # Recording

    def _step(self, b: int, c: int) -> _Calls:
        config, state, calls = self.config, self.state, _Calls()
        g, r, e = config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim
        at = self.columns[:b]
        calls.add(at.copy_, state.lengths[:b])
        calls.add(at.clamp_max_, state.max_len)
        cos, sin = self.cos(b, e), self.sin(b, e)
        calls.add(torch.index_select, state.cos, 0, at, out=cos)
        calls.add(torch.index_select, self.signed_sin, 0, at, out=sin)
        mask, beyond = self.mask(b, g, 1, c), self.beyond[:b, :c]
        calls.add(torch.gt, self.all_columns[:c], at.view(b, 1), out=beyond)
        none, all_ = self.constant(-torch.inf), self.constant(0.0)
        calls.add(torch.where, beyond.view(b, 1, 1, c).expand(b, g, 1, c), none, all_, out=mask)
        index = at.view(1, b, 1, 1, 1).expand(2, b, g, 1, e)

        def attention(calls: _Calls, layer: int, rotated: Tensor) -> Tensor:
            new = rotated[:, -2 * g :].view(b, 2, g, 1, e).transpose(0, 1)
            new, new_scale = self._to_cache(calls, new)
            kv = state.kv[layer, :, :b]
            if kv.element_size() == 2:  # torch scatters floats of 16 bits by way of an fp32 copy
                calls.add(kv.view(torch.int16).scatter_, 3, index, new.view(torch.int16))
            else:
                calls.add(kv.scatter_, 3, index, new)
            if state.scale is not None:
                calls.add(state.scale[layer, :, :b].scatter_, 3, index[..., 0], new_scale)
            queries, attended = rotated[:, : g * r], self.attended(b, g, r, e)
            if state.kv.dtype == torch.float32:
                k, v = state.kv[layer, :, :b].view(2, b * g, -1, e)[:, :, :c].unbind()
                if b > 1:
                    calls.add((q := self.queries(b, g * r, e)).copy_, queries)
                    queries = q
                q = queries.view(b * g, r, e)
                self._attend(calls, q, k, v, mask.view(b * g, 1, c), attended.view(b * g, r, e))
            else:
                for row in range(b):
                    k, v = self._from_cache(calls, layer, row, c)
                    q = queries[row].view(g, r, e)
                    self._attend(calls, q, k, v, mask[row], attended[row])
            return self._narrowed(calls, attended.view(b, -1))

        x = self._embedded(calls, state.tokens[:b])
        self._layers(calls, x, cos, sin, attention)
        self._head(calls, x, slice(0, b))
        calls.add(state.lengths[:b].add_, state.active[:b])
        calls.add(state.lengths[:b].clamp_max_, state.max_len)
        return calls

    def _chunk(self, tokens: Tensor, pieces: list[_Piece]) -> _Calls:
        """Record a prefill of ``tokens`` ``[M]``, those of neighbouring rows one after another."""
        config, state, calls = self.config, self.state, _Calls()
        h, e = config.n_heads, config.head_dim
        m, counts = tokens.shape[0], [piece.n for piece in pieces]

        def attention(calls: _Calls, layer: int, rotated: Tensor) -> Tensor:
            together = self.attended(m, h, e)
            for piece, of_row, out in zip(
                pieces, rotated.split(counts), together.split(counts), strict=True
            ):
                self._attend_row(calls, layer, piece, of_row, out)
            return self._narrowed(calls, together.view(m, -1))

        x = self._embedded(calls, tokens)
        int64 = torch.int64
        at = torch.cat(
            [torch.arange(start, start + n, dtype=int64, device="cpu") for _, start, n in pieces]
        )
        cos, sin = self.cos(m, e), self.sin(m, e)
        calls.add(torch.index_select, state.cos, 0, at, out=cos)
        calls.add(torch.index_select, self.signed_sin, 0, at, out=sin)
        self._layers(calls, x, cos, sin, attention)
        last = self.hidden(len(pieces), config.d_model)
        ends = torch.tensor(counts, dtype=int64, device="cpu").cumsum(0) - 1
        calls.add(torch.index_select, x, 0, ends, out=last)
        self._head(calls, last, slice(pieces[0].row, pieces[-1].row + 1))
        return calls

    def _attend_row(
        self, calls: _Calls, layer: int, piece: _Piece, rotated: Tensor, out: Tensor
    ) -> None:
        """Attention of one piece: ``[T, H + 2G, E]`` to ``[T, H, E]``."""
        state, (row, start, t) = self.state, piece
        g, h, e = self.config.n_kv_heads, self.config.n_heads, self.config.head_dim
        end = start + t
        new = rotated[:, -2 * g :].view(t, 2, g, 1, e).transpose(0, 1)
        new, new_scale = self._to_cache(calls, new)
        new = new.squeeze(3).transpose(1, 2)  # [2, G, T, E]
        calls.add(state.kv[layer, :, row, :, start:end].copy_, new)
        if state.scale is not None and new_scale is not None:
            new_scale = new_scale.squeeze(3).transpose(1, 2)
            calls.add(state.scale[layer, :, row, :, start:end].copy_, new_scale)
        if state.kv.dtype == torch.float32:
            k, v = state.kv[layer, :, row, :, :end].unbind()
        else:
            k, v = self._from_cache(calls, layer, row, end)
        q, attended = self.queries(h, t, e), self.by_head(h, t, e)
        calls.add(q.copy_, rotated[:, :h].transpose(0, 1))
        grouped = (g, h // g * t, e)
        self._attend(calls, q.view(grouped), k, v, t, attended.view(grouped))
        calls.add(out.copy_, attended.transpose(0, 1))

    def _embedded(self, calls: _Calls, tokens: Tensor) -> Tensor:
        x = self.x(tokens.shape[0], self.config.d_model)
        calls.add(torch.index_select, self.weights.embedding, 0, tokens, out=x)
        return x

    def _layers(
        self, calls: _Calls, x: Tensor, cos: Tensor, sin: Tensor, attention: _Attention
    ) -> None:
        for i, layer in enumerate(self.weights.layers):
            self._block(calls, i, layer, x, cos, sin, attention)

    def _block(
        self,
        calls: _Calls,
        i: int,
        layer: LayerWeights,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: _Attention,
    ) -> None:
        config, m = self.config, x.shape[0]
        heads, f = config.n_heads + 2 * config.n_kv_heads, config.d_ff
        qkv = self.z(m, heads * config.head_dim)
        self._product(calls, layer.qkv, self._normed(calls, x, layer.input_norm), qkv)
        y = attention(calls, i, self._rotated(calls, layer, qkv, cos, sin))
        out = self.z(m, config.d_model)
        self._product(calls, layer.o, self._normed(calls, y, layer.attn_norm), out)
        calls.add(x.add_, out)
        gate_up = self.z(m, 2 * f)
        self._product(calls, layer.gate_up, self._normed(calls, x, layer.mlp_norm), gate_up)
        gate, up = gate_up.chunk(2, 1)
        y = self.hidden(m, f)
        if config.activation == "relu2":
            calls.add(torch.clamp_min, gate, 0.0, out=y)
            calls.add(y.mul_, y)
        else:
            calls.add(torch.ops.aten.silu.out, gate, out=y)
        calls.add(y.mul_, up)
        self._product(calls, layer.down, self._normed(calls, y, layer.ffn_norm), out)
        calls.add(x.add_, out)

    def _head(self, calls: _Calls, x: Tensor, rows: slice) -> None:
        """Write the logits of ``x`` ``[B, D]``, the chosen and the next tokens of these rows."""
        state, head = self.state, self.weights.head
        logits, chosen = state.logits[rows], state.chosen[rows]
        b = x.shape[0]
        y = self._normed(calls, x, self.weights.norm)
        if isinstance(head, Dense) and head.weight.dtype != self.dtype:
            calls.add((cast := self.head_in(*y.shape)).copy_, y)
            y = cast
        if isinstance(head, Dense) and head.weight.dtype != torch.float32:
            calls.add(torch.mm, y, head.weight.t(), out=(out := self.head_out(*logits.shape)))
            calls.add(logits.copy_, out)
        else:
            self._product(calls, head, y, logits)
        calls.add(torch.argmax, logits, -1, out=chosen)
        peak, finite = self.peak(b), self.finite[:b]
        calls.add(torch.amax, logits, -1, out=peak)
        calls.add(torch.sub, peak, peak, out=peak)  # NaN where it was not finite
        calls.add(torch.eq, peak, peak, out=finite)
        calls.add(torch.where, finite, chosen, self.none, out=chosen)
        calls.add(torch.clamp_min, chosen, 0, out=state.tokens[rows])

    # The parts of a layer

    def _rms(self, calls: _Calls, x: Tensor, norm: Norm, out: Tensor) -> None:
        """fp32 ``[..., K]``, as nn.RMSNorm composes it; ``out`` may be ``x``."""
        square, moment = self.square(*x.shape), self.moment(*x.shape[:-1], 1)
        calls.add(torch.mul, x, x, out=square)
        calls.add(torch.sum, square, -1, True, out=moment)
        calls.add(moment.div_, self.constant(float(x.shape[-1])))
        calls.add(moment.add_, self.constant(norm.eps))
        calls.add(moment.rsqrt_)
        calls.add(torch.mul, x, moment, out=out)
        calls.add(out.mul_, norm.weight)

    def _normed(self, calls: _Calls, x: Tensor, norm: Norm | None) -> Tensor:
        """``[M, K]`` in the model's dtype."""
        if norm is None:
            return x
        wide = self.wide(*x.shape)
        if x.dtype == torch.float32:
            self._rms(calls, x, norm, wide)
            return wide
        calls.add(wide.copy_, x)
        self._rms(calls, wide, norm, wide)
        calls.add((y := self.y(*x.shape)).copy_, wide)
        return y

    def _quantized(self, calls: _Calls, x: Tensor) -> tuple[Tensor, Tensor]:
        """Absmax int8 over the last axis of fp32 ``[..., K]``: codes and scale ``[..., 1]``.

        As :func:`bitnet_kernels.reference.absmax_int8`, except that a NaN or an infinity stays in
        the scale, and so reaches every output.
        """
        square, scale = self.square(*x.shape), self.step_size(*x.shape[:-1], 1)
        calls.add(torch.abs, x, out=square)
        calls.add(torch.amax, square, -1, True, out=scale)
        calls.add(scale.clamp_min_, EPS)
        calls.add(scale.div_, self.constant(127.0))
        calls.add(torch.div, x, scale, out=square)
        calls.add(square.round_)
        calls.add((codes := self.codes(*x.shape)).copy_, square)
        return codes, scale

    def _product(self, calls: _Calls, matrix: Matrix, y: Tensor, out: Tensor) -> None:
        """``[M, K]`` -> ``out`` ``[M, N]``."""
        if isinstance(matrix, Dense):
            calls.add(torch.mm, y, matrix.weight.t(), out=out)
        elif isinstance(matrix, Modules):
            calls.add(_call, matrix.modules, y, out)
        else:
            if y.dtype != torch.float32:
                calls.add((wide := self.wide(*y.shape)).copy_, y)
                y = wide
            codes, scale = self._quantized(calls, y)
            acc = self.acc(*out.shape)
            scaled = out if out.dtype == torch.float32 else self.scaled(*out.shape)
            calls.add(torch._int_mm, codes, matrix.weight.t(), out=acc)
            calls.add(scaled.copy_, acc)
            calls.add(scaled.mul_, scale)
            calls.add(scaled.mul_, matrix.scale)
            if scaled is not out:
                calls.add(out.copy_, scaled)

    def _rotated(
        self, calls: _Calls, layer: LayerWeights, qkv: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Norm and rotate queries and keys, and copy values: fp32 ``[M, H + 2G, E]``.

        ``sin`` has the first half negated: see :func:`bitnet.model.rotate`.
        """
        h, g, e = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        x = qkv.view(-1, h + 2 * g, e)
        if x.dtype != torch.float32:
            calls.add((wide := self.wide(*x.shape)).copy_, x)
            x = wide
        for norm, part in ((layer.q_norm, x[:, :h]), (layer.k_norm, x[:, h : h + g])):
            if norm is not None:
                self._rms(calls, part, norm, part)
                self._rounded(calls, part)
        y = self.rotated(*x.shape)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        x_first, x_second = x[:, : h + g].chunk(2, -1)
        y_first, y_second = y[:, : h + g].chunk(2, -1)
        sin_first, sin_second = sin.chunk(2, -1)
        calls.add(torch.mul, x[:, : h + g], cos, out=y[:, : h + g])
        calls.add(y_first.addcmul_, x_second, sin_first)
        calls.add(y_second.addcmul_, x_first, sin_second)
        calls.add(y[:, h + g :].copy_, x[:, h + g :])
        self._rounded(calls, y)
        return y

    def _rounded(self, calls: _Calls, x: Tensor) -> None:
        """Round fp32 values to the model's dtype, in place."""
        if self.dtype != torch.float32:
            calls.add((low := self.narrow(*x.shape)).copy_, x)
            calls.add(x.copy_, low)

    def _narrowed(self, calls: _Calls, x: Tensor) -> Tensor:
        """fp32 ``[M, D]`` in the model's dtype."""
        if self.dtype == torch.float32:
            return x
        calls.add((low := self.hidden(*x.shape)).copy_, x)
        return low

    # The cache

    def _to_cache(self, calls: _Calls, new: Tensor) -> tuple[Tensor, Tensor | None]:
        """fp32 ``[2, M, G, 1, E]`` in the cache's dtype, and int8 scales ``[2, M, G, 1]``."""
        if self.state.scale is not None:
            codes, scale = self._quantized(calls, new)
            return codes, scale.squeeze(-1)
        if self.state.kv.dtype != torch.float32:
            calls.add((low := self.stored(*new.shape)).copy_, new)
            new = low
        return new, None

    def _from_cache(
        self, calls: _Calls, layer: int, row: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a row as fp32 ``[G, C, E]``, from a cache of another dtype."""
        stored = self.state.kv[layer, :, row, :, :columns]
        calls.add((wide := self.widened(*stored.shape)).copy_, stored)
        if self.state.scale is not None:
            scale = self.state.scale[layer, :, row, :, :columns]
            calls.add(wide.mul_, scale.unsqueeze(-1))
        k, v = wide.unbind()
        return k, v

    def _attend(
        self, calls: _Calls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | int, out: Tensor
    ) -> None:
        """Attend with queries ``[G, R, E]`` over columns ``[G, C, E]``. The mask is added to the
        scores; a number n stands for the causal mask of n tokens, the last columns."""
        scores = self.scores(q.shape[0], q.shape[1], k.shape[1])
        added, beta = (scores, 0.0) if isinstance(mask, int) else (mask, 1.0)
        alpha = self.config.head_dim**-0.5
        calls.add(torch.baddbmm, added, q, k.transpose(1, 2), beta=beta, alpha=alpha, out=scores)
        if isinstance(mask, int):
            triangle = self.causal[:mask, :mask]
            calls.add(scores.view(-1, mask, k.shape[1])[:, :, -mask:].add_, triangle)
        calls.add(torch.softmax, scores, -1, out=scores)
        calls.add(torch.bmm, scores, v, out=out)


def _call(modules: tuple[nn.Module, ...], x: Tensor, out: Tensor) -> None:
    """Call layers as modules, and write their outputs side by side into ``out``."""
    torch.cat([module(x) for module in modules], -1, out=out)
