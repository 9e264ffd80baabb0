"""Activation quantization: int8 codes, the scale and the row sum of a token in one kernel.

One program per token (several short tokens share one). A row of up to 8192 columns is read once and
stays in registers. A longer row is read twice, first for max|x|, then for the codes; the second
pass finds it in the L2 cache. Bit-exact with :func:`bitnet_kernels.reference.quant`: it divides by
``div_rn``, since Triton's ``/`` on fp32 is an approximation on CUDA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.gpu.common import Spec, await_inputs, launch_options, spec_of
from bitnet_kernels.gpu.exact import RowTile, magnitude, row_tile, widen
from bitnet_kernels.reference import EPS


@triton.jit
def scale_of(largest: tl.tensor, EPS: tl.constexpr) -> tl.tuple:
    """(scale, whether the row is finite) from the row's largest magnitude. A row that is not finite
    gets a scale that keeps :func:`codes_of` defined; :func:`store_tokens` stores NaN for it."""
    finite = largest < float("inf")
    return tl.div_rn(tl.maximum(tl.where(finite, largest, 1.0), EPS), 127.0), finite


@triton.jit
def codes_of(x: tl.tensor, scale: tl.tensor, finite: tl.tensor) -> tl.tensor:
    """int32 ``round_half_even(x / scale)``, 0 in a row that is not finite.

    It adds 1.5 * 2^23, whose bits are 0x4B400000: the sum has no fraction bits, so the addition
    itself rounds, and leaves the integer in the mantissa. It needs no clamp: |x| / (max|x| / 127),
    with both divisions rounded, is below 127.5.
    """
    scaled = tl.div_rn(tl.where(finite, x, 0.0), scale)
    return (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def store_tokens(
    scale_ptr: tl.tensor,
    row_sum_ptr: tl.tensor,
    rows: tl.tensor,
    M: tl.tensor,
    scale: tl.tensor,
    finite: tl.tensor,
    row_sum: tl.tensor,
) -> None:
    """Store the scale and the row sum of each row."""
    tl.store(scale_ptr + rows, tl.where(finite, scale, float("nan")), rows < M)
    tl.store(row_sum_ptr + rows, row_sum, rows < M)


@triton.jit
def quant_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_sum_ptr: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    COLUMNS: tl.tensor,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """BLOCK_M rows of ``x [M, K]``; outputs as in ``reference.quant``, but codes ``[M, COLUMNS]``
    with zeros from K on. ``STEPS * BLOCK_K >= COLUMNS >= K``."""
    await_inputs()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < M)[:, None]
    lanes = tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_ptr + rows[:, None] * K
    codes_ptrs = codes_ptr + rows[:, None] * COLUMNS
    if STEPS == 1:
        x = tl.load(x_ptrs + lanes, inside & (lanes < K), other=0.0)
    largest = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(STEPS):
        if STEPS > 1:
            k = step * BLOCK_K + lanes
            x = tl.load(x_ptrs + k, inside & (k < K), other=0.0)
        largest = tl.maximum(largest, magnitude(widen(x).to(tl.float32)))
    scale, finite = scale_of(tl.max(largest, 1), EPS)

    row_sum = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    for step in range(STEPS):
        k = step * BLOCK_K + lanes
        if STEPS > 1:
            x = tl.load(x_ptrs + k, inside & (k < K), other=0.0)
        code = codes_of(widen(x).to(tl.float32), scale[:, None], finite[:, None])
        tl.store(codes_ptrs + k, code.to(tl.int8), inside & (k < COLUMNS))
        row_sum += code
    store_tokens(scale_ptr, row_sum_ptr, rows, M, scale, finite, tl.sum(row_sum, 1))


def quant(x: Tensor, padded_columns: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """float ``[M, K]`` -> codes int8 ``[M, K]``, scale fp32 ``[M]``, row sum int32 ``[M]``.

    With ``padded_columns`` (>= K) the codes are ``[M, padded_columns]``, with zeros from K on, so
    that matmuls read rows in whole 16-byte loads.
    """
    columns = padded_columns or x.shape[1]
    return launch(x, columns, row_tile(x.shape[0], columns))


def launch(x: Tensor, columns: int, tile: RowTile) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quant` with codes ``[M, columns]``, cut into tiles."""
    m, k = x.shape
    codes = x.new_empty((m, columns), dtype=torch.int8)
    scale = x.new_empty((m,), dtype=torch.float32)
    row_sum = x.new_empty((m,), dtype=torch.int32)
    if m:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            quant_kernel[(triton.cdiv(m, tile.block_m),)](
                x.contiguous(),
                codes,
                scale,
                row_sum,
                m,
                k,
                columns,
                EPS=EPS,
                **tile.constants(),
                num_warps=tile.num_warps,
                num_stages=1,
                **launch_options(x.device),
            )
    return codes, scale, row_sum


def specs() -> list[Spec]:
    """The forms for a model's common widths, for short rows and for rows of several blocks."""
    forms = (("bf16", 256), ("bf16", 4096), ("bf16", 28672), ("fp32", 8192))
    return [_spec(dtype, k, row_tile(64, k, interpreted=False)) for dtype, k in forms]


def _spec(dtype: str, k: int, tile: RowTile) -> Spec:
    types = {"x_ptr": f"*{dtype}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "row_sum_ptr": "*i32"}
    constants = {"EPS": EPS} | tile.constants()
    name, sizes = f"quant {dtype} K={k}", ("K", "COLUMNS")
    return spec_of(
        name, "quantization", quant_kernel, types, constants, tile.num_warps, sizes=sizes
    )
