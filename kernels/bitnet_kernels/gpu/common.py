"""What the matmul kernels share: which tile a program owns, the epilogue, and the launch.

M tokens, N out_features, K in_features, P = bytes in a packed row (a quarter of K padded to 64).
A kernel differs from the next one only in how it fills its int32 accumulators.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton runs kernels in its CPU interpreter. TRITON_INTERPRET is read when a function is
decorated, so what Triton's own functions became when it was imported is what counts."""


class Rescale(NamedTuple):
    """What turns accumulators into outputs: ``((acc * s_x) * gamma) + bias``, cast to ``dtype``.

    s_x: fp32 ``[M]``; gamma: fp32 ``[]`` or ``[N]``; bias: any float dtype, ``[N]``, or None.
    """

    s_x: Tensor
    gamma: Tensor
    bias: Tensor | None
    dtype: torch.dtype


class Tile(NamedTuple):
    """The ``m`` by ``n`` outputs that one program computes, ``p`` packed bytes a row at a time."""

    m: int
    n: int
    p: int
    num_warps: int


@triton.jit
def tile_rows_cols(N: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tuple:
    """Rows and columns of this program's tile. The grid has one dimension, which may hold 2^31
    programs (the others stop at 65535); neighbours share rows of x. int64: products with K or N
    may pass 2^31."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, cols


@triton.jit
def store_tile(
    acc: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    y_ptr: tl.tensor,
    s_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    GAMMA_PER_ROW: tl.constexpr,
) -> None:
    """The epilogue, in the order of :func:`bitnet_kernels.reference.rescale`; with ``s_ptr`` None
    it stores the accumulators themselves."""
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + cols[None, :]
    if s_ptr is None:
        tl.store(y_ptrs, acc, mask)
    else:
        s_x = tl.load(s_ptr + rows, rows < M, other=0.0)
        y = acc.to(tl.float32) * s_x[:, None]
        if GAMMA_PER_ROW:
            y = y * tl.load(gamma_ptr + cols, cols < N, other=0.0)[None, :]
        else:
            y = y * tl.load(gamma_ptr)
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask)


def launch(kernel: Any, tile: Tile, x_q: Tensor, packed: Tensor, rescale: Rescale | None) -> Tensor:
    """Run a matmul kernel: int8 ``[M, K]`` and uint8 ``[N, P]`` -> ``[M, N]``.

    Returns int32 accumulators, or with ``rescale`` outputs of its dtype.
    """
    m, k = x_q.shape
    n, p = packed.shape
    s_x, gamma, bias, dtype = rescale or (None, None, None, torch.int32)
    # The interpreter of Triton 3.9 rounds fp32 to bf16 wrongly (ties away from zero, lost carries),
    # so there the cast is torch's.
    stored_dtype = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    y = x_q.new_empty((m, n), dtype=stored_dtype)
    if m and n:
        with torch.cuda.device_of(x_q):  # Triton launches on the current device
            kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
                x_q.contiguous(),
                packed.contiguous(),
                y,
                s_x,
                None if gamma is None else gamma.contiguous(),
                None if bias is None else bias.contiguous(),
                m,
                n,
                k,
                p,
                GAMMA_PER_ROW=gamma is not None and gamma.dim() == 1,
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                BLOCK_P=tile.p,
                num_warps=tile.num_warps,
                enable_fp_fusion=False,  # an FMA would skip a rounding that the reference makes
            )
    return y.to(dtype)
