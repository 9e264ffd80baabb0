"""The multiplication-free matmul, in plain ``tl``.

No instruction that multiplies touches an activation or a weight: a code *selects* x, -x or 0 and
the selected values are added. The one fp32 multiply by s_x and by gamma is the epilogue's, once
per output. This is formulation 5 of the kernel contract: the clearest, the one that the
interpreter runs, and the slowest; it also stays as the branch that faster ones are tested against.

Partial sums are kept a lane (``[BLOCK_M, BLOCK_N, BLOCK_P]``) and reduced once, after the loop.
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
def addsub_kernel(
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
    partial = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_P), dtype=tl.int32)
    for start in range(0, P, BLOCK_P):
        i = start + lanes
        # 0x55 is four codes 1 (weight 0): past N and P whatever x is read adds nothing.
        w_mask = (cols < N)[:, None] & (i < P)[None, :]
        byte = tl.load(w_ptr + cols[:, None] * P + i[None, :], w_mask, other=0x55)
        for plane in tl.static_range(4):
            k = plane * P + i
            x_mask = (rows < M)[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + rows[:, None] * K + k[None, :], x_mask, other=0)
            x = x.to(tl.int32)[:, None, :]
            code = ((byte >> (2 * plane)) & 3)[None, :, :]
            partial += tl.where(code == 2, x, tl.where(code == 0, -x, 0))
    acc = tl.sum(partial, 2)
    store_tile(acc, rows, cols, y_ptr, s_ptr, gamma_ptr, bias_ptr, M, N, GAMMA_PER_ROW)


def tile(m: int, interpreted: bool = INTERPRETED) -> Tile:
    """The tile for M = ``m`` tokens: 4096 lanes whatever M, so that registers do not spill. The
    interpreter pays by the operation and not by the lane, and gets a larger one."""
    power_of_2 = triton.next_power_of_2(max(m, 1))
    if interpreted:
        return Tile(m=min(power_of_2, 64), n=64, p=64, num_warps=4)
    block_m = min(power_of_2, 16)
    return Tile(m=block_m, n=max(64 // block_m, 8), p=64 if block_m < 16 else 32, num_warps=4)


def matmul(x_q: Tensor, packed: Tensor, rescale: Rescale | None = None) -> Tensor:
    """See :func:`bitnet_kernels.gpu.common.launch`."""
    return launch(addsub_kernel, tile(x_q.shape[0]), x_q, packed, rescale)
