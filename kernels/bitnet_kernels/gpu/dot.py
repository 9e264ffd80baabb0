"""The matmul on multiplier units: codes decoded to int8, then ``tl.dot`` int8 x int8 -> int32.

It reads the same bytes as the multiplication-free kernel: a tile of bytes holds four slices of K,
one a quarter-plane, and each is one ``tl.dot`` against the matching slice of x. On the tensor
cores of sm_80 and later; the faster of the two for many tokens.
"""

import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.gpu.common import (
    INTERPRETED,
    Rescale,
    Tile,
    launch,
    store_tile,
    tile_rows_cols,
)


@triton.jit
def dot_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    s_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    P: tl.tensor,
    GAMMA_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """One ``[BLOCK_M, BLOCK_N]`` tile of outputs; the arguments are those of ``common.launch``."""
    rows, cols = tile_rows_cols(N, BLOCK_M, BLOCK_N)
    lanes = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, P, BLOCK_P):
        i = start + lanes
        # 0x55 is four codes 1 (weight 0): past N and P whatever x is read adds nothing.
        w_mask = (i < P)[:, None] & (cols < N)[None, :]
        byte = tl.load(w_ptr + cols[None, :] * P + i[:, None], w_mask, other=0x55)
        for plane in tl.static_range(4):
            k = plane * P + i
            x_mask = (rows < M)[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + rows[:, None] * K + k[None, :], x_mask, other=0)
            weight = ((byte >> (2 * plane)) & 3).to(tl.int8) - 1
            acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
    store_tile(acc, rows, cols, y_ptr, s_ptr, gamma_ptr, bias_ptr, M, N, GAMMA_PER_ROW)


def tile(m: int, interpreted: bool = INTERPRETED) -> Tile:
    """The tile for M = ``m`` tokens. 32 along K is the least that an int8 ``tl.dot`` takes; at 64
    sm_80 spills registers. The interpreter pays by the operation and not by the lane, and gets a
    larger one."""
    power_of_2 = triton.next_power_of_2(max(m, 1))
    if interpreted:
        return Tile(m=min(power_of_2, 128), n=128, p=64, num_warps=4)
    return Tile(m=min(max(power_of_2, 16), 64), n=64, p=32, num_warps=4)


def matmul(x_q: Tensor, packed: Tensor, rescale: Rescale | None = None) -> Tensor:
    """See :func:`bitnet_kernels.gpu.common.launch`."""
    return launch(dot_kernel, tile(x_q.shape[0]), x_q, packed, rescale)
