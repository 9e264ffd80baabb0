"""Runs the int8 matmul of training in Triton's interpreter and prints the findings as JSON.

Not a test module: ``test_int8_linear.py`` starts it in a separate process with
TRITON_INTERPRET=1. The oracle is numpy: int64 products, fp32 arithmetic one operation at a time.
"""

import json
import sys

import numpy as np
import torch
from findings import findings, report, same
from interpreter import patch_once
from torch import Tensor

from bitnet_kernels import available, int8_linear, int8_matmul
from bitnet_kernels.dispatch import TileConfig
from bitnet_kernels.gpu import int8_gemm
from bitnet_kernels.gpu.common import INTERPRETED, Rescale

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (
    (1, 1, 1), (5, 3, 1), (1, 7, 2), (17, 1, 63), (16, 16, 16), (33, 40, 300), (300, 5, 65),
    (64, 64, 128), (129, 257, 129), (2, 70, 31), (7, 100, 600), (1, 1, 1025), (150, 33, 48),
)  # fmt: skip
SMALL = (TileConfig(16, 32, 32), TileConfig(32, 16, 64))
"""Several tiles in each direction and several steps of K, where the shipped tiles need just one."""


def oracle(x: Tensor, w: Tensor) -> Tensor:
    acc = x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
    return torch.from_numpy(acc.astype(np.int32))


def oracle_linear(
    x_q: Tensor, s_x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = oracle(x_q, codes).numpy().astype(np.float32) * s_x.numpy()[:, None]
    y = y * scale.numpy()
    if bias is not None:
        y = y + bias.float().numpy()
    return torch.from_numpy(y).to(dtype)


def any_int8(rows: int, columns: int) -> Tensor:
    """Random int8 of all values, with a row of the lowest."""
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    values[rows // 2] = -128
    return values


def check_shape(index: int, m: int, n: int, k: int) -> None:
    x_q, s_x = any_int8(m, k), torch.rand(m)
    s_x[m // 2] = torch.nan  # a token that held an infinity
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    scale = torch.rand(n) if index % 2 else torch.rand(())
    bias = None if index % 3 == 0 else torch.randn(n).to(DTYPES[index % 4])
    configs = (*SMALL, int8_gemm.CONFIGS[90][0]) if index in (0, 6, 8) else SMALL
    for config in configs:
        case = f"M, N, K = {m}, {n}, {k}, {tuple(config)}"
        w = any_int8(n, k)
        report("sums", case, same(int8_gemm.int8_gemm(config, x_q, w), oracle(x_q, w)))
        for dtype in DTYPES if n < 10 else DTYPES[index % 3 :][:1]:
            rescale = Rescale(s_x, scale, bias, dtype)
            got = int8_gemm.int8_gemm(config, x_q, codes, rescale)
            want = oracle_linear(x_q, s_x, codes, scale, bias, dtype)
            more = f"scale {list(scale.shape)}, bias {bias is not None}"
            report("outputs", f"{case}, {dtype}, {more}", same(got, want))


def check_extreme_outputs() -> None:
    """fp32 results that round to a tie, to infinity and to denormals of the narrow dtypes."""
    codes = torch.ones(1, 2, dtype=torch.int8)
    x_q = torch.tensor([[127, 2], [1, 0], [127, 127], [0, 0], [1, 2], [3, 0]], dtype=torch.int8)
    s_x = torch.tensor([1.0, 1e-40, 3e38, 1e-7, 2.0**-24, 2.0**-25])
    for number in (1.0, 3.0, 2.0**-110):
        for dtype in DTYPES:
            scale = torch.tensor(number)
            rescale = Rescale(s_x, scale, None, dtype)
            got = int8_gemm.int8_gemm(SMALL[0], x_q, codes, rescale)
            want = oracle_linear(x_q, s_x, codes, scale, None, dtype)
            report("extreme outputs", f"scale {number}, {dtype}", same(got, want))


def check_operators() -> None:
    """The CUDA branch of the public operators: leading dimensions, strides, empty batches."""
    available.triton_by_default = lambda device: True
    int8_gemm.tile_for = lambda m, n, device: SMALL[0]
    x_q, s_x = any_int8(6, 70), torch.rand(6)
    codes, scale = torch.randint(-1, 2, (9, 70), dtype=torch.int8), torch.rand(9)
    bias = torch.randn(9)
    want = oracle_linear(x_q, s_x, codes, scale, bias, torch.bfloat16)
    rest = (codes, scale, bias)
    got = int8_linear(x_q.view(2, 3, 70), s_x.view(2, 3), *rest)
    report("operators", "leading dimensions", same(got, want.view(2, 3, 9)))
    report("operators", "one token", same(int8_linear(x_q[4], s_x[4], *rest), want[4]))
    report("operators", "no tokens", same(int8_linear(x_q[:0], s_x[:0], *rest), want[:0]))
    none = int8_linear(x_q, s_x, codes[:0], scale[:0], bias[:0])
    report("operators", "no outputs", same(none, want[:, :0]))
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x_q, s_x, *rest)]
    report("operators", "strided", same(int8_linear(*strided), want))
    shifted = torch.cat([codes.flatten()[:3], codes.flatten()])[3:].view(9, 70)
    report("operators", "unaligned", same(int8_linear(x_q, s_x, shifted, scale, bias), want))
    a, b = any_int8(70, 6), any_int8(70, 9)
    got = int8_matmul(a.t(), b.t())
    report("operators", "transposed", same(got, oracle(a.t(), b.t())))
    report("operators", "no rows", same(int8_matmul(a[:0], a), torch.empty(0, 70).int()))


if __name__ == "__main__":
    assert INTERPRETED, "TRITON_INTERPRET=1 is not set"
    patch_once()
    np.seterr(all="ignore")  # infinities are intended
    torch.manual_seed(0)
    for index, shape in enumerate(SHAPES):
        check_shape(index, *shape)
    check_extreme_outputs()
    check_operators()
    json.dump(findings, sys.stdout)
