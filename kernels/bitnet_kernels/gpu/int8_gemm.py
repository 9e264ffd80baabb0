"""The matmul of training: int8 by int8 codes on tensor cores, with the rescale in its epilogue.

Training has thousands of tokens and a weight that changes at every step, so nothing is packed: both
operands are plain int8 with K along their rows, as tensor cores need. The tokens are the left
operand, so that the accumulators' columns run along the outputs' rows and are stored 16 bytes at a
time. The int32 sums never reach memory: writing and reading them would move four times the bytes of
the outputs.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from bitnet_kernels.dispatch import TileConfig, key_of, shared_limit
from bitnet_kernels.gpu.common import (
    Rescale,
    Spec,
    aligned,
    await_inputs,
    launch_options,
    program,
    spec_of,
)
from bitnet_kernels.gpu.exact import narrow, widen

_ALIGNMENT = 16
"""Bytes of a load: rows are padded to a multiple of this."""
_L2_BYTES = 32
"""Bytes per clock that an SM gets from L2, roughly, on any of these GPUs."""
CONFIGS = {
    90: (
        TileConfig(128, 256, 128, 1, 8, 4),
        TileConfig(128, 128, 128, 1, 8, 3),  # two programs fit an SM: one computes while one waits
        TileConfig(64, 128, 128, 1, 4, 4),
    ),
    80: (TileConfig(128, 128, 128, 1, 8, 4), TileConfig(64, 128, 128, 1, 4, 4)),  # 128 x 256 spills
    89: (TileConfig(128, 128, 128, 1, 8, 3), TileConfig(64, 128, 128, 1, 4, 3)),
}
"""The tiles of the product, by the compute capability whose shared memory they fit, the largest
first. For N a multiple of 16 all compile to int8 tensor-core instructions and spill no register.

Triton 3.9 waits for an integer product before it starts the next one (not so for fp8), so an H100
with a single program per SM idles between steps; a step of 128 columns keeps the idle time short.
"""
_MACS = {90: 4096, 80: 2048, 89: 1024}
"""int8 multiply-accumulates per clock and SM, from the vendor's data sheets."""


@triton.jit
def int8_gemm_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    s_x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    SCALE_PER_ROW: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of x int8 ``[M, K]`` times w int8 ``[N, K]``, rescaled in the order of
    :func:`bitnet_kernels.reference.rescale`; the int32 sums themselves if ``s_x_ptr`` is None.
    ``EVEN_K``: K is a multiple of BLOCK_K, so loads need no mask."""
    await_inputs()
    _, row, col, _ = program(M, N, BLOCK_M, BLOCK_N, 1)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat the last one, and are not stored.
    x_ptrs = x_ptr + tl.minimum(rows, M - 1)[:, None] * K + lanes[None, :]
    w_ptrs = w_ptr + tl.minimum(cols, N - 1)[None, :] * K + lanes[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, (start + lanes < K)[None, :], other=0)
            w = tl.load(w_ptrs, (start + lanes < K)[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    y_ptrs = y_ptr + rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if s_x_ptr is None:
        tl.store(y_ptrs, acc, mask)
    else:
        y = acc.to(tl.float32) * tl.load(s_x_ptr + rows, rows < M, other=0.0)[:, None]
        if SCALE_PER_ROW:
            y = y * tl.load(scale_ptr + cols, cols < N, other=0.0)[None, :]
        else:
            y = y * tl.load(scale_ptr)
        if bias_ptr is not None:
            y = y + widen(tl.load(bias_ptr + cols, cols < N, other=0.0)).to(tl.float32)[None, :]
        tl.store(y_ptrs, narrow(y, y_ptr.dtype.element_ty), mask)


def int8_gemm(config: TileConfig, x: Tensor, w: Tensor, rescale: Rescale | None = None) -> Tensor:
    """Exact ``x @ w.T`` of any int8 values: ``[M, K]`` and ``[N, K]``, K >= 1 -> ``[M, N]``: int32
    sums, or with ``rescale`` outputs in its dtype."""
    (m, k), n = x.shape, w.shape[0]
    if padding := -k % _ALIGNMENT:
        x, w, k = pad(x, (0, padding)), pad(w, (0, padding)), k + padding
    s_x, scale, bias, dtype = rescale or (None, None, None, torch.int32)
    y = x.new_empty((m, n), dtype=dtype)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    if tiles:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            int8_gemm_kernel[(tiles,)](
                aligned(x),
                aligned(w),
                y,
                None if s_x is None else s_x.contiguous(),
                None if scale is None else scale.contiguous(),
                None if bias is None else bias.contiguous(),
                m,
                n,
                k,
                SCALE_PER_ROW=scale is not None and scale.dim() == 1,
                EVEN_K=k % config.block_k == 0,
                **config.blocks(),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **launch_options(x.device),
            )
    return y


def tile_for(m: int, n: int, device: torch.device) -> TileConfig:
    """The tile for a product of M tokens and N outputs on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return best_tile(m, n, key_of(device)[0], properties.multi_processor_count)


@lru_cache(maxsize=65536)
def best_tile(m: int, n: int, capability: int, n_sms: int) -> TileConfig:
    """The configuration that takes the fewest clocks in a static model. Programs run in waves of
    one per SM, and a program takes the longer of its multiply-accumulates and its loads from L2.
    Large tiles load less, small ones leave fewer SMs idle."""
    fitting = next(one for one in CONFIGS if shared_limit(one) <= shared_limit(capability))

    def clocks(config: TileConfig) -> float:
        waves = -(-(-(-m // config.block_m) * -(-n // config.block_n)) // n_sms)
        macs, loads = config.block_m * config.block_n, config.block_m + config.block_n
        return waves * max(macs / _MACS[fitting], loads / _L2_BYTES)

    return min(CONFIGS[fitting], key=clocks)


def spec(config: TileConfig, outputs: str = "*bf16") -> Spec:
    """A configuration, compiled ahead of time, for K a multiple of its step. It gives outputs with
    one scale per tensor and no bias, or int32 sums (``outputs`` ``"*i32"``)."""
    scale = None if outputs == "*i32" else "*fp32"
    operands = {"x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": outputs}
    types = operands | {"s_x_ptr": scale, "scale_ptr": scale, "bias_ptr": None}
    kind = "matmul" if outputs == "*i32" else "linear"
    return spec_of(
        f"int8_{kind} {config.block_m}x{config.block_n}",
        "dot",
        int8_gemm_kernel,
        types,
        {"SCALE_PER_ROW": False, "EVEN_K": True} | config.blocks(),
        config.num_warps,
        config.num_stages,
        sizes=("N", "K"),
    )


def specs() -> list[Spec]:
    """Each tile, and one with int32 sums. These are the A100's tiles, which compile for any GPU."""
    return [*(spec(config) for config in CONFIGS[80]), spec(CONFIGS[80][0], "*i32")]
