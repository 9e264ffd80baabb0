"""The matmul for few tokens over packed words, in two formulations.

A lane holds 16-byte pieces of weight rows, four 32-bit words of 16 codes each, and the matching
activations. Its sums stay in registers and are added across lanes once, after the loop. A program
has one warp, laid out ``[rows in registers, groups of lanes, words]``, so that no value passes
through shared memory.

**sad**, multiplication-free (family addsub), four weights in four instructions:

    u = (x ^ 127) & Z        one LOP3; per byte 127 - x, or 0 where w = 0
    sum += |u - B|           VABSDIFF4, which adds the four bytes' absolute differences
    Z = FF 00 FF, B = 00 7F FE for w = -1 0 +1: two PRMTs that look the codes up in a 4-byte table

    w = -1: |127 - x - 0| = 127 - x     w = +1: |127 - x - 254| = 127 + x     w = 0: |0 - 127|

so every column adds w x + 127, whatever its weight. This needs x >= -127, which holds for the
quantizer's codes. For any int8 (FULL_RANGE) B is FF where w = +1. Those columns add one too many,
so the kernel counts them.

**dp4a** (family dot), four weights in two instructions: one AND keeps the codes of a quarter-plane
in place, DP4A multiplies them there, and the four planes' sums are shifted down at the end. A code
is w + 1, so the sum of the activations is subtracted.

NVIDIA's PTX ISA describes the instructions (prmt, vabsdiff4, dp4a). Without PTX a plain branch
selects x, -x or 0.
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

LANE_WORDS = tl.constexpr(128)
"""Words of a row that a warp loads at once: 32 lanes, 16 bytes each."""

# $8 packed word; -> $0..3 Z, $4..7 B for columns (i, i + 2P, i+1, i+1 + 2P), the same from byte 2,
# then both for planes 1 and 3. A selector is a nibble 4 + code: entries 4..7 are the second
# table, which (unlike the first) can be an immediate.
SAD_TABLES = tl.constexpr("""{
.reg .b32 low, high;
lop3.b32 low, $8, 0x33333333, $9, 0xEA;
shr.u32 high, $8, 2;
lop3.b32 high, high, 0x33333333, $9, 0xEA;
prmt.b32 $0, 0, 0x00FF00FF, low;
prmt.b32 $4, 0, TABLE, low;
shr.u32 low, low, 16;
prmt.b32 $1, 0, 0x00FF00FF, low;
prmt.b32 $5, 0, TABLE, low;
prmt.b32 $2, 0, 0x00FF00FF, high;
prmt.b32 $6, 0, TABLE, high;
shr.u32 high, high, 16;
prmt.b32 $3, 0, 0x00FF00FF, high;
prmt.b32 $7, 0, TABLE, high;
}""")
SAD_TABLES_SYMMETRIC = tl.constexpr(SAD_TABLES.value.replace("TABLE", "0x00FE7F00"))
SAD_TABLES_FULL = tl.constexpr(SAD_TABLES.value.replace("TABLE", "0x00FF7F00"))
# $4..7 words of planes 0..3 -> $0..3 in the order of the tables.
SAD_ORDER = tl.constexpr("""{
prmt.b32 $0, $4, $6, 0x5140;
prmt.b32 $1, $4, $6, 0x7362;
prmt.b32 $2, $5, $7, 0x5140;
prmt.b32 $3, $5, $7, 0x7362;
}""")
# $1 sum, $2..5 Z, $6..9 B, $10..13 activations -> $0 sum. 0x28 is (a ^ b) & c.
SAD_SUM = tl.constexpr("""{
.reg .b32 u, sum;
lop3.b32 u, $10, 0x7F7F7F7F, $2, 0x28;
vabsdiff4.u32.u32.u32.add sum, u, $6, $1;
lop3.b32 u, $11, 0x7F7F7F7F, $3, 0x28;
vabsdiff4.u32.u32.u32.add sum, u, $7, sum;
lop3.b32 u, $12, 0x7F7F7F7F, $4, 0x28;
vabsdiff4.u32.u32.u32.add sum, u, $8, sum;
lop3.b32 u, $13, 0x7F7F7F7F, $5, 0x28;
vabsdiff4.u32.u32.u32.add $0, u, $9, sum;
}""")
# $1 count, $2 packed word -> $0 count of weights +1: the codes whose upper bit is set.
SAD_COUNT = tl.constexpr("""{
.reg .b32 ones;
and.b32 ones, $2, 0xAAAAAAAA;
popc.b32 ones, ones;
add.s32 $0, $1, ones;
}""")
# $4..7 sums of the planes, $8 packed word, $9..12 activations -> $0..3 sums.
DP4A_SUM = tl.constexpr("""{
.reg .b32 codes;
and.b32 codes, $8, 0x03030303;
dp4a.u32.s32 $0, codes, $9, $4;
and.b32 codes, $8, 0x0C0C0C0C;
dp4a.u32.s32 $1, codes, $10, $5;
and.b32 codes, $8, 0x30303030;
dp4a.u32.s32 $2, codes, $11, $6;
and.b32 codes, $8, 0xC0C0C0C0;
dp4a.u32.s32 $3, codes, $12, $7;
}""")


@triton.jit
def quarters(words: tl.tensor) -> tl.tuple:
    """``[..., 4 n]`` -> four ``[..., n]``, which a lane already holds: it takes no instruction."""
    lead: tl.constexpr = words.shape[: len(words.shape) - 1]
    even, odd = tl.split(tl.reshape(words, lead + [words.shape[len(lead)] // 4, 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def plain_sum(
    acc: tl.tensor, w: tl.tensor, x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor
) -> tl.tensor:
    """A packed word times its 16 activations: a code selects x, -x or 0."""
    for byte in tl.static_range(4):
        for plane in tl.static_range(4):
            x = (x0, x1, x2, x3)[plane]
            x = (x << (24 - 8 * byte)) >> 24
            code = (w >> (8 * byte + 2 * plane)) & 3
            acc += tl.where(code == 2, x, tl.where(code == 0, -x, 0))
    return acc


@triton.jit
def step(
    sums: tl.tuple,
    count: tl.tensor,
    w_ptrs: tl.tensor,
    x_ptr: tl.tensor,
    at: tl.tensor,
    row: tl.tensor,
    M: tl.tensor,
    W: tl.tensor,
    BLOCK_M: tl.constexpr,
    SAD: tl.constexpr,
    FULL_RANGE: tl.constexpr,
    ASM: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """Add one block of columns to every sum. Past the end of a row the activations read as 0, so
    the weights there do not matter."""
    per_token: tl.constexpr = 1 if SAD or not ASM else 4
    inside: tl.tensor = at < W if MASKED else None
    w_inside = inside[None, :, :] if MASKED else None
    other: tl.constexpr = 0 if MASKED else None
    w = tl.load(w_ptrs + at[None, :, :], w_inside, other=other, eviction_policy="evict_first")
    ws = quarters(w)
    tables: tl.tuple = ()
    if SAD and ASM:
        for q in tl.static_range(4):
            if FULL_RANGE:
                count = tl.inline_asm_elementwise(
                    SAD_COUNT, "=r,r,r", [count, ws[q]], tl.int32, True, 1
                )
            t = tl.inline_asm_elementwise(
                SAD_TABLES_FULL if FULL_RANGE else SAD_TABLES_SYMMETRIC,
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
                [ws[q], 0x44444444],
                (tl.int32,) * 8,
                True,
                1,
            )
            tables = tables + (t,)
    new: tl.tuple = ()
    for m in tl.static_range(BLOCK_M):
        # Rows past M repeat the last one, and are not stored.
        x_ptrs = x_ptr + tl.minimum(row + m, M - 1) * (4 * W)
        x0 = quarters(tl.load(x_ptrs + at, inside, other=other))
        x1 = quarters(tl.load(x_ptrs + W + at, inside, other=other))
        x2 = quarters(tl.load(x_ptrs + 2 * W + at, inside, other=other))
        x3 = quarters(tl.load(x_ptrs + 3 * W + at, inside, other=other))
        acc = sums[m * per_token : (m + 1) * per_token]
        for q in tl.static_range(4):
            x = (x0[q], x1[q], x2[q], x3[q])
            if SAD and ASM:
                x = tl.inline_asm_elementwise(
                    SAD_ORDER, "=&r,=&r,=&r,=&r,r,r,r,r", x, (tl.int32,) * 4, True, 1
                )
            x0q, x1q, x2q, x3q = x[0][None, :], x[1][None, :], x[2][None, :], x[3][None, :]
            if not ASM:
                acc = (plain_sum(acc[0], ws[q], x0q, x1q, x2q, x3q),)
            elif SAD:
                t = tables[q]
                acc = (
                    tl.inline_asm_elementwise(
                        SAD_SUM,
                        "=r,r,r,r,r,r,r,r,r,r,r,r,r,r",
                        [
                            acc[0],
                            t[0],
                            t[1],
                            t[2],
                            t[3],
                            t[4],
                            t[5],
                            t[6],
                            t[7],
                            x0q,
                            x1q,
                            x2q,
                            x3q,
                        ],
                        tl.int32,
                        True,
                        1,
                    ),
                )
            else:
                a0, a1, a2, a3 = tl.inline_asm_elementwise(
                    DP4A_SUM,
                    "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                    [acc[0], acc[1], acc[2], acc[3], ws[q], x0q, x1q, x2q, x3q],
                    (tl.int32,) * 4,
                    True,
                    1,
                )
                acc = (a0, a1, a2, a3)
        new = new + acc
    return new, count


@triton.jit
def gemv_kernel(
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
    SAD: tl.constexpr,
    FULL_RANGE: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """x int32 words ``[M, P]`` (4 codes each), w int32 words ``[N, P/4]`` -> y ``[M, N]``."""
    BLOCK_W: tl.constexpr = BLOCK_K // 16
    GROUPS: tl.constexpr = LANE_WORDS // BLOCK_W
    ROWS: tl.constexpr = BLOCK_N // GROUPS
    tile, row, col, part = program(M, N, BLOCK_M, BLOCK_N, SPLIT_K)
    cols = col + tl.arange(0, ROWS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    W = P // 4
    per_part = tl.cdiv(tl.cdiv(W, BLOCK_W), SPLIT_K) * BLOCK_W
    begin = tl.minimum(part * per_part, W)
    end = tl.minimum(begin + per_part, W)
    whole = begin + (end - begin) // BLOCK_W * BLOCK_W
    prefetch_weights(w_ptr, col, begin, N, W, BLOCK_N, BLOCK_W)
    await_inputs()

    # Every group of lanes reads the same activations.
    at = begin + tl.arange(0, BLOCK_W)[None, :] + tl.zeros((GROUPS, 1), dtype=tl.int32)
    w_ptrs = w_ptr + tl.minimum(cols, N - 1)[:, :, None] * W
    count = tl.zeros((ROWS, GROUPS, BLOCK_W // 4), dtype=tl.int32)
    sums = (count,) * (BLOCK_M * (1 if SAD or not ASM else 4))
    for _ in range(begin, whole, BLOCK_W):
        sums, count = step(
            sums, count, w_ptrs, x_ptr, at, row, M, W,
            BLOCK_M, SAD, FULL_RANGE, ASM, False,
        )  # fmt: skip
        at += BLOCK_W
    if whole < end:
        sums, count = step(
            sums, count, w_ptrs, x_ptr, at, row, M, W,
            BLOCK_M, SAD, FULL_RANGE, ASM, True,
        )  # fmt: skip

    excess = 0
    if SAD and ASM:
        excess = 127 * 16 * BLOCK_W * tl.cdiv(end - begin, BLOCK_W)
        if FULL_RANGE:
            excess += tl.sum(count, 2)
    totals: tl.tuple = ()
    for m in tl.static_range(BLOCK_M):
        if SAD or not ASM:
            acc = tl.sum(sums[m], 2) - excess
        else:
            low = sums[4 * m] + (sums[4 * m + 1] >> 2)
            acc = tl.sum(low + (sums[4 * m + 2] >> 4) + (sums[4 * m + 3] >> 6), 2)
        totals = totals + (acc,)
    rows = row + tl.zeros((1, 1), dtype=tl.int64)
    finish(
        totals, rows, cols, tile, y_ptr, row_sum_ptr, s_x_ptr, scale_ptr, bias_ptr, partial_ptr,
        arrived_ptr, M, N, SCALE_PER_ROW, SPLIT_K,
    )  # fmt: skip


def spec(name: str, config: TileConfig) -> Spec:
    """``"sad"`` or ``"dp4a"`` in a configuration, compiled ahead of time."""
    sad = name == "sad"
    return describe(
        f"{name} M={config.block_m}",
        "addsub" if sad else "dot",
        gemv_kernel,
        config,
        "*i32",
        "*i32",
        row_sum=not sad,
        SAD=sad,
        FULL_RANGE=False,
        ASM=True,
    )


def specs() -> list[Spec]:
    """The forms for few tokens: 8 rows per lane while the sums fit, fewer rows with more tokens."""
    configs = [TileConfig(m, rows, 2048) for m, rows in ((1, 8), (2, 4), (4, 2), (8, 2))]
    sad = [spec("sad", config) for config in configs]
    any_int8 = sad[0].constants | {"FULL_RANGE": True}
    sad.append(sad[0]._replace(name="sad M=1, any int8", constants=any_int8))
    return sad + [spec("dp4a", config) for config in configs[:3]]
