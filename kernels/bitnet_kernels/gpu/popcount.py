"""The multiplication-free matmul for few tokens, one bit of the activations at a time (addsub).

Both operands are bit planes: of the weights Z (is not 0) and S (is -1), of the activations bits
b = 0..7 of their two's complement. 32 columns take three instructions per plane:

    t = (x_b ^ S) & Z                                    LOP3: x_b, its complement, or 0
    sum_k w x = sum_b (+-)2^b popcount(t_b) + #(w = -1)  the sign bit's plane counts negative

since ~x = -x - 1. POPC runs at a quarter of the rate of the others, so a carry-save adder, two
LOP3, adds words first (Harley and Seal; Warren, "Hacker's Delight", 5-1): one register of ones per
plane remains, and only the carries, half the number of words, are counted. Every plane has a
separate count: the epilogue shifts it by b once per output, so the loop neither shifts nor
multiplies.

The weights' planes are a second layout (``packing.bit_planes``), made once when a layer is loaded.
:func:`activation_planes` makes the planes of the activations before each matmul.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.dispatch import TileConfig
from bitnet_kernels.gpu.common import (
    INTERPRETED,
    Spec,
    await_inputs,
    describe,
    finish,
    launch_options,
    prefetch_weights,
    program,
)
from bitnet_kernels.gpu.gemv import LANE_WORDS, quarters

# $2 ones, $3 count, $4..7 Z, $8..11 S, $12..15 one plane of activations -> $0 ones, $1 count.
# 0x28 is (a ^ b) & c, 0xE8 the majority of three, 0x96 their exclusive or.
PLANE_SUM = tl.constexpr("""{
.reg .b32 t, u, v, ones, carry, more;
lop3.b32 t, $12, $8, $4, 0x28;
lop3.b32 u, $13, $9, $5, 0x28;
lop3.b32 carry, $2, t, u, 0xE8;
lop3.b32 ones, $2, t, u, 0x96;
lop3.b32 t, $14, $10, $6, 0x28;
lop3.b32 v, $15, $11, $7, 0x28;
lop3.b32 more, ones, t, v, 0xE8;
lop3.b32 $0, ones, t, v, 0x96;
popc.b32 carry, carry;
popc.b32 more, more;
add.s32 carry, carry, more;
add.s32 $1, $3, carry;
}""")
# $1 count, $2..5 S -> $0 count.
NEGATIVES = tl.constexpr("""{
.reg .b32 a, b, c, d;
popc.b32 a, $2;
popc.b32 b, $3;
popc.b32 c, $4;
popc.b32 d, $5;
add.s32 a, a, b;
add.s32 c, c, d;
add.s32 a, a, $1;
add.s32 $0, a, c;
}""")
POPC = tl.constexpr("popc.b32 $0, $1;")


@triton.jit
def popcount(word: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """The number of set bits of each int32. Without PTX it adds ever wider fields."""
    if ASM:
        return tl.inline_asm_elementwise(POPC, "=r,r", [word], tl.int32, True, 1)
    word = (word & 0x55555555) + ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word & 0x0F0F0F0F) + ((word >> 4) & 0x0F0F0F0F)
    word = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (word & 0xFFFF) + ((word >> 16) & 0xFFFF)


@triton.jit
def step(
    sums: tl.tuple,
    negatives: tl.tensor,
    w_ptrs: tl.tensor,
    x_ptr: tl.tensor,
    at: tl.tensor,
    row: tl.tensor,
    M: tl.tensor,
    W: tl.tensor,
    BLOCK_M: tl.constexpr,
    ASM: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """Add one block of words to the sums. A token has 16 sums: per plane its ones and its count of
    twos."""
    x_at = at + at // 128 * (7 * 128)
    inside: tl.tensor = at < W if MASKED else None
    w_inside = inside[None, :, :] if MASKED else None
    other: tl.constexpr = 0 if MASKED else None
    z = tl.load(w_ptrs + at[None, :, :], w_inside, other=other, eviction_policy="evict_first")
    s = tl.load(w_ptrs + W + at[None, :, :], w_inside, other=other, eviction_policy="evict_first")
    z0, z1, z2, z3 = quarters(z)
    s0, s1, s2, s3 = quarters(s)
    if ASM:
        negatives = tl.inline_asm_elementwise(
            NEGATIVES, "=r,r,r,r,r,r", [negatives, s0, s1, s2, s3], tl.int32, True, 1
        )
    else:
        negatives += popcount(s0, ASM) + popcount(s1, ASM) + popcount(s2, ASM) + popcount(s3, ASM)
    new: tl.tuple = ()
    for m in tl.static_range(BLOCK_M):
        # Rows past M repeat the last one, and are not stored.
        x_ptrs = x_ptr + tl.minimum(row + m, M - 1) * (tl.cdiv(W, 128) * 1024) + x_at
        for b in tl.static_range(8):
            ones, count = sums[16 * m + 2 * b], sums[16 * m + 2 * b + 1]
            x0, x1, x2, x3 = quarters(tl.load(x_ptrs + b * 128))
            x0, x1, x2, x3 = x0[None, :], x1[None, :], x2[None, :], x3[None, :]
            if ASM:
                ones, count = tl.inline_asm_elementwise(
                    PLANE_SUM,
                    "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
                    [ones, count, z0, z1, z2, z3, s0, s1, s2, s3, x0, x1, x2, x3],
                    (tl.int32, tl.int32),
                    True,
                    1,
                )
            else:
                t, u = (x0 ^ s0) & z0, (x1 ^ s1) & z1
                count += popcount((ones & t) | (ones & u) | (t & u), ASM)
                ones = ones ^ t ^ u
                t, u = (x2 ^ s2) & z2, (x3 ^ s3) & z3
                count += popcount((ones & t) | (ones & u) | (t & u), ASM)
                ones = ones ^ t ^ u
            new = new + (ones, count)
    return new, negatives


@triton.jit
def popcount_kernel(
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
    ASM: tl.constexpr,
) -> None:
    """x int32 planes ``[M, 8, P/4]``, w int32 planes ``[N, 2, P/4]`` -> y ``[M, N]``; P is the
    length of a plane in bytes."""
    BLOCK_W: tl.constexpr = BLOCK_K // 32
    GROUPS: tl.constexpr = LANE_WORDS // BLOCK_W
    ROWS: tl.constexpr = BLOCK_N // GROUPS
    tile, row, col, part = program(M, N, BLOCK_M, BLOCK_N, SPLIT_K)
    cols = col + tl.arange(0, ROWS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    W = P // 4
    per_part = tl.cdiv(tl.cdiv(W, BLOCK_W), SPLIT_K) * BLOCK_W
    begin = tl.minimum(part * per_part, W)
    end = tl.minimum(begin + per_part, W)
    whole = begin + (end - begin) // BLOCK_W * BLOCK_W
    for plane in tl.static_range(2):
        prefetch_weights(w_ptr, col, plane * W + begin, N, 2 * W, BLOCK_N, BLOCK_W)
    await_inputs()

    # Every group of lanes reads the same activations.
    at = begin + tl.arange(0, BLOCK_W)[None, :] + tl.zeros((GROUPS, 1), dtype=tl.int32)
    w_ptrs = w_ptr + tl.minimum(cols, N - 1)[:, :, None] * (2 * W)
    negatives = tl.zeros((ROWS, GROUPS, BLOCK_W // 4), dtype=tl.int32)
    sums = (negatives,) * (16 * BLOCK_M)
    for _ in range(begin, whole, BLOCK_W):
        sums, negatives = step(sums, negatives, w_ptrs, x_ptr, at, row, M, W, BLOCK_M, ASM, False)
        at += BLOCK_W
    if whole < end:
        sums, negatives = step(sums, negatives, w_ptrs, x_ptr, at, row, M, W, BLOCK_M, ASM, True)

    totals: tl.tuple = ()
    for m in tl.static_range(BLOCK_M):
        total = negatives
        for b in tl.static_range(8):
            plane = popcount(sums[16 * m + 2 * b], ASM) + (sums[16 * m + 2 * b + 1] << 1)
            if b == 7:
                total -= plane << 7
            else:
                total += plane << b
        totals = totals + (tl.sum(total, 2),)
    rows = row + tl.zeros((1, 1), dtype=tl.int64)
    finish(
        totals, rows, cols, tile, y_ptr, row_sum_ptr, s_x_ptr, scale_ptr, bias_ptr, partial_ptr,
        arrived_ptr, M, N, SCALE_PER_ROW, SPLIT_K,
    )  # fmt: skip


@triton.jit
def activation_planes_kernel(
    x_ptr: tl.tensor, planes_ptr: tl.tensor, K: tl.tensor, BLOCKS: tl.tensor, WORDS: tl.constexpr
) -> None:
    """Turn 32 * WORDS codes of one token into WORDS words of 8 planes."""
    await_inputs()
    PIECES: tl.constexpr = 128 // WORDS
    piece = tl.program_id(0) % (PIECES * BLOCKS)
    row = (tl.program_id(0) // (PIECES * BLOCKS)).to(tl.int64)
    words, bits = tl.arange(0, WORDS), tl.arange(0, 32)
    k = (piece * WORDS + words[:, None]) * 32 + bits[None, :]
    x = tl.load(x_ptr + row * K + k, k < K, other=0).to(tl.int32)
    block = planes_ptr + row * (BLOCKS * 1024) + piece // PIECES * 1024
    for b in tl.static_range(8):
        word = tl.sum(((x >> b) & 1) << bits[None, :], 1)
        tl.store(block + b * 128 + piece % PIECES * WORDS + words, word)


def activation_planes(x_q: Tensor) -> Tensor:
    """int8 ``[M, K]`` -> int32 ``[M, ceil(K/4096), 8, 128]``: bit ``i`` of word ``q`` of plane
    ``b`` is bit ``b`` of column ``32 q + i`` of the block. A block holds its planes one after the
    other, so that one address serves all eight."""
    m, k = x_q.shape
    blocks, words = triton.cdiv(k, 4096), 128 if INTERPRETED else 32
    planes = x_q.new_empty((m, blocks, 8, 128), dtype=torch.int32)
    if m:
        with torch.cuda.device_of(x_q):
            activation_planes_kernel[(m * blocks * 128 // words,)](
                x_q,
                planes,
                k,
                blocks,
                WORDS=words,
                num_warps=1,
                **launch_options(x_q.device),
            )
    return planes


def spec(config: TileConfig) -> Spec:
    """The kernel in a configuration, compiled ahead of time."""
    name = f"popcount M={config.block_m}"
    return describe(name, "addsub", popcount_kernel, config, "*i32", "*i32", ASM=True)


def specs() -> list[Spec]:
    """The forms for few tokens: 4 rows per lane while the sums fit, fewer rows with more tokens."""
    return [spec(TileConfig(m, rows, 4096)) for m, rows in ((1, 4), (2, 2), (4, 1))]
