"""A step on a CPU: one call of the native library for the whole model and batch.

The library (:mod:`bitnet_kernels.cpu`) gets pointers to the model's own tensors once; a call then
allocates nothing and looks nothing up. The matrices are in large pages
(:mod:`bitnet_kernels.cpu.pages`). Keys and values are not, since large pages would take memory that
no token uses yet. A token passes through the operators of ``bitnet_kernels.reference`` in fp32,
whatever the dtype of the model. Norms, quantized activations and ternary products have the
reference's bits; attention, silu and matrices in full precision add floats in an order of their
own.

Two families of kernels multiply (kernels/README.md). ``dot`` reads the packed weights in place. So
does ``addsub`` with AVX2; elsewhere it reads bit planes, a second layout of the same size. The
decoder then holds no packed weights, so these are freed if the model is dropped.
"""

from functools import partial

import torch
from torch import Tensor

from bitnet.engine.state import State
from bitnet.engine.weights import Dense, Int8, Matrix, ModelWeights, Norm, Ternary, tensors_of
from bitnet.model import ModelConfig
from bitnet_kernels.cpu import model as native
from bitnet_kernels.cpu.pages import use_large_pages


def takes(weights: ModelWeights, state: State) -> bool:
    """Whether the native library can compute a model: the library is there, no layer must be called
    as a module, and nothing is in fp64 or larger than the kernels' buffers."""
    in_fp64 = torch.float64 in (weights.embedding.dtype, state.kv.dtype)
    fits = state.kv.shape[-1] <= native.MAX_HEAD_DIM and not in_fp64
    return native.available() and fits and not weights.modules()


class CpuRunner:
    """The steps and prefills of a model on a CPU.

    Arguments:
        weights: the model's, not fused. state: the rows.
        chunk: most tokens of a row in a prefill.
        addsub: multiply packed weights with addsub, which must take them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        state: State,
        chunk: int,
        addsub: bool = False,
    ) -> None:
        read = partial(_matrix, addsub=addsub)
        self._state, self._most = state, max(state.tokens.shape[0], chunk)
        layers = []
        for layer in weights.layers:
            q, k, v = (read(matrix) for matrix in layer.qkv)
            gate, up = (read(matrix) for matrix in layer.gate_up)
            layers.append(
                native.Layer(
                    input_norm=_norm(layer.input_norm),
                    q_norm=_norm(layer.q_norm),
                    k_norm=_norm(layer.k_norm),
                    attn_norm=_norm(layer.attn_norm),
                    mlp_norm=_norm(layer.mlp_norm),
                    ffn_norm=_norm(layer.ffn_norm),
                    q=q,
                    k=k,
                    v=v,
                    o=read(layer.o),
                    gate=gate,
                    up=up,
                    down=read(layer.down),
                )
            )
        model = native.Model(
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            d_ff=config.d_ff,
            relu2=config.activation == "relu2",
            embedding=weights.embedding,
            layers=layers,
            norm=native.NormWeights(*weights.norm),
            head=read(weights.head),
            max_len=state.max_len,
            kv=state.kv,
            kv_scale=state.scale,
            cos=state.cos,
            sin=state.sin,
            tokens=state.tokens,
            lengths=state.lengths,
            active=state.active,
            logits=state.logits,
            chosen=state.chosen,
        )
        self._model = native.NativeModel(model, self._most)
        matrices = [matrix for layer in weights.layers for matrix in layer.matrices()]
        every_step = [t for matrix in (*matrices, weights.head) for t in tensors_of(matrix)]
        use_large_pages([*every_step, state.kv])

    def step(self, batch: int) -> None:
        """Feed the next token of each of the first ``batch`` rows."""
        self._model.step(batch)

    def prefill(self, tokens: Tensor, n_valid: list[int]) -> None:
        """Append the first ``n_valid[row]`` of each row's tokens, int64 ``[B, T]``."""
        starts = self._state.lengths[: len(n_valid)].tolist()
        together: list[tuple[int, int, int]] = []
        for row, (n, start) in enumerate(zip(n_valid, starts, strict=True)):
            if sum(piece[2] for piece in together) + n > self._most:
                self._append(tokens, together)
                together = []
            if n:
                together.append((row, start, n))
        if together:
            self._append(tokens, together)

    def workspace(self) -> list[Tensor]:
        """All that a step reads or writes besides weights and state."""
        return [self._model.workspace]

    def _append(self, tokens: Tensor, pieces: list[tuple[int, int, int]]) -> None:
        self._model.prefill(torch.cat([tokens[row, :n] for row, _, n in pieces]), pieces)
        for row, start, n in pieces:
            self._state.lengths[row] = start + n


def _matrix(matrix: Matrix, addsub: bool) -> native.MatrixWeights:
    if isinstance(matrix, Dense):
        return native.DenseWeights(matrix.weight)
    if isinstance(matrix, Int8):
        return native.DenseWeights(matrix.weight, matrix.scale)
    assert isinstance(matrix, Ternary)
    if matrix.planes is not None:
        return native.TernaryWeights(matrix.scale, planes=matrix.planes)
    return native.TernaryWeights(matrix.scale, packed=matrix.packed, addsub=addsub)


def _norm(norm: Norm | None) -> native.NormWeights | None:
    return None if norm is None else native.NormWeights(*norm)
