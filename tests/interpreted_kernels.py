"""Runs the Triton kernels in Triton's interpreter and prints what it found as JSON.

Not a test module: ``test_kernels.py`` starts it in a process of its own with TRITON_INTERPRET=1,
because that variable is read when Triton is imported and would change every other test that
imports Triton. Each finding is ``{"check": name, "case": shape and more, "ok": bool}``.

The oracle is numpy: int64 products, and fp32 arithmetic one operation at a time.
"""

import json
import math
import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.linear import BitLinear, TernaryLinear
from bitnet_kernels import ops, pack_ternary, reference, ternary_linear, ternary_matmul
from bitnet_kernels.gpu import addsub, dot
from bitnet_kernels.gpu.common import INTERPRETED, Rescale, Tile, launch
from bitnet_kernels.gpu.quant import quant as triton_quant

N_SHAPES = 208
TRITON = ("addsub", "dot")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
findings: list[dict[str, Any]] = []


def report(check: str, case: object, ok: bool) -> None:
    findings.append({"check": check, "case": str(case), "ok": bool(ok)})


def same(got: Tensor, want: Tensor) -> bool:
    """Equal dtype, shape and values, NaN equal to NaN."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if not got.is_floating_point():
        return torch.equal(got, want)
    return np.array_equal(got.double().numpy(), want.double().numpy(), equal_nan=True)


def oracle_quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = x.float().numpy()
    absmax = np.abs(values).max(-1)
    finite = np.isfinite(absmax)
    scale = np.maximum(absmax, np.float32(1e-5)) / np.float32(127)
    scale[~finite] = np.nan
    codes = np.where(finite[:, None], np.rint(values / scale[:, None]), 0).astype(np.int8)
    row_sum = codes.sum(-1, dtype=np.int64).astype(np.int32)
    return torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(row_sum)


def oracle_matmul(x_q: Tensor, codes: Tensor) -> Tensor:
    acc = x_q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    return torch.from_numpy(acc.astype(np.int32))


def oracle_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    x_q, s_x, _ = oracle_quant(x)
    y = oracle_matmul(x_q, codes).numpy().astype(np.float32) * s_x.numpy()[:, None]
    y = y * scale.numpy()
    if bias is not None:
        y = y + bias.float().numpy()
    return torch.from_numpy(y).to(x.dtype)


def random_codes(n: int, k: int) -> Tensor:
    """Random codes, of which some rows are all one value."""
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    for row, value in enumerate((1, -1, 0)):
        codes[row + 5 : row + 6] = value
    return codes


def hostile_rows(k: int, dtype: torch.dtype) -> Tensor:
    """[9, K]: a normal row, then what quantization could stumble over."""
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4  # denormal
    rows = torch.randn(9, k, dtype=torch.float64)
    rows[1] = 0.0
    rows[2] = -0.3  # all equal
    rows[3, k // 2] = math.nan
    rows[4, -1] = -math.inf
    rows[5] = torch.where(rows[5] > 0, largest, -largest)
    rows[6] = rows[6] * tiny
    rows[7] = torch.randint(-64, 64, (k,)) + 0.5  # ties, exact since the scale is 127 / 127
    rows[7, 0] = 127.0
    rows[8] = rows[8] * 1e-6  # below the clamp of the statistic
    return rows.to(dtype)


def random_shapes() -> list[tuple[int, int, int]]:
    """M, N, K in 1..300: corners, then uniform and log-uniform shapes by turns, the latter because
    small sizes are where masks and padding go wrong."""
    shapes = [(1, 1, 1), (300, 300, 300), (1, 300, 1), (300, 1, 64), (2, 3, 65), (17, 65, 63)]
    rng = random.Random(20240217)
    while len(shapes) < N_SHAPES:
        if len(shapes) % 2:
            m, n, k = (rng.randint(1, 300) for _ in range(3))
        else:
            m, n, k = (round(math.exp(rng.uniform(0, math.log(300)))) for _ in range(3))
        shapes.append((m, n, k))
    return shapes


def check_shape(index: int, m: int, n: int, k: int) -> None:
    dtype = DTYPES[index % 3]
    codes = random_codes(n, k)
    packed = pack_ternary(codes)
    x = torch.randn(m, k).to(dtype)
    hostile = hostile_rows(k, dtype)[torch.randperm(9)[: min(m, 3)]]
    x[: hostile.shape[0]] = hostile
    if index % 4 == 3:
        x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        x_q[0] = -128
    else:
        x_q = reference.quant(x)[0]
    case = f"M, N, K = {m}, {n}, {k}"
    want = oracle_matmul(x_q, codes)
    for kernel in ("reference", *TRITON):
        report(f"{kernel} accumulators", case, same(ternary_matmul(x_q, packed, kernel), want))

    few = x[:3]
    triples = zip(triton_quant(few), reference.quant(few), oracle_quant(few), strict=True)
    ok = all(same(a, c) and same(b, c) for a, b, c in triples)
    report("quant", f"M, K = {few.shape[0]}, {k}, {dtype}, case {index}", ok)

    scale = torch.rand(()) if index % 2 else torch.rand(n)
    bias = None if index % 5 < 2 else torch.randn(n).to(DTYPES[index % 2])
    case += f", {dtype}, scale {list(scale.shape)}, bias {None if bias is None else bias.dtype}"
    x_q, s_x = reference.absmax_int8(x)
    want = oracle_linear(x, codes, scale, bias)
    report("reference outputs", case, same(ternary_linear(x, packed, scale, bias), want))
    got = dot.matmul(x_q, packed, Rescale(s_x, scale, bias, dtype))
    report("dot outputs", case, same(got, want))
    got = addsub.matmul(x_q[:3], packed, Rescale(s_x[:3], scale, bias, dtype))  # 3: it is slow
    report("addsub outputs", case, same(got, want[:3]))
    check_layers(f"{case}, index {index}", x, codes)


def check_layers(case: str, x: Tensor, codes: Tensor) -> None:
    """BitLinear's training forward, and its packed form through each kernel, on the same codes."""
    layer = BitLinear(codes.shape[1], codes.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(codes.float())  # quantizes to the codes themselves
    accumulators: list[Tensor] = []
    exact = reference.int8_matmul

    def spy(a: Tensor, b: Tensor) -> Tensor:
        accumulators.append(exact(a, b))
        return accumulators[-1]

    reference.int8_matmul = spy
    trained = layer(x).detach()
    reference.int8_matmul = exact
    want = oracle_matmul(oracle_quant(x)[0], codes)
    report("training accumulators", case, len(accumulators) == 1 and same(accumulators[0], want))
    few = min(len(x), 2)  # the interpreter takes milliseconds a row
    for kernel, rows in (("reference", len(x)), ("dot", few), ("addsub", few)):
        packed = TernaryLinear.from_bitlinear(layer, kernel)  # type: ignore[arg-type]
        report(f"packed layer, {kernel}", case, same(packed(x[:rows]), trained[:rows]))


def check_gpu_tiles() -> None:
    """The tiles of the compiled kernels, which the interpreter's own larger ones replace above."""
    for m, n, k in ((0, 5, 3), (1, 70, 300), (3, 17, 65), (8, 9, 257), (9, 33, 130), (40, 65, 97)):
        x, codes, bias = torch.randn(m, k), random_codes(n, k), torch.randn(n)
        scale = torch.rand(n)
        x_q, s_x = reference.absmax_int8(x)
        rescale = Rescale(s_x, scale, bias, x.dtype)
        for name, kernel, tile in (
            ("addsub", addsub.addsub_kernel, addsub.tile(m, interpreted=False)),
            ("dot", dot.dot_kernel, dot.tile(m, interpreted=False)),
        ):
            acc = launch(kernel, tile, x_q, pack_ternary(codes), None)
            y = launch(kernel, tile, x_q, pack_ternary(codes), rescale)
            ok = same(acc, oracle_matmul(x_q, codes))
            ok = ok and same(y, oracle_linear(x, codes, scale, bias))
            report("gpu tiles", f"{name}, M, N, K = {m}, {n}, {k}", ok)


def check_long_rows() -> None:
    """Rows longer than a block of the quant kernel; accumulators that fp32 could not hold."""
    for k in (4097, 9000):
        x = hostile_rows(k, torch.float32)
        pairs = zip(triton_quant(x), oracle_quant(x), strict=True)
        report("quant", f"M, K = 9, {k}", all(same(a, b) for a, b in pairs))
    x = torch.full((1, 140_001), 127, dtype=torch.int8)
    codes = torch.ones(1, 140_001, dtype=torch.int8)
    tile = Tile(m=1, n=1, p=8192, num_warps=4)
    for name, kernel in (("addsub", addsub.addsub_kernel), ("dot", dot.dot_kernel)):
        got = launch(kernel, tile, x, pack_ternary(codes), None)
        report(f"{name} accumulators", "K = 140001, all 127", got.item() == 127 * 140_001)


def check_ops() -> None:
    """Leading dimensions, layouts, empty batches and float64 through the public op, and the CUDA
    implementations, which interpreted kernels let run on the CPU."""
    n, k = 37, 70
    codes, scale, bias = random_codes(n, k), torch.rand(n), torch.randn(n)
    packed = pack_ternary(codes)
    for kernel in TRITON:
        x = torch.randn(2, 5, k)
        want = oracle_linear(x.view(-1, k), codes, scale, bias).view(2, 5, n)
        got = ternary_linear(x, packed, scale, bias, kernel)
        report("ops", f"{kernel}, leading dimensions", same(got, want))
        for dtype in DTYPES:
            rows = hostile_rows(k, dtype)
            got = ternary_linear(rows, packed, scale, bias, kernel)
            report("ops", f"{kernel}, {dtype}", same(got, oracle_linear(rows, codes, scale, bias)))
        got = ternary_linear(x[1, 2], packed, scale, bias, kernel)
        report("ops", f"{kernel}, one token without dimensions", same(got, want[1, 2]))
        got = ternary_linear(x.double(), packed, scale, bias, kernel)
        report("ops", f"{kernel}, float64", same(got, want.double()))
        strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, packed, scale, bias)]
        report("ops", f"{kernel}, strided", same(ternary_linear(*strided, kernel), want))
        got = ternary_linear(x.mT.contiguous().mT, packed.t().contiguous().t(), scale, bias, kernel)
        report("ops", f"{kernel}, transposed", same(got, want))
        got = ternary_linear(x[:, :0], packed, scale, bias, kernel)
        report("ops", f"{kernel}, no tokens", same(got, want[:, :0]))
        got = ternary_linear(x, packed[:0], scale[:0], bias[:0], kernel)
        report("ops", f"{kernel}, no outputs", same(got, want[..., :0]))
    for m in (1, 8, 9):
        x = torch.randn(m, k)
        want = oracle_linear(x, codes, scale, bias)
        got = ops._linear_cuda(x, packed, scale, bias, "auto", 128)
        report("ops", f"CUDA implementation of ternary_linear, M = {m}", same(got, want))
        x_q = reference.quant(x)[0]
        got = ops._matmul_cuda(x_q, packed, "auto")
        report(
            "ops",
            f"CUDA implementation of ternary_matmul, M = {m}",
            same(got, oracle_matmul(x_q, codes)),
        )
    x = torch.randn(2, 3, k)
    pairs = zip(ops._quant_cuda(x.mT.contiguous().mT), reference.quant(x), strict=True)
    report("ops", "CUDA implementation of quant", all(same(a, b) for a, b in pairs))
    groups = torch.rand(n, 3)
    got = ops._linear_cuda(x, packed, groups, None, "auto", 32)
    want = ternary_linear(x, packed, groups, None, "reference", 32)
    report("ops", "CUDA implementation of ternary_linear, group-wise scales", same(got, want))


if __name__ == "__main__":
    assert INTERPRETED, "TRITON_INTERPRET=1 is not set"
    torch.manual_seed(0)
    np.seterr(all="ignore")  # the interpreter computes in numpy; infinities are meant
    for index, shape in enumerate(random_shapes()):
        check_shape(index, *shape)
    check_gpu_tiles()
    check_long_rows()
    check_ops()
    json.dump(findings, sys.stdout)
