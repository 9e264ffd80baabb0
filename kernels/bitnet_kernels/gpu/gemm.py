"""The matmul on int8 tensor cores, for more tokens (family dot).

The weights are the *left* operand, decoded in registers on their way into the tensor core, so no
decoded weight is written back to shared memory. The tokens, at least 8, are the right operand
(swapped operands: y^T = W x^T). One tile of bytes holds four slices of K, one per quarter-plane,
and each takes one ``tl.dot`` with the matching slice of x. Codes enter as w + 1: decoding four of
them takes a shift and an AND, and the epilogue subtracts the sum of the activations.

Every tile repeats the decoding. For thousands of tokens that costs more than it saves, so the
weights are unpacked once to int8 in a scratch buffer, and the same kernel runs on one plane of
plain codes (formulation "unpacked").
"""

import triton
import triton.language as tl

from bitnet_kernels.dispatch import TileConfig
from bitnet_kernels.gpu.common import (
    Spec,
    await_inputs,
    describe,
    finish,
    prefetch_weights,
    program,
)

# $1 four packed bytes -> $0 the codes of one plane.
DECODE = tl.constexpr(
    tuple(f"{{ shr.u32 $0, $1, {2 * j}; and.b32 $0, $0, 0x03030303; }}" for j in range(4))
)


@triton.jit
def decode(packed: tl.tensor, plane: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """The codes w + 1 of a quarter-plane, int8. Plain Triton decodes one byte per register,
    the assembly four."""
    if ASM:
        return tl.inline_asm_elementwise(DECODE[plane], "=r,r", [packed], tl.int8, True, 4)
    return ((packed >> (2 * plane)) & 3).to(tl.int8)


@triton.jit
def gemm_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    row_sum_ptr: tl.tensor,
    s_x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    SCALE_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PLANES: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """x int8 ``[M, PLANES * P]``; w uint8 ``[N, P]`` packed (4 planes), or int8 ``[N, P]`` (1)."""
    BLOCK_P: tl.constexpr = BLOCK_K // PLANES
    tile, row, col, part = program(M, N, BLOCK_M, BLOCK_N, SPLIT_K)
    rows = row + tl.arange(0, BLOCK_M)[None, :]
    cols = col + tl.arange(0, BLOCK_N)[:, None]
    per_part = tl.cdiv(tl.cdiv(P, BLOCK_P), SPLIT_K) * BLOCK_P
    end = tl.minimum((part + 1) * per_part, P)
    if PLANES == 4:  # else the preceding kernel is still unpacking the weights
        prefetch_weights(w_ptr, col, part * per_part, N, P, BLOCK_N, BLOCK_P)
    await_inputs()
    # Rows and columns past the end repeat the last one, and are not stored.
    x_ptrs = x_ptr + tl.minimum(rows, M - 1) * (PLANES * P)
    w_ptrs = w_ptr + tl.minimum(cols, N - 1) * P
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for start in range(part * per_part, end, BLOCK_P):
        at = start + tl.arange(0, BLOCK_P)
        # Past the end of a row the activations are 0, whatever the weights.
        w = tl.load(w_ptrs + at[None, :], (at < end)[None, :], other=0)
        for plane in tl.static_range(PLANES):
            x = tl.load(x_ptrs + plane * P + at[:, None], (at < end)[:, None], other=0)
            codes = w if PLANES == 1 else decode(w, plane, ASM)
            acc = tl.dot(codes, x, acc, out_dtype=tl.int32)

    finish(
        (acc,), rows, cols, tile, y_ptr, row_sum_ptr, s_x_ptr, scale_ptr, bias_ptr, partial_ptr,
        arrived_ptr, M, N, SCALE_PER_ROW, SPLIT_K,
    )  # fmt: skip


def spec(name: str, config: TileConfig) -> Spec:
    """``"gemm"`` or ``"unpacked"`` in a configuration, compiled ahead of time."""
    packed = name == "gemm"
    return describe(
        f"{name} M={config.block_m}",
        "dot",
        gemm_kernel,
        config,
        "*i8",
        "*u8" if packed else "*i8",
        row_sum=packed,
        PLANES=4 if packed else 1,
        ASM=True,
    )


def specs() -> list[Spec]:
    """The forms from 8 tokens to thousands."""
    forms = ((8, 4, 4), (16, 4, 4), (64, 8, 3), (128, 8, 3))
    configs = [TileConfig(m, 128, 256, 1, warps, stages) for m, warps, stages in forms]
    return [
        *(spec("gemm", config) for config in configs),
        spec("unpacked", TileConfig(128, 128, 64, 1, 8, 4)),
    ]
