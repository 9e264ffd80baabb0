"""Floating-point arithmetic whose bits depend neither on the device nor on the order of additions.

* :func:`widen` and :func:`narrow` convert between an input's dtype and the dtype of computation.
* Sums: every term is first rounded to a grid so coarse that all partial sums are exact, see
  :func:`bitnet_kernels.reference.exact_sum`; then warps may add in any order.

Square roots and divisions are ``tl.sqrt_rn`` and ``tl.div_rn``: Triton's own are approximations in
fp32. In fp64, ``/`` rounds correctly.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from bitnet_kernels.gpu.common import INTERPRETED

MAX_BLOCK = 8192
"""The longest row that one program holds in registers: 16 values per thread."""
_BY_BITS = tl.constexpr(INTERPRETED)
"""Whether to convert bf16 by its bits: Triton 3.9's interpreter rounds fp32 to bf16 wrongly and
reads denormals of bf16 wrongly."""


class RowTile(NamedTuple):
    """The rows of one program: ``block_m`` rows, in ``steps`` blocks of ``block_k`` columns."""

    block_m: int
    block_k: int
    steps: int
    num_warps: int

    def constants(self) -> dict[str, int]:
        """The constexprs of a kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_K": self.block_k, "STEPS": self.steps}


def row_tile(m: int, k: int, interpreted: bool = INTERPRETED) -> RowTile:
    """The tile for ``m`` rows of ``k`` columns: one row per program, or several short ones. The
    interpreter takes time per operation, not per lane, so it gets more rows."""
    block_k = min(triton.next_power_of_2(k), MAX_BLOCK)
    block_m = min(triton.next_power_of_2(m), 64 if interpreted else max(1024 // block_k, 1))
    num_warps = min(max(block_m * block_k // 512, 1), 16)
    return RowTile(block_m, block_k, triton.cdiv(k, block_k), num_warps)


@triton.jit
def widen(x: tl.tensor) -> tl.tensor:
    """x in the dtype of the computation: fp64 for fp64, else fp32."""
    if x.dtype == tl.float64:
        return x
    elif _BY_BITS and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x rounded to ``dtype``, half to even."""
    if _BY_BITS and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)  # a carry into the exponent is right, too
        bits = tl.where(x == x, bits, 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """|x|, and infinity for NaN: a maximum would drop a NaN, but keeps infinity."""
    inf = float("inf")
    x = tl.abs(x)
    return tl.where(x < inf, x, inf)


@triton.jit
def grid_of(largest: tl.tensor, TERMS: tl.constexpr) -> tl.tensor:
    """The number that :func:`on_grid` adds and subtracts, for a sum of up to ``TERMS`` (a power of
    2) terms of 0..``largest``, fp64."""
    exponent = largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return exponent.to(tl.float64, bitcast=True) * (2.0 * TERMS)


@triton.jit
def on_grid(terms: tl.tensor, grid: tl.tensor) -> tl.tensor:
    """fp64 terms, rounded so that adding them is exact; NaN if the largest is not finite."""
    return (terms + grid) - grid
