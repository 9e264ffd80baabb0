"""A step on a GPU: the fused operators of bitnet_kernels, captured once per batch size.

:meth:`CudaRunner.step_body` is the whole step as a function of static tensors, in about eight
launches per layer. It neither waits for the device nor depends on a length on the host, so a CUDA
graph replays it as one launch. Its memory comes from the graphs' pool, at fixed addresses. All
graphs share the pool, because nothing in it is needed after a replay. A batch runs in the next
larger of a few sizes (*buckets*). A prefill is the same function on T tokens per row, not captured.

Each operator runs on any device, and so does the step. So the tests can run it without a GPU.

B rows, T tokens, D d_model, H query heads, G key-value heads, E head_dim, F d_ff.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from bitnet.engine.state import State
from bitnet.engine.weights import (
    Dense,
    Int8,
    LayerWeights,
    Matrix,
    ModelWeights,
    Modules,
    Norm,
    Ternary,
)
from bitnet.linear import BitLinear, Kernel
from bitnet.model import ModelConfig
from bitnet_kernels import (
    add_rmsnorm_quant,
    quant,
    quantized_linear,
    relu2_mul_rmsnorm_quant,
    rmsnorm_quant,
)
from bitnet_kernels.ops.decode import decode_attention, rope_append

_Input = Tensor | tuple[Tensor, Tensor, Tensor]
"""The input of a matrix: float, or for a ternary matrix codes, scales and row sums."""


class CudaRunner:
    """The steps and prefills of a model on a GPU.

    Arguments:
        weights: the model's, fused. state: the rows.
        buckets: ascending batch sizes, up to the number of rows.
        kernel: see :func:`bitnet_kernels.quantized_linear`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        state: State,
        buckets: tuple[int, ...],
        kernel: Kernel,
    ) -> None:
        self.config, self.weights, self.state = config, weights, state
        self.buckets, self.kernel = buckets, kernel
        self.batch = torch.zeros((), dtype=torch.int32, device=state.tokens.device)
        self._rows = torch.arange(
            state.tokens.shape[0], device=state.tokens.device, dtype=torch.int64
        )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._captured: list[object] = []

    def step(self, batch: int) -> None:
        """Feed the next token of each of the first ``batch`` rows."""
        bucket = next(size for size in self.buckets if size >= batch)
        with torch.cuda.device_of(self.batch):
            if bucket not in self._graphs:
                self._graphs[bucket] = self._capture(bucket)
            self.batch.fill_(batch)
            self._graphs[bucket].replay()

    def prefill(self, tokens: Tensor, n_valid: list[int]) -> None:
        """Append the first ``n_valid[row]`` of each row's tokens, int64 ``[B, T]``."""
        device = self.batch.device
        with torch.cuda.device_of(self.batch):
            counts = torch.tensor(n_valid, dtype=torch.int32, device=device)
            self._advance(tokens.to(device), counts, counts > 0)

    def workspace(self) -> list[Tensor]:
        """All buffers besides weights and state."""
        return [self.batch, self._rows]

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph:
        """Capture a step. First run it with no rows, which changes nothing, so that the kernels
        compile and tune themselves."""
        self._captured += self.held()
        self.batch.fill_(0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step_body(bucket)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.step_body(bucket)
        return graph

    def held(self) -> list[object]:
        """Codes that a capture reads and ``ModelWeights`` does not own: ``weights_quantized`` holds
        them temporarily, for layers inside other modules."""
        layers = (layer for module in self.weights.modules() for layer in module.modules())
        codes = (layer._cached_codes for layer in layers if isinstance(layer, BitLinear))
        return [one for one in codes if one is not None]

    def step_body(self, bucket: int) -> None:
        """The body of a graph: a step of the first ``bucket`` rows. Rows from ``self.batch`` on are
        computed, but not changed."""
        state = self.state
        within = self._rows[:bucket] < self.batch
        n_valid = state.active[:bucket] * within * (state.lengths[:bucket] < state.max_len)
        self._advance(state.tokens[:bucket].unsqueeze(1), n_valid, within)

    def _advance(self, tokens: Tensor, n_valid: Tensor, changed: Tensor) -> None:
        """Append ``n_valid`` (int32 ``[B]``) of each row's tokens ``[B, T]``, and write logits and
        tokens of the rows ``changed`` (bool ``[B]``)."""
        state, b = self.state, tokens.shape[0]
        logits = self._logits(tokens, n_valid)
        peak, best = logits.max(-1)
        chosen = torch.where(peak.isfinite(), best, -1)
        for old, new in (
            (state.logits[:b], logits),
            (state.chosen[:b], chosen),
            (state.tokens[:b], chosen.clamp(min=0)),
        ):
            changing = changed.unsqueeze(1) if new.dim() == 2 else changed
            old.copy_(torch.where(changing, new, old))
        state.lengths[:b].add_(n_valid)

    def _logits(self, tokens: Tensor, n_valid: Tensor) -> Tensor:
        """fp32 ``[B, V]`` after the last valid token of each row."""
        x = F.embedding(tokens, self.weights.embedding)
        added: Tensor | None = None  # to be added to the residual stream
        for i, layer in enumerate(self.weights.layers):
            (qkv,), (gate_up,) = layer.qkv, layer.gate_up
            x, read = self._enter(x, added, layer.input_norm, qkv)
            added = self._attention(i, layer, self._product(qkv, read, x.dtype), n_valid)
            x, read = self._enter(x, added, layer.mlp_norm, gate_up)
            added = self._mlp(layer, self._product(gate_up, read, x.dtype))
        if added is not None:
            x = x + added
        last = (n_valid.long() - 1).clamp(min=0)
        x = x[self._rows[: x.shape[0]], last]
        return self._head(_rms(x, self.weights.norm))

    def _attention(self, i: int, layer: LayerWeights, qkv: Tensor, n_valid: Tensor) -> Tensor:
        """``[B, T, (H + 2G) E]`` -> ``[B, T, D]``."""
        state, h, g = self.state, self.config.n_heads, self.config.n_kv_heads
        if layer.q_norm is not None and layer.k_norm is not None:
            heads = rearrange(qkv, "b t (h e) -> b t h e", e=self.config.head_dim)
            q, k, v = heads.split((h, g, g), 2)
            normed = (_rms(q, layer.q_norm), _rms(k, layer.k_norm), v)
            qkv = rearrange(torch.cat(normed, 2), "b t h e -> b t (h e)")
        k, v = state.kv[i]
        k_scale, v_scale = (None, None) if state.scale is None else state.scale[i]
        lengths = state.lengths[: qkv.shape[0]]
        q = rope_append(qkv, state.cos, state.sin, k, v, lengths, n_valid, k_scale, v_scale)
        y = decode_attention(q, k, v, lengths, k_scale, v_scale)
        return self._product(layer.o, _read(y, layer.attn_norm, layer.o), y.dtype)

    def _mlp(self, layer: LayerWeights, gate_up: Tensor) -> Tensor:
        """``[B, T, 2F]`` -> ``[B, T, D]``."""
        gate, up = gate_up.chunk(2, -1)
        norm, relu2 = layer.ffn_norm, self.config.activation == "relu2"
        read: _Input
        if isinstance(layer.down, Ternary) and norm is not None and relu2:
            read = relu2_mul_rmsnorm_quant(gate, up, norm.weight, norm.eps)
        else:
            gate = F.relu(gate).square() if relu2 else F.silu(gate)
            read = _read(gate * up, norm, layer.down)
        return self._product(layer.down, read, gate.dtype)

    def _enter(
        self, x: Tensor, added: Tensor | None, norm: Norm | None, matrix: Matrix
    ) -> tuple[Tensor, _Input]:
        """Add to the residual stream; return the stream, and the input that the matrix reads."""
        if added is None:
            return x, _read(x, norm, matrix)
        if isinstance(matrix, Ternary) and norm is not None:
            codes, scale, row_sum, x = add_rmsnorm_quant(x, added, norm.weight, norm.eps)
            return x, (codes, scale, row_sum)
        x = x + added
        return x, _read(x, norm, matrix)

    def _product(self, matrix: Matrix, read: _Input, dtype: torch.dtype) -> Tensor:
        """``[..., K]`` -> ``[..., N]``."""
        if isinstance(matrix, Ternary):
            assert isinstance(read, tuple)
            assert matrix.packed is not None
            return quantized_linear(
                *read,
                matrix.packed,
                matrix.scale,
                kernel=self.kernel,
                planes=matrix.planes,
                out_dtype=dtype,
            )
        assert isinstance(read, Tensor)
        if isinstance(matrix, Modules):
            return torch.cat([module(read) for module in matrix.modules], -1)
        return F.linear(read, matrix.weight)

    def _head(self, x: Tensor) -> Tensor:
        """Normed ``[B, D]`` -> fp32 logits ``[B, V]``."""
        head = self.weights.head
        if isinstance(head, Int8):
            return head.logits(x)
        if isinstance(head, Dense):
            x, weight = x.to(head.weight.dtype), head.weight.t()
            if x.device.type == "cuda" and x.dtype != torch.float32:
                return torch.mm(x, weight, out_dtype=torch.float32)  # bf16 logits would tie
            return torch.mm(x, weight).float()
        return self._product(head, _read(x, None, head), torch.float32).float()


def _read(x: Tensor, norm: Norm | None, matrix: Matrix) -> _Input:
    """The input of a matrix: ``x`` normed, and quantized for a ternary matrix."""
    if not isinstance(matrix, Ternary):
        return x if norm is None else _rms(x, norm)
    return quant(x) if norm is None else rmsnorm_quant(x, norm.weight, norm.eps)


def _rms(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm in fp32, in the dtype of ``x``."""
    return F.rms_norm(x.float(), norm.weight.shape, norm.weight, norm.eps).to(x.dtype)
