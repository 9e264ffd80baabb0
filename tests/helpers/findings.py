"""Code shared by the scripts that run kernels in a separate process and print their findings.

A finding is ``{"check": name, "case": shape and more, "ok": bool}``. Not a test module.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

findings: list[dict[str, Any]] = []


def report(check: str, case: object, ok: bool) -> None:
    findings.append({"check": check, "case": str(case), "ok": bool(ok)})


def same(got: Tensor, want: Tensor) -> bool:
    """Whether dtype, shape and values are equal; NaN equals NaN."""
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


def hostile_rows(k: int, dtype: torch.dtype) -> Tensor:
    """[9, K]: a normal row, then rows that are hard to quantize."""
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
