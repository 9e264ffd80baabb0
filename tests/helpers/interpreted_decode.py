"""Runs the kernels of attention over a cache in Triton's interpreter and prints its findings.

Not a test module: ``test_ops_decode.py`` starts it in a separate process with TRITON_INTERPRET=1.

The oracles are Python loops over rows, tokens and heads: fp32 one operation at a time for values
that are written (which must agree bit for bit), float64 for attention.
"""

import json
import math
import random
import sys
from typing import NamedTuple

import numpy as np
import torch
from findings import findings, oracle_quant, report, same
from interpreter import patch_once
from torch import Tensor

from bitnet_kernels import available, reference
from bitnet_kernels.gpu import decode_attention, decode_rope
from bitnet_kernels.gpu.common import INTERPRETED
from bitnet_kernels.gpu.decode_attention import Tile, dot_dtypes
from bitnet_kernels.ops import decode as ops_decode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHES = (*DTYPES, torch.int8)
HEAD_DIMS = (16, 18, 32, 50, 64, 96, 128, 2, 80)
N_CASES = 24
MOST_HEADS = 60
"""Most heads over all tokens of a case; the interpreter's time grows with them."""


class Case(NamedTuple):
    """Sizes: rows, tokens, query heads, key/value heads, channels, columns, rows of the cache."""

    b: int
    t: int
    h: int
    g: int
    e: int
    n_columns: int
    s: int
    dtype: torch.dtype
    cache: torch.dtype
    lengths: list[int]
    n_valid: list[int]


class Cache(NamedTuple):
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


def random_case(index: int) -> Case:
    """A random case; lengths include 0, full caches and more than the cache holds."""
    rng = random.Random(index)
    sizes = MOST_HEADS + 1, 1, 1, 1
    while sizes[0] * sizes[1] * (sizes[2] + 2) * sizes[3] > MOST_HEADS:
        sizes = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 6), rng.randint(1, 4)
    b, t, repeats, g = sizes
    t = 1 if index % 5 < 2 else t
    n_columns = rng.choice((1, 7, 64, 131, rng.randint(10, 140)))
    room = max(n_columns - t, 0)
    lengths = [rng.choice((0, room, rng.randint(0, room), rng.randint(0, 130))) for _ in range(b)]
    n_valid = [rng.choice((t, t, rng.randint(0, t), t + 5)) for _ in range(b)]
    if index % 9 == 0:
        lengths[0], n_valid[-1] = -2, -1  # invalid, but must not write outside the cache
    h, e = g * repeats, HEAD_DIMS[index % len(HEAD_DIMS)]
    dtype, cache = rng.choice(DTYPES), CACHES[index % 4]
    return Case(b, t, h, g, e, n_columns, b + rng.randint(0, 2), dtype, cache, lengths, n_valid)


def bad_cache(case: Case) -> Cache:
    """A cache of NaN, or of codes 99 with scale NaN, which show up wherever they are used."""
    shape = (case.s, case.g, case.n_columns, case.e)
    if case.cache == torch.int8:
        codes = torch.full(shape, 99, dtype=torch.int8)
        scale = torch.full(shape[:3], math.nan)
        return Cache(codes, codes.clone(), scale, scale.clone())
    cache = torch.full(shape, math.nan, dtype=case.cache)
    return Cache(cache, cache.clone(), None, None)


def filled_cache(case: Case) -> Cache:
    """The same, with numbers in the columns that the valid tokens' queries see."""
    cache = bad_cache(case)
    for b, (length, n_valid) in enumerate(zip(case.lengths, case.n_valid, strict=True)):
        n = min(max(length, 0) + max(min(case.t, n_valid), 1), case.n_columns)
        for values, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            new = torch.randn(case.g, n, case.e) * 10.0 ** torch.randint(-1, 2, (case.g, n, 1))
            if scale is None:
                values[b, :, :n] = new.to(case.cache)
            else:
                values[b, :, :n] = torch.randint(-127, 128, new.shape, dtype=torch.int8)
                scale[b, :, :n] = 0.01 * torch.rand(case.g, n)
    return cache


def tables(n_columns: int, e: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(n_columns, e)  # any table: the halves differ, too
    return angles.cos(), angles.sin()


def clone(cache: Cache) -> Cache:
    return Cache(*(None if one is None else one.clone() for one in cache))  # type: ignore[arg-type]


def equal(a: Cache, b: Cache) -> bool:
    pairs = zip(a, b, strict=True)
    return all(same(x, y) if x is not None and y is not None else x is y for x, y in pairs)


def oracle_append(case: Case, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
    """Write to the cache; returns the queries."""
    cosines, sines, half = cos.numpy(), sin.numpy(), case.e // 2
    heads = qkv.view(case.b, case.t, case.h + 2 * case.g, case.e)
    q = torch.empty(case.b, case.t, case.h, case.e, dtype=case.dtype)
    for b in range(case.b):
        for t in range(case.t):
            column = case.lengths[b] + t
            position = min(max(column, 0), case.n_columns - 1)
            x = heads[b, t].float().numpy()
            turned = np.concatenate((-x[:, half:], x[:, :half]), 1)
            rotated = x * cosines[position] + turned * sines[position]
            rotated = torch.from_numpy(rotated).to(case.dtype)
            q[b, t] = rotated[: case.h]
            if t < case.n_valid[b] and 0 <= column < case.n_columns:
                k, v = rotated[case.h : case.h + case.g], heads[b, t, case.h + case.g :]
                new = ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale))
                for values, target, scale in new:
                    if scale is None:
                        target[b, :, column] = values.float().to(case.cache)
                    else:
                        target[b, :, column], scale[b, :, column], _ = oracle_quant(values)
    return q


def oracle_attention(case: Case, q: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """float64 outputs ``[B, T, H * E]`` and how far computed ones may be off.

    u = 2^-24. A score is a scaled sum of E products in fp32, off by at most (E + 8) u of
    sum |q k| / sqrt(E). This absolute error of the exponent is a relative error of the probability,
    and counts twice: in the numerator and in the sum. The sums over columns add (columns + 16) u.
    In 16-bit dots probabilities are rounded: 2^-8 (bf16), or 2^-11 and 2^-24 absolute (fp16). All
    of it is relative to sum p |v| (the absolute part to max |v| for every column). Last comes the
    output's own rounding.
    """
    k, v = cache.k.double().numpy(), cache.v.double().numpy()
    if cache.k_scale is not None and cache.v_scale is not None:
        k = k * cache.k_scale.double().numpy()[..., None]
        v = v * cache.v_scale.double().numpy()[..., None]
    pv = dot_dtypes(case.dtype, case.cache)[1]
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[pv]
    last = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[case.dtype]
    y, slack = np.empty((2, case.b, case.t, case.h, case.e))
    queries = q.double().numpy()
    for b, t, h in np.ndindex(case.b, case.t, case.h):
        n = min(max(case.lengths[b], 0) + t + 1, case.n_columns)
        keys, values = (x[b, h * case.g // case.h, :n] for x in (k, v))
        query = queries[b, t, h] / math.sqrt(case.e)
        p = np.exp(keys @ query - (keys @ query).max())
        p /= p.sum()
        off = (case.e + 8) * 2.0**-24 * (np.abs(keys) @ np.abs(query)).max()
        relative = rounding + 2 * off + (n + 16) * 2.0**-24
        y[b, t, h] = p @ values
        slack[b, t, h] = relative * (p @ np.abs(values)) + last * np.abs(y[b, t, h]) + 2.0**-149
        if pv == torch.float16:
            slack[b, t, h] += n * 2.0**-24 * np.abs(values).max()
        if case.dtype == torch.float16:
            slack[b, t, h] += 2.0**-25  # half the smallest denormal
    shape = (case.b, case.t, case.h * case.e)
    return torch.from_numpy(y.reshape(shape)), torch.from_numpy(slack.reshape(shape))


def meaningful(case: Case) -> Tensor:
    """bool ``[B, T, 1]``: the tokens whose queries see only columns that were written."""
    steps = torch.arange(case.t)
    return (steps < torch.tensor(case.n_valid).clamp(min=1).unsqueeze(1)).unsqueeze(-1)


def check_append(index: int, case: Case) -> None:
    columns = (case.h + 2 * case.g) * case.e
    qkv = (torch.randn(case.b, case.t, columns) * 3).to(case.dtype)
    if index % 4 == 0:
        qkv[0, 0, ::7], qkv[-1, -1, -1] = math.inf, math.nan
    cos, sin = tables(case.n_columns, case.e)
    counts = (torch.tensor(case.lengths), torch.tensor(case.n_valid))
    counts = counts if index % 2 else (counts[0].int(), counts[1].int())
    want, plain, got = bad_cache(case), bad_cache(case), bad_cache(case)
    q = oracle_append(case, qkv, cos, sin, want)
    of_kernel = decode_rope.rope_append(qkv, cos, sin, *got[:2], *counts, *got[2:])
    report("rope_append", case, same(of_kernel, q) and equal(got, want))
    of_reference = reference.rope_append(qkv, cos, sin, *plain[:2], *counts, *plain[2:])
    report("rope_append reference", case, same(of_reference, q) and equal(plain, want))


def check_attention(index: int, case: Case) -> None:
    q = torch.randn(case.b, case.t, case.h, case.e).to(case.dtype)
    cache = filled_cache(case)
    lengths = torch.tensor(case.lengths, dtype=torch.int64 if index % 2 else torch.int32)
    want, slack = oracle_attention(case, q, cache)
    used = meaningful(case).expand_as(want)
    rng = random.Random(index)
    some = Tile(rng.choice((16, 32, 64)), rng.choice((16, 32, 64)), rng.randint(1, 5))
    before = clone(cache)
    outputs = {
        "reference": reference.decode_attention(q, *cache[:2], lengths, *cache[2:]),
        "the tile of a launch": decode_attention.decode_attention(
            q, *cache[:2], lengths, *cache[2:]
        ),
        str(some): decode_attention.decode_attention(q, *cache[:2], lengths, *cache[2:], some),
    }
    for name, y in outputs.items():
        close = ((y.double() - want).abs() <= slack) | ~used
        ok = y.dtype == case.dtype and y.is_contiguous() and bool(close.all())
        check = "attention reference" if name == "reference" else "attention"
        report(check, f"{case}, {name}", ok and equal(cache, before))
    if case.b > 1 and index % 2:  # a row alone, of the same tile, in the last row of the cache
        row = case.b - 1
        alone = [None if one is None else one[row:] for one in cache]
        y = decode_attention.decode_attention(
            q[row:], alone[0], alone[1], lengths[row:], *alone[2:], some
        )
        mask = used[row:]
        report("rows", case, torch.equal(y[mask], outputs[str(some)][row:][mask]))


def check_one_column_more_shows() -> None:
    """The tolerance is tight: one column more or less, or a missing scale, exceeds it."""
    for dtype in DTYPES:
        case = Case(2, 1, 4, 2, 32, 40, 2, dtype, dtype, [8, 20], [1, 1])
        cache = filled_cache(case._replace(lengths=[30, 30]))
        q = torch.randn(2, 1, 4, 32).to(dtype)
        want, slack = oracle_attention(case, q, cache)
        for change in (-1, 1):
            lengths = torch.tensor(case.lengths) + change
            y = decode_attention.decode_attention(q, *cache[:2], lengths, None, None)
            far = ((y.double() - want).abs() > slack).any()
            report("tolerance", f"{dtype}, {change}", bool(far))


def check_not_finite() -> None:
    """A key or value that is not finite shows in every output that sees it, and in no others: not
    in other rows, other heads, or earlier tokens of the same chunk."""
    forms = ((0, 0, 6), (1, 1, 6), (2, 2, 1), (2, 3, 6), (0, 3, 1))
    for index, (dtype_index, cache_index, t) in enumerate(forms):
        dtype, cache_dtype = DTYPES[dtype_index], CACHES[cache_index]
        case = Case(2, t, 4, 2, 16, 70, 2, dtype, cache_dtype, [64, 33], [t, t])
        q = torch.randn(2, t, 4, 16).to(dtype)
        lengths = torch.tensor(case.lengths)
        for part, at in ((0, 33), (1, 33), (1, 33 + t // 2)):
            cache = filled_cache(case)
            scale = cache[part + 2]
            if scale is not None:
                scale[1, 1, at] = math.nan
            else:
                values = cache[part]
                assert values is not None
                values[1, 1, at, :] = math.nan if index % 2 else math.inf
                if part == 0:
                    values[1, 1, at, 0] = math.nan  # infinite scores may be of either sign
            for tile in (Tile(16, 16, 3), Tile(32, 64, 1)):
                y = decode_attention.decode_attention(q, *cache[:2], lengths, *cache[2:], tile)
                finite = y.view(2, t, 2, -1).isfinite()
                want = torch.ones_like(finite)
                want[1, at - 33 :, 1] = False
                name = f"{dtype}, {cache_dtype}, T {t}, {'kv'[part]}, column {at}, {tile}"
                report("not finite", name, torch.equal(finite, want))
            y = reference.decode_attention(q, *cache[:2], lengths, *cache[2:])
            report(
                "not finite",
                f"{name}, reference",
                torch.equal(y.view(2, t, 2, -1).isfinite(), want),
            )


def check_large_scores() -> None:
    """Scores of thousands: only differences are exponentiated."""
    case = Case(1, 2, 2, 1, 16, 50, 1, torch.float32, torch.float32, [45], [2])
    for shift in (-1e4, 1e4):
        cache = filled_cache(case)
        cache.k[..., 0] = shift
        q = torch.randn(1, 2, 2, 16)
        q[..., 0] = 1.0
        want, slack = oracle_attention(case, q, cache)
        for tile in (Tile(16, 16, 1), Tile(16, 16, 4)):
            y = decode_attention.decode_attention(
                q, *cache[:2], torch.tensor([45]), None, None, tile
            )
            report("large scores", f"{shift}, {tile}", bool(((y - want).abs() <= slack).all()))


def check_cuda_implementations() -> None:
    """Check the operators' CUDA implementations, which run on the CPU with interpreted kernels:
    layouts and empty batches."""
    available.triton_by_default = lambda device: True
    case = Case(2, 3, 4, 2, 16, 20, 3, torch.float32, torch.int8, [5, 17], [3, 2])
    cos, sin = tables(20, 16)
    counts = torch.tensor([case.lengths, case.n_valid]).t().contiguous().t()  # strided
    qkv = torch.randn(3, 2, 8 * 16).transpose(0, 1)
    want, got = bad_cache(case), bad_cache(case)
    reference.rope_append(qkv, cos, sin, *want[:2], *counts, *want[2:])
    strided = torch.stack((cos, sin), -1)
    q = ops_decode.rope_append(qkv, strided[..., 0], strided[..., 1], *got[:2], *counts, *got[2:])
    report("CUDA implementations", "rope_append, strided", equal(got, want))
    cache = filled_cache(case)
    contiguous = ops_decode.decode_attention(q, *cache[:2], counts[0], *cache[2:])
    y = ops_decode.decode_attention(q.mT.contiguous().mT, *cache[:2], counts[0], *cache[2:])
    used = meaningful(case).expand_as(y)
    report(
        "CUDA implementations", "decode_attention, strided", torch.equal(y[used], contiguous[used])
    )
    for b, t in ((0, 3), (2, 0)):
        none = ops_decode.rope_append(
            qkv[:b, :t], cos, sin, *got[:2], counts[0, :b], counts[1, :b], *got[2:]
        )
        y = ops_decode.decode_attention(none, *cache[:2], counts[0, :b], *cache[2:])
        ok = none.shape == (b, t, 4, 16) and y.shape == (b, t, 64) and equal(got, want)
        report("CUDA implementations", f"B, T = {b}, {t}", ok)


if __name__ == "__main__":
    assert INTERPRETED, "TRITON_INTERPRET=1 is not set"
    patch_once()
    torch.manual_seed(0)
    np.seterr(all="ignore")  # the interpreter computes in numpy; infinities are intended
    for index in range(N_CASES):
        case = random_case(index)
        check_append(index, case)
        check_attention(index, case)
    check_one_column_more_shows()
    check_not_finite()
    check_large_scores()
    check_cuda_implementations()
    json.dump(findings, sys.stdout)
