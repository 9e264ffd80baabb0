"""Weight quantization: ternary codes and their scale, gamma = max(mean|W|, 1e-5).

The weight is read twice, and nothing goes to the host in between:

    sum     one program a row (or a few): its sum of |W|; where a scale belongs to a row, its gamma
    sum     one program, for a scale of the whole tensor: the sum of the rows' sums, and gamma
    codes   tiles: compare with gamma / 2; the transposed codes go out from the same tile

The sums come out the same in whatever order they are added, see :mod:`bitnet_kernels.gpu.exact`.
Bit-exact with :func:`bitnet_kernels.reference.absmean_ternary`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.gpu.common import Spec, await_inputs, launch_options
from bitnet_kernels.gpu.exact import grid_of, magnitude, on_grid, rows_of, widen
from bitnet_kernels.reference import EPS

_TILE_N, _TILE_K, _TILE_WARPS = 64, 128, 8


@triton.jit
def sum_kernel(
    x_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    COUNT: tl.tensor,
    EPS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """BLOCK_M rows of ``x [M, K]``: the sum of a row's magnitudes to ``sum_ptr``, fp64; where that
    is None, the scale of COUNT weights that have this sum to ``gamma_ptr``, fp32.
    ``TERMS`` is the power of 2 from K on, ``STEPS * BLOCK_K >= K``."""
    await_inputs()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < M)[:, None]
    lanes = tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_ptr + rows[:, None] * K
    if STEPS == 1:
        x = tl.load(x_ptrs + lanes, inside & (lanes < K), other=0.0)
    fp64: tl.constexpr = x_ptr.dtype.element_ty == tl.float64
    largest = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64 if fp64 else tl.float32)
    for step in range(STEPS):
        if STEPS > 1:
            k = step * BLOCK_K + lanes
            x = tl.load(x_ptrs + k, inside & (k < K), other=0.0)
        largest = tl.maximum(largest, magnitude(widen(x)))
    grid = grid_of(tl.max(largest, 1).to(tl.float64), TERMS)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
    for step in range(STEPS):
        if STEPS > 1:
            k = step * BLOCK_K + lanes
            x = tl.load(x_ptrs + k, inside & (k < K), other=0.0)
        total += on_grid(tl.abs(widen(x)).to(tl.float64), grid)
    if sum_ptr is not None:
        tl.store(sum_ptr + rows, tl.sum(total, 1), rows < M)
    else:
        mean = (tl.sum(total, 1) / COUNT).to(tl.float32)
        gamma = tl.where(mean < float("inf"), tl.maximum(mean, EPS), float("nan"))
        tl.store(gamma_ptr + rows, gamma, rows < M)


@triton.jit
def codes_kernel(
    w_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    transposed_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    GAMMA_PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of the codes of ``w [N, K]``, and of ``[K, N]`` unless ``transposed_ptr`` is None.
    The tile is transposed once it is int8."""
    await_inputs()
    tiles_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    w = widen(tl.load(w_ptr + rows[:, None] * K + cols[None, :], mask, other=0.0)).to(tl.float32)
    if GAMMA_PER_ROW:
        threshold = 0.5 * tl.load(gamma_ptr + rows, rows < N, other=0.0)[:, None]
    else:
        threshold = 0.5 * tl.load(gamma_ptr)
    codes = (w > threshold).to(tl.int8) - (w < -threshold).to(tl.int8)
    tl.store(codes_ptr + rows[:, None] * K + cols[None, :], codes, mask)
    if transposed_ptr is not None:
        mask_t = (cols < K)[:, None] & (rows < N)[None, :]
        tl.store(transposed_ptr + cols[:, None] * N + rows[None, :], tl.trans(codes), mask_t)


def absmean_ternary(
    weight: Tensor, per_row: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """float ``[N, K]``, N, K >= 1 -> codes int8 ``[N, K]``, gamma fp32 ``[]`` or ``[N]``, and codes
    int8 ``[K, N]`` if asked for."""
    n, k = weight.shape
    weight = weight.float().contiguous() if weight.dtype == torch.float64 else weight.contiguous()
    codes = weight.new_empty((n, k), dtype=torch.int8)
    codes_t = weight.new_empty((k, n), dtype=torch.int8) if transposed else None
    gamma = weight.new_empty((n,) if per_row else (), dtype=torch.float32)
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        if per_row:
            _sum(weight, None, gamma, k)
        else:
            sums = weight.new_empty((n,), dtype=torch.float64)
            _sum(weight, sums, None, k)
            _sum(sums.view(1, n), None, gamma, n * k)
        codes_kernel[(triton.cdiv(n, _TILE_N) * triton.cdiv(k, _TILE_K),)](
            weight,
            gamma,
            codes,
            codes_t,
            n,
            k,
            GAMMA_PER_ROW=per_row,
            BLOCK_N=_TILE_N,
            BLOCK_K=_TILE_K,
            num_warps=_TILE_WARPS,
            num_stages=1,
            enable_fp_fusion=False,
            **launch_options(weight.device),
        )
    return codes, gamma, codes_t


def _sum(x: Tensor, sums: Tensor | None, gamma: Tensor | None, count: int) -> None:
    m, k = x.shape
    rows = rows_of(m, k)
    sum_kernel[(triton.cdiv(m, rows.block_m),)](
        x,
        sums,
        gamma,
        m,
        k,
        count,
        EPS=EPS,
        TERMS=triton.next_power_of_2(k),
        BLOCK_M=rows.block_m,
        BLOCK_K=rows.block_k,
        STEPS=rows.steps,
        num_warps=rows.num_warps,
        num_stages=1,
        enable_fp_fusion=False,
        **launch_options(x.device),
    )


def specs() -> list[Spec]:
    """Both kernels for fp32 (training) and bf16 weights, and the sum over rows."""
    found = []
    for dtype, k, output in (
        ("fp32", 4096, "sum"),
        ("bf16", 8192, "sum"),
        ("fp32", 28672, "gamma"),
        ("fp64", 8192, "gamma"),
    ):
        rows = rows_of(1 if dtype == "fp64" else 64, k, interpreted=False)
        types = {"x_ptr": f"*{dtype}"}
        types |= {"sum_ptr": "*fp64"} if output == "sum" else {"gamma_ptr": "*fp32"}
        constants = {"EPS": EPS, "TERMS": triton.next_power_of_2(k), "BLOCK_M": rows.block_m}
        constants |= {"BLOCK_K": rows.block_k, "STEPS": rows.steps}
        constants |= {"gamma_ptr" if output == "sum" else "sum_ptr": None}
        found.append(
            Spec(
                name=f"absmean_ternary {output} {dtype} K={k}",
                family="quantization",
                kernel=sum_kernel,
                types=types,
                constants=constants,
                num_warps=rows.num_warps,
                num_stages=1,
                tokens=0,
                weights=0,
                aligned=(*types, "K", "COUNT"),
            )
        )
    for dtype in ("fp32", "bf16"):
        types = {"w_ptr": f"*{dtype}", "gamma_ptr": "*fp32", "codes_ptr": "*i8"}
        types |= {"transposed_ptr": "*i8"}
        found.append(
            Spec(
                name=f"absmean_ternary codes {dtype}",
                family="quantization",
                kernel=codes_kernel,
                types=types,
                constants={"GAMMA_PER_ROW": False, "BLOCK_N": _TILE_N, "BLOCK_K": _TILE_K},
                num_warps=_TILE_WARPS,
                num_stages=1,
                tokens=0,
                weights=0,
                aligned=(*types, "N", "K"),
            )
        )
    return found
