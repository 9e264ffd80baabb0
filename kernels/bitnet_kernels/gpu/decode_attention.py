"""Attention over a static cache, its columns split over programs (flash-decoding).

A step has few queries, so its cost is reading the cache once, and one program per row and head
would leave most of a GPU idle. The filled columns are therefore cut into ``SPLITS`` slices. Each
program walks its slice with the running maximum and sum of online softmax (FlashAttention, arXiv
2205.14135), and a second kernel combines the slices' results by their weights. The queries of all
heads that share a key/value head, and of all tokens of a chunk, are the rows of one tile, which
reads a column once for all of them. So a generation step and the prefill of a prompt use the same
kernel.

The grid depends on shapes alone; the kernel reads the rows' lengths on the device. Slices always
have equal lengths, so a captured graph stays balanced while rows grow. Slices past the end of a
short row are empty; each still costs a launched program.

An int8 cache is never dequantized: codes go into the dot as they are, the keys' scales multiply the
scores, and the values' scales multiply the probabilities.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.gpu.common import (
    INTERPRETED,
    Spec,
    await_inputs,
    launch_options,
    spec_of,
)
from bitnet_kernels.gpu.exact import narrow, widen

MAX_SPLITS = 64
"""Most slices of a row: a program of the second kernel holds that many at a time."""
LOG2_E = 1.4426950408889634
_INTERPRETED = tl.constexpr(INTERPRETED)


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """The tile of a program: ``block_m`` queries (a dot takes at least 16), and ``block_n`` columns
    at a time of one of ``splits`` slices."""

    block_m: int
    block_n: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3


def tile_of(
    queries: int, programs: int, head_dim: int, n_columns: int, wide: bool, n_sm: int, chunk: bool
) -> Tile:
    """The tile of attention, chosen so that no register spills. Every form is compiled, so there
    are few: the number of slices is a power of two, and a chunk's tile does not depend on its
    length.

    Arguments:
        queries: per row and key/value head, T * H / G; programs: such pairs, B * G.
        wide: whether the dots are in fp32, which has no tensor cores.
        n_sm: multiprocessors of the GPU; there are slices enough for one or two programs on each.
        chunk: whether T > 1.
    """
    queries = triton.next_power_of_2(queries)
    block_m = min(64 if chunk else max(queries, 16), 16 if wide else 64)
    block_n = min(max(4096 // triton.next_power_of_2(head_dim), 16), 32 if wide else 64)
    tiles = programs * triton.cdiv(queries, block_m)
    splits = min(triton.cdiv(2 * n_sm, tiles), triton.cdiv(n_columns, block_n), MAX_SPLITS)
    splits = 1 << splits.bit_length() - 1
    num_warps = 8 if block_m == 64 and head_dim > 64 else 4
    return Tile(block_m, block_n, splits, num_warps, num_stages=2 if wide else 3)


@triton.jit
def operand(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x rounded to the dtype of a dot. The interpreter's dot reads bf16 as integers, so there x is
    fp32 with the same values."""
    if x.dtype != dtype:
        x = narrow(widen(x), dtype)
    if _INTERPRETED:
        return widen(x)
    else:
        return x


@triton.jit(do_not_specialize=("T", "QUERIES"))  # else new prompt lengths compile it anew
def attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    y_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    G: tl.tensor,
    L: tl.tensor,
    QUERIES: tl.tensor,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    REPEATS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """BLOCK_M of the ``QUERIES = T * REPEATS`` queries of one row and key/value head, over slice
    ``program_id(2)`` of the columns. REPEATS is H / G. SCALE is log2(e) / sqrt(E), so that
    probabilities are powers of 2. CHUNK says whether T > 1. QK and PV are the dtypes of the two
    dots.

    With one slice y is ``[B, T, H, E]``. Else it is fp32 ``[SPLITS, B * T * H, E]``, not yet
    divided by the sum; the maximum and the sum are fp32 ``[SPLITS, B * T * H]``.
    """
    await_inputs()
    blocks = tl.cdiv(QUERIES, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_M
    group = tl.program_id(1)
    split = tl.program_id(2)

    query = start + tl.arange(0, BLOCK_M)
    step = query // REPEATS  # the token of its row
    heads = (row * T + step) * H + group * REPEATS + query % REPEATS
    valid = query < QUERIES
    lanes = tl.arange(0, BLOCK_E)
    inside = (lanes < E)[None, :]

    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + row), 0), L).to(tl.int32)
    last_step = (tl.minimum(start + BLOCK_M, QUERIES) - 1) // REPEATS
    end = tl.minimum(length + last_step + 1, L)
    share = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_N) * BLOCK_N
    first = split * share
    end = tl.minimum(first + share, end)

    q = tl.load(q_ptr + heads[:, None] * E + lanes, valid[:, None] & inside, other=0.0)
    q = operand(q, QK)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    cache = (row * G + group) * L
    block = tl.arange(0, BLOCK_N)
    at = block[:, None] * E + lanes
    for column in range(first, end, BLOCK_N):
        columns = column + block
        filled = columns < end
        k = tl.load(k_ptr + (cache + column) * E + at, filled[:, None] & inside, other=0)
        v = tl.load(v_ptr + (cache + column) * E + at, filled[:, None] & inside, other=0)
        s = tl.dot(q, tl.trans(operand(k, QK)), input_precision="ieee") * SCALE
        if k_scale_ptr is not None:
            s *= tl.load(k_scale_ptr + cache + columns, filled, other=0.0)[None, :]
        seen = filled[None, :] & (columns[None, :] <= length + step[:, None])
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        if v_scale_ptr is not None:
            scales = tl.load(v_scale_ptr + cache + columns, filled, other=0.0)[None, :]
            p = tl.where(seen, p * scales, 0.0)
        elif CHUNK:
            # 0 * NaN is NaN: a value that is not finite must not reach queries that do not see it.
            wide_v = widen(v)
            finite = tl.abs(wide_v) < float("inf")
            v = narrow(tl.where(finite, wide_v, 0.0), v.dtype)
            bad = tl.max(tl.where(finite, 0, 1), 1)[None, :] > 0
            p = tl.where(seen & bad, float("nan"), p)
        acc = acc * shrink[:, None]
        acc = tl.dot(operand(p, PV), operand(v, PV), acc, input_precision="ieee")

    if SPLITS == 1:
        y = narrow(acc / total[:, None], y_ptr.dtype.element_ty)
        tl.store(y_ptr + heads[:, None] * E + lanes, y, valid[:, None] & inside)
    else:
        heads += split * (tl.num_programs(0) // blocks).to(tl.int64) * T * H
        tl.store(max_ptr + heads, top, valid)
        tl.store(sum_ptr + heads, total, valid)
        if first < end:  # else the sum is 0 and nothing reads y
            tl.store(y_ptr + heads[:, None] * E + lanes, acc, valid[:, None] & inside)


@triton.jit(do_not_specialize=("HEADS",))
def combine_kernel(
    part_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    y_ptr: tl.tensor,
    HEADS: tl.tensor,
    E: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Combine the slices of head ``program_id(0)`` of HEADS = B * T * H; layouts as above."""
    await_inputs()
    head = tl.program_id(0).to(tl.int64)
    slices = tl.arange(0, BLOCK_S)
    lanes = tl.arange(0, BLOCK_E)
    at = slices * HEADS.to(tl.int64) + head
    top = tl.load(max_ptr + at, slices < SPLITS, other=float("-inf"))
    total = tl.load(sum_ptr + at, slices < SPLITS, other=0.0)
    used = (total != 0)[:, None] & (lanes < E)[None, :]  # NaN is not 0
    part = tl.load(part_ptr + at[:, None] * E + lanes, used, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    y = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(y_ptr + head * E + lanes, narrow(y, y_ptr.dtype.element_ty), lanes < E)


def dot_dtypes(activations: torch.dtype, cache: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of ``q k^T`` and of ``p v``: fp32, or 16 bits where that only rounds the
    probabilities. int8 codes are exact in 16 bits. Probabilities times a scale may leave fp16's
    range."""
    if activations == torch.float32 or cache not in (activations, torch.int8):
        return torch.float32, torch.float32
    return activations, torch.bfloat16 if cache == torch.int8 else cache


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """:func:`bitnet_kernels.decode_attention` for checked arguments."""
    (b, t, h, e), (_, g, n_columns, _) = q.shape, k_cache.shape
    y = q.new_empty((b, t, h * e))
    if not b * t:
        return y
    qk, pv = dot_dtypes(q.dtype, k_cache.dtype)
    if tile is None:
        n_sm = 1
        if q.device.type == "cuda":
            n_sm = torch.cuda.get_device_properties(q.device).multi_processor_count
        wide = torch.float32 in (qk, pv)
        tile = tile_of(t * h // g, b * g, e, n_columns, wide, n_sm, t > 1)
    part, top, total = y, None, None
    if tile.splits > 1:
        part, top, total = (
            q.new_empty(shape, dtype=torch.float32)
            for shape in ((tile.splits, b * t * h, e), *2 * ((tile.splits, b * t * h),))
        )
    block_e = max(triton.next_power_of_2(e), 16)
    blocks = triton.cdiv(t * h // g, tile.block_m)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        attention_kernel[(b * blocks, g, tile.splits)](
            q.contiguous(),
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            lengths.contiguous(),
            part,
            top,
            total,
            t,
            h,
            g,
            n_columns,
            t * h // g,
            SCALE=LOG2_E * e**-0.5,
            E=e,
            REPEATS=h // g,
            CHUNK=t > 1,
            SPLITS=tile.splits,
            QK=_TRITON[qk],
            PV=_TRITON[pv],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_E=block_e,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **launch_options(q.device),
        )
        if tile.splits > 1:
            combine_kernel[(b * t * h,)](
                part,
                top,
                total,
                y,
                b * t * h,
                E=e,
                SPLITS=tile.splits,
                BLOCK_S=triton.next_power_of_2(tile.splits),
                BLOCK_E=block_e,
                num_warps=4,
                num_stages=1,
                **launch_options(q.device),
            )
    return y


def specs() -> list[Spec]:
    """A step (T = 1) and a chunk of a prompt, with four query heads per key/value head; and the
    second passes."""
    forms = [
        _spec("bf16", "bf16", 128, 1),
        _spec("bf16", "i8", 128, 1),
        _spec("bf16", "bf16", 128, 256),
        _spec("bf16", "i8", 128, 256),
        _spec("bf16", "bf16", 64, 256),
        _spec("bf16", "bf16", 256, 256),
        _spec("fp16", "i8", 80, 1),
        _spec("fp32", "fp32", 64, 1),
    ]
    return [*forms, _combine_spec("bf16", 128), _combine_spec("bf16", 256)]


def _spec(dtype: str, cache: str, e: int, t: int) -> Spec:
    by_name = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    qk, pv = dot_dtypes(by_name[dtype], torch.int8 if cache == "i8" else by_name[cache])
    tile = tile_of(4 * t, 8, e, 4096, torch.float32 in (qk, pv), n_sm=132, chunk=t > 1)
    scale, partial = "*fp32" if cache == "i8" else None, "*fp32" if tile.splits > 1 else None
    types = {
        "q_ptr": f"*{dtype}",
        "k_ptr": f"*{cache}",
        "v_ptr": f"*{cache}",
        "k_scale_ptr": scale,
        "v_scale_ptr": scale,
        "lengths_ptr": "*i32",
        "y_ptr": partial or f"*{dtype}",
        "max_ptr": partial,
        "sum_ptr": partial,
    }
    constants = {"SCALE": LOG2_E * e**-0.5, "E": e, "REPEATS": 4, "CHUNK": t > 1}
    constants |= {"SPLITS": tile.splits, "QK": _TRITON[qk], "PV": _TRITON[pv]}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants |= {"BLOCK_E": triton.next_power_of_2(e)}
    name = f"decode_attention {dtype} E={e} T={t}, {cache} cache"
    warps, stages = tile.num_warps, tile.num_stages
    return spec_of(
        name, "attention", attention_kernel, types, constants, warps, stages, sizes=("L",)
    )


def _combine_spec(dtype: str, e: int) -> Spec:
    types = dict.fromkeys(("part_ptr", "max_ptr", "sum_ptr"), "*fp32") | {"y_ptr": f"*{dtype}"}
    constants = {"E": e, "SPLITS": MAX_SPLITS, "BLOCK_S": MAX_SPLITS, "BLOCK_E": e}
    name = f"decode_attention {dtype} E={e}, second pass"
    return spec_of(name, "attention", combine_kernel, types, constants, num_warps=4)
