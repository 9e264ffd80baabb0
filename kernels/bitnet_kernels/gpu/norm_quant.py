"""RMSNorm and quantization in one kernel, with the operation before the norm in a transformer.

    x                            before the projections of attention, or of the MLP
    x + residual                 likewise; the sum is the residual stream and is returned too
    relu(gate)^2 * up            before the MLP's last projection

One program per token (several short tokens share one). A row of up to 8192 columns is read once and
stays in registers through the norm's statistic, max|y| and the codes. Each step rounds to the dtype
of x where the torch operators that it replaces would, so the codes equal those of the separate
operators; bit-exact with :func:`bitnet_kernels.reference.rmsnorm_quant` and its neighbors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.gpu.common import Spec, await_inputs, launch_options, spec_of
from bitnet_kernels.gpu.exact import RowTile, grid_of, magnitude, narrow, on_grid, row_tile, widen
from bitnet_kernels.gpu.quant import codes_of, scale_of, store_tokens
from bitnet_kernels.reference import EPS


@triton.jit
def load_input(
    x_ptr: tl.tensor, other_ptr: tl.tensor, offsets: tl.tensor, mask: tl.tensor, INPUT: tl.constexpr
) -> tl.tensor:
    """The input of the norm, in the dtype of x; 0 outside the mask."""
    stored = tl.load(x_ptr + offsets, mask, other=0.0)
    if INPUT == "x":
        return stored
    else:
        x, other = widen(stored), widen(tl.load(other_ptr + offsets, mask, other=0.0))
        if INPUT == "x + residual":
            return narrow(x + other, stored.dtype)
        else:
            gate = tl.where(x < 0, 0.0, x)  # NaN stays NaN
            squared = widen(narrow(gate * gate, stored.dtype))
            return narrow(squared * other, stored.dtype)


@triton.jit
def normed(
    x: tl.tensor, weight_ptr: tl.tensor, k: tl.tensor, K: tl.tensor, rstd: tl.tensor
) -> tl.tensor:
    """``(x * rstd) * weight``, rounded to the dtype of x, as fp32."""
    weight = widen(tl.load(weight_ptr + k, k < K, other=0.0)).to(tl.float32)
    y = (widen(x).to(tl.float32) * rstd[:, None]) * weight
    return widen(narrow(y, x.dtype)).to(tl.float32)


@triton.jit
def norm_quant_kernel(
    x_ptr: tl.tensor,
    other_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    h_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_sum_ptr: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    NORM_EPS: tl.constexpr,
    EPS: tl.constexpr,
    INPUT: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """BLOCK_M rows of ``x [M, K]``. INPUT is "x", "x + residual" or "relu2"; ``other`` is then
    None, the residual or ``up``. h (only with a residual) receives the input of the norm. ``TERMS``
    is the smallest power of 2 that is at least K; ``STEPS * BLOCK_K >= K``."""
    await_inputs()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < M)[:, None]
    lanes = tl.arange(0, BLOCK_K)[None, :]
    start = rows[:, None] * K
    if STEPS == 1:
        x = load_input(x_ptr, other_ptr, start + lanes, inside & (lanes < K), INPUT)
    largest = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(STEPS):
        k = step * BLOCK_K + lanes
        if STEPS > 1:
            x = load_input(x_ptr, other_ptr, start + k, inside & (k < K), INPUT)
        if INPUT == "x + residual":
            tl.store(h_ptr + start + k, x, inside & (k < K))
        largest = tl.maximum(largest, magnitude(widen(x).to(tl.float32)))

    root = tl.max(largest, 1).to(tl.float64)
    grid = grid_of(root * root, TERMS)[:, None]
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
    for step in range(STEPS):
        if STEPS > 1:
            k = step * BLOCK_K + lanes
            x = load_input(x_ptr, other_ptr, start + k, inside & (k < K), INPUT)
        wide = widen(x).to(tl.float32).to(tl.float64)
        squares += on_grid(wide * wide, grid)
    mean = (tl.sum(squares, 1) / K).to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + tl.full((), NORM_EPS, tl.float32)))

    largest = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(STEPS):
        k = step * BLOCK_K + lanes
        if STEPS > 1:
            x = load_input(x_ptr, other_ptr, start + k, inside & (k < K), INPUT)
        largest = tl.maximum(largest, magnitude(normed(x, weight_ptr, k, K, rstd)))
    scale, finite = scale_of(tl.max(largest, 1), EPS)

    row_sum = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    for step in range(STEPS):
        k = step * BLOCK_K + lanes
        if STEPS > 1:
            x = load_input(x_ptr, other_ptr, start + k, inside & (k < K), INPUT)
        code = codes_of(normed(x, weight_ptr, k, K, rstd), scale[:, None], finite[:, None])
        tl.store(codes_ptr + start + k, code.to(tl.int8), inside & (k < K))
        row_sum += code
    store_tokens(scale_ptr, row_sum_ptr, rows, M, scale, finite, tl.sum(row_sum, 1))


def launch(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    eps: float,
    input: str,
    tile: RowTile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x float ``[M, K]``, other as x or None, weight float ``[K]`` -> codes int8 ``[M, K]``, scale
    fp32 ``[M]``, row sum int32 ``[M]``, and for ``input="x + residual"`` the sum in x's dtype."""
    m, k = x.shape
    codes = x.new_empty((m, k), dtype=torch.int8)
    scale = x.new_empty((m,), dtype=torch.float32)
    row_sum = x.new_empty((m,), dtype=torch.int32)
    h = x.new_empty((m, k)) if input == "x + residual" else None
    if m:
        tile = tile or row_tile(m, k)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            norm_quant_kernel[(triton.cdiv(m, tile.block_m),)](
                x.contiguous(),
                None if other is None else other.contiguous(),
                weight.contiguous(),
                h,
                codes,
                scale,
                row_sum,
                m,
                k,
                NORM_EPS=eps,
                EPS=EPS,
                INPUT=input,
                TERMS=triton.next_power_of_2(k),
                **tile.constants(),
                num_warps=tile.num_warps,
                num_stages=1,
                **launch_options(x.device),
            )
    return codes, scale, row_sum, h


def specs() -> list[Spec]:
    """Each input at a model's common width and at the longest single block; one at several."""
    inputs = ("x", "x + residual", "relu2")
    return [
        *(_spec(input, "bf16", 4096) for input in inputs),
        *(_spec(input, "fp32", 8192) for input in inputs),
        _spec("relu2", "bf16", 28672),
    ]


def _spec(input: str, dtype: str, k: int) -> Spec:
    names = {"x": "rmsnorm_quant", "x + residual": "add_rmsnorm_quant"}
    types = {
        "x_ptr": f"*{dtype}",
        "other_ptr": None if input == "x" else f"*{dtype}",
        "weight_ptr": f"*{dtype}",
        "h_ptr": f"*{dtype}" if input == "x + residual" else None,
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "row_sum_ptr": "*i32",
    }
    tile = row_tile(64, k, interpreted=False)
    constants = {"NORM_EPS": 1e-5, "EPS": EPS, "INPUT": input, "TERMS": triton.next_power_of_2(k)}
    return spec_of(
        f"{names.get(input, 'relu2_mul_rmsnorm_quant')} {dtype} K={k}",
        "quantization",
        norm_quant_kernel,
        types,
        constants | tile.constants(),
        tile.num_warps,
        sizes=("K",),
    )
