"""Runs the quantization kernels in Triton's interpreter and prints the findings as JSON.

Not a test module: ``test_ops_quant.py`` starts it in a separate process with TRITON_INTERPRET=1.

The oracle is numpy in fp32, one operation at a time, torch for casts, and integers for the sums
that must be the same in any order.
"""

import json
import math
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from findings import findings, hostile_rows, oracle_quant, report, same
from interpreter import patch_once
from numpy.typing import NDArray
from torch import Tensor

from bitnet_kernels import available, reference
from bitnet_kernels.gpu import norm_quant, quant
from bitnet_kernels.gpu.common import INTERPRETED
from bitnet_kernels.gpu.exact import RowTile, narrow, row_tile, widen
from bitnet_kernels.ops import quantize as ops_quant

N_SHAPES = int(sys.argv[1])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = (1e-5, 1e-6, 0.0, 1e-3, 0.1)

Oracle = tuple[Tensor, ...]


def oracle_sum(terms: NDArray[np.float64]) -> float:
    """Terms in units of the grid, each rounded half to even, and added as integers."""
    if not np.isfinite(terms).all():
        return math.nan
    largest = float(terms.max())
    if largest == 0.0:
        return 0.0
    power = math.frexp(largest)[1]  # 2^power is above the largest
    unit = math.ldexp(1.0, power + math.ceil(math.log2(len(terms))) - 52)
    return int(np.rint(terms / unit).astype(np.int64).sum()) * unit


def oracle_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, y = x.float().numpy(), np.empty(x.shape, np.float32)
    for i, row in enumerate(rows):
        mean = np.float32(oracle_sum(row.astype(np.float64) ** 2) / len(row))
        rstd = np.float32(1) / np.sqrt(mean + np.float32(eps))
        y[i] = row * rstd * weight.float().numpy()
    return torch.from_numpy(y).to(x.dtype)


def oracle_add(x: Tensor, residual: Tensor) -> Tensor:
    return torch.from_numpy(x.float().numpy() + residual.float().numpy()).to(x.dtype)


def oracle_relu2(gate: Tensor, up: Tensor) -> Tensor:
    positive = np.where(gate.float().numpy() < 0, np.float32(0), gate.float().numpy())
    square = torch.from_numpy(positive * positive).to(gate.dtype)
    return torch.from_numpy(square.float().numpy() * up.float().numpy()).to(gate.dtype)


def agree(got: Oracle, expected: Oracle, oracle: Oracle) -> bool:
    """Whether the kernel's tensors, the reference's and the oracle's are the same."""
    triples = zip(got, expected, oracle, strict=True)
    return all(same(a, c) and same(b, c) for a, b, c in triples)


def random_shapes(max_m: int, max_k: int, seed: int) -> Iterator[tuple[int, int]]:
    """Corners, then alternately log-uniform and uniform K, with a log-uniform M."""
    corners = [(1, 1), (2, 1), (1, 2), (1, max_k), (max_m, max_k), (max_m, 1), (3, 64), (2, 65)]
    rng = random.Random(seed)
    for index in range(N_SHAPES):
        k = round(math.exp(rng.uniform(0, math.log(max_k))))
        k = rng.randint(1, max_k) if index % 2 else k
        m = round(math.exp(rng.uniform(0, math.log(max_m))))
        yield corners[index] if index < len(corners) else (m, k)


def rows_for(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """[m, k]: rows of several magnitudes, of which up to six, at the start, are hostile."""
    x = (torch.randn(m, k) * 10.0 ** torch.randint(-2, 3, (m, 1))).to(dtype)
    hostile = hostile_rows(k, dtype)[torch.randperm(9)[: min(m, 6)]]
    x[: hostile.shape[0]] = hostile
    return x


def weight_for(index: int, k: int) -> Tensor:
    weight = torch.randn(k)
    if index % 7 == 0:
        weight[k // 2] = (0.0, math.nan, math.inf)[index // 7 % 3]
    return weight.to((*DTYPES, torch.float64)[index % 4])


def check_tokens(index: int, m: int, k: int) -> None:
    """One shape through every kernel that quantizes tokens."""
    dtype, eps = DTYPES[index % 3], EPS[index % 5]
    x, weight = rows_for(m, k, dtype), weight_for(index, k)
    case = f"M, K = {m}, {k}, {dtype}, weight {weight.dtype}, eps {eps}, case {index}"
    padded = k + index % 3 * 17
    codes, scale, row_sum = quant.quant(x, padded)
    ok = codes.shape == (m, padded) and not codes[:, k:].any()
    got = (codes[:, :k], scale, row_sum)
    report("quant", case, ok and agree(got, reference.quant(x), oracle_quant(x)))

    *got, nothing = norm_quant.launch(x, None, weight, eps, "x")
    want = oracle_quant(oracle_rmsnorm(x, weight, eps))
    ok = agree(tuple(got), reference.rmsnorm_quant(x, weight, eps), want) and nothing is None
    report("rmsnorm_quant", case, ok and same(*norms(x, weight, eps)))

    few = min(m, 4)  # the other inputs differ in what comes before the norm only
    x, other = x[:few], rows_for(few, k, dtype)
    other[:, ::3] = -x[:, ::3]
    got = norm_quant.launch(x, other, weight, eps, "x + residual")
    h = oracle_add(x, other)
    want = (*oracle_quant(oracle_rmsnorm(h, weight, eps)), h)
    expected = reference.add_rmsnorm_quant(x, other, weight, eps)
    report("add_rmsnorm_quant", case, agree(got, expected, want))

    *got, nothing = norm_quant.launch(x, other, weight, eps, "relu2")
    want = oracle_quant(oracle_rmsnorm(oracle_relu2(x, other), weight, eps))
    expected = reference.relu2_mul_rmsnorm_quant(x, other, weight, eps)
    report("relu2_mul_rmsnorm_quant", case, agree(tuple(got), expected, want) and nothing is None)


def norms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.rmsnorm(x, weight, eps), oracle_rmsnorm(x, weight, eps)


def check_blocks() -> None:
    """Check the compiled kernels' blocks, which the interpreter's larger ones replace above, and
    rows cut into several; the result must not depend on them."""
    for m, k, dtype in ((3, 5, torch.float32), (9, 70, torch.bfloat16), (5, 300, torch.float16)):
        x, weight = rows_for(m, k, dtype), torch.rand(k)
        compiled = row_tile(m, k, interpreted=False)
        for rows in (compiled, RowTile(2, 16, -(-k // 16), 1), RowTile(1, 64, -(-k // 64), 1)):
            case = f"M, K = {m}, {k}, {rows}"
            ok = agree(quant.launch(x, k, rows), reference.quant(x), oracle_quant(x))
            report("quant", case, ok)
            *got, _ = norm_quant.launch(x, None, weight, 1e-5, "x", rows)
            want = oracle_quant(oracle_rmsnorm(x, weight, 1e-5))
            expected = reference.rmsnorm_quant(x, weight, 1e-5)
            report("rmsnorm_quant", case, agree(tuple(got), expected, want))


def check_long_rows() -> None:
    """More than one block per row; many rows of one column."""
    for k, dtype in ((8193, torch.float32), (17_000, torch.bfloat16)):
        x, other = hostile_rows(k, dtype), torch.randn(9, k).to(dtype)
        weight = torch.rand(k)
        case = f"K = {k}, {dtype}"
        report("quant", case, agree(quant.quant(x), reference.quant(x), oracle_quant(x)))
        *got, _ = norm_quant.launch(x, None, weight, 1e-5, "x")
        want = oracle_quant(oracle_rmsnorm(x, weight, 1e-5))
        expected = reference.rmsnorm_quant(x, weight, 1e-5)
        report("rmsnorm_quant", case, agree(tuple(got), expected, want))
        got = norm_quant.launch(x, other, weight, 1e-5, "x + residual")
        h = oracle_add(x, other)
        want = (*oracle_quant(oracle_rmsnorm(h, weight, 1e-5)), h)
        expected = reference.add_rmsnorm_quant(x, other, weight, 1e-5)
        report("add_rmsnorm_quant", case, agree(got, expected, want))
        *got, _ = norm_quant.launch(other, x, weight, 1e-5, "relu2")
        want = oracle_quant(oracle_rmsnorm(oracle_relu2(other, x), weight, 1e-5))
        expected = reference.relu2_mul_rmsnorm_quant(other, x, weight, 1e-5)
        report("relu2_mul_rmsnorm_quant", case, agree(tuple(got), expected, want))


def check_grid() -> None:
    """Sums just above a tie of fp32, by less than half a unit of the grid or by a little more. They
    show whether terms are rounded to the grid. The squares of a row are a^2 + b^2, half an ulp of
    that, and a tail."""
    heads = [(a, b) for a in (17, 18, 19, 20, 21, 22) for b in range(5)]
    for name, tail in (("below", 1.75 * 2.0**-22), ("above", 2.5 * 2.0**-22)):
        rows = [[float(a), float(b), 2.0**-8, tail] for a, b in heads]
        x, ones = torch.tensor(rows), torch.ones(4)
        *got, _ = norm_quant.launch(x, None, ones, 0.0, "x")
        want = oracle_quant(oracle_rmsnorm(x, ones, 0.0))
        expected = reference.rmsnorm_quant(x, ones, 0.0)
        report("grid", f"rmsnorm_quant, {name}", agree(tuple(got), expected, want))


@triton.jit
def convert_kernel(
    x_ptr: tl.tensor, narrow_ptr: tl.tensor, wide_ptr: tl.tensor, BLOCK: tl.constexpr
) -> None:
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = narrow(tl.load(x_ptr + lanes), narrow_ptr.dtype.element_ty)
    tl.store(narrow_ptr + lanes, x)
    tl.store(wide_ptr + lanes, widen(x))


def check_conversions() -> None:
    """Convert fp32 to bf16 and fp16 and back: every upper half of an fp32 number, with the lower
    halves at which the rounding changes."""
    halves = torch.arange(65536, dtype=torch.int32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (halves | low).view(torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            got, wide = torch.empty(65536, dtype=dtype), torch.empty(65536)
            convert_kernel[(8,)](x, got, wide, BLOCK=8192)
            want = x.to(dtype)
            signs = torch.equal(got.signbit()[~x.isnan()], want.signbit()[~x.isnan()])
            ok = same(got, want) and same(wide, want.float()) and signs
            report("conversions", f"{dtype}, lower half {low:#x}", ok)


def check_cuda_implementations() -> None:
    """Check the operators' CUDA implementations, which run on the CPU with interpreted kernels:
    leading dimensions, layouts, empty batches, float64."""
    available.triton_by_default = lambda device: True
    k = 70
    weight = torch.rand(2 * k)[::2]
    calls: dict[str, tuple[Callable[..., Oracle], Callable[..., Oracle], int]] = {
        "quant": (ops_quant.quant, reference.quant, 1),
        "rmsnorm_quant": (ops_quant.rmsnorm_quant, reference.rmsnorm_quant, 1),
        "add_rmsnorm_quant": (ops_quant.add_rmsnorm_quant, reference.add_rmsnorm_quant, 2),
        "relu2_mul_rmsnorm_quant": (
            ops_quant.relu2_mul_rmsnorm_quant,
            reference.relu2_mul_rmsnorm_quant,
            2,
        ),
    }
    for name, (cuda, expected, inputs) in calls.items():
        others = () if name == "quant" else (weight, 1e-6)
        pair = torch.randn(2, 2, 3, k)
        layouts = {
            "leading dimensions": [*pair],
            "one token": [*pair[:, 0, 1]],
            "no tokens": [*pair[:, :, :0]],
            "strided": [*pair.repeat_interleave(2, -1)[..., ::2]],
            "transposed": [t.mT.contiguous().mT for t in pair],
            "float64": [*torch.randn(2, 2, 3, k, dtype=torch.float64)],
            "float64 beyond fp32": [*torch.full((2, 2, k), 1e39, dtype=torch.float64)],
        }
        for layout, tensors in layouts.items():
            got = cuda(*tensors[:inputs], *others)
            want = expected(*tensors[:inputs], *others)
            ok = all(same(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True))
            report("CUDA implementations", f"{name}, {layout}", ok)


if __name__ == "__main__":
    assert INTERPRETED, "TRITON_INTERPRET=1 is not set"
    patch_once()
    torch.manual_seed(0)
    np.seterr(all="ignore")  # the interpreter computes in numpy; infinities are intended
    for index, shape in enumerate(random_shapes(64, 700, seed=20240217)):
        check_tokens(index, *shape)
    check_blocks()
    check_long_rows()
    check_grid()
    check_conversions()
    check_cuda_implementations()
    json.dump(findings, sys.stdout)
