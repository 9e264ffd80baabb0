"""Lay out the operands of a ternary product for a formulation, and run its kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from bitnet_kernels.dispatch import LANE_COLUMNS, TileConfig, choose, key_of
from bitnet_kernels.gpu.common import (
    ASSEMBLY,
    INTERPRETED,
    Rescale,
    aligned,
    await_inputs,
    launch,
    launch_options,
)
from bitnet_kernels.gpu.gemm import gemm_kernel
from bitnet_kernels.gpu.gemv import gemv_kernel
from bitnet_kernels.gpu.popcount import activation_planes, popcount_kernel


def plan(
    kernel: str, m: int, n: int, k: int, planes: bool, device: torch.device
) -> tuple[str, TileConfig]:
    """The formulation for a shape and its configuration."""
    if not INTERPRETED:
        return choose(kernel, m, n, k, planes, *key_of(device))
    formulation, _ = choose(kernel, m, n, k, planes, 90, "")
    return formulation, interpreted_config(formulation, m, n, k)


def interpreted_config(formulation: str, m: int, n: int, k: int) -> TileConfig:
    """Few programs with large tiles: the interpreter takes time per operation, hardly per lane."""
    tokens = triton.next_power_of_2(max(m, 1))
    rows = triton.next_power_of_2(max(n, 1))
    columns = triton.next_power_of_2(k)
    if formulation in ("gemm", "unpacked"):
        return TileConfig(min(max(tokens, 8), 128), min(max(rows, 16), 512), 256)
    longest = LANE_COLUMNS[formulation]
    block_k = min(max(columns, longest // 32), longest)
    return TileConfig(min(tokens, 4), max(min(rows, 512), longest // block_k), block_k)


def matmul(
    formulation: str,
    config: TileConfig,
    x_q: Tensor,
    packed: Tensor,
    planes: Tensor | None = None,
    row_sum: Tensor | None = None,
    rescale: Rescale | None = None,
    full_range: bool = True,
) -> Tensor:
    """int8 ``[M, K]`` times packed ternary uint8 ``[N, P]`` -> ``[M, N]``.

    Arguments:
        x_q: codes, or already padded with zeros to ``[M, 4P]``.
        planes: ``packing.bit_planes`` of ``packed``, for popcount.
        row_sum: int32 ``[M]``, the sums of the codes, if known.
        rescale: turns the int32 accumulators into outputs.
        full_range: the codes may hold -128, which the quantizer never gives.
    """
    n, p = packed.shape
    m = x_q.shape[0]
    x_q = aligned(pad(x_q, (0, 4 * p - x_q.shape[1])) if x_q.shape[1] < 4 * p else x_q)
    packed = aligned(packed)
    if formulation == "popcount":
        assert planes is not None
        return launch(
            popcount_kernel,
            config,
            activation_planes(x_q),
            aligned(planes),
            (m, n, 4 * planes.shape[2]),
            None,
            rescale,
            ASM=ASSEMBLY,
        )
    needs_row_sum = formulation == "gemm" or (formulation == "dp4a" and ASSEMBLY)
    if needs_row_sum and row_sum is None:
        row_sum = x_q.sum(1, dtype=torch.int32)
    if formulation == "dp4a":
        # A lane's sum of the upper plane grows by up to 2^14 per column, so this many columns fit.
        columns = (2**31 // 2**14) * 4 * config.block_k // 64
        config = config._replace(split_k=max(config.split_k, -(-4 * p // columns)))
    if formulation in ("sad", "dp4a"):
        sad = formulation == "sad"
        return launch(
            gemv_kernel,
            config,
            x_q.view(torch.int32),
            packed.view(torch.int32),
            (m, n, p),
            row_sum if needs_row_sum else None,
            rescale,
            SAD=sad,
            FULL_RANGE=sad and full_range,
            ASM=ASSEMBLY,
        )
    if formulation == "gemm":
        return launch(
            gemm_kernel, config, x_q, packed, (m, n, p), row_sum, rescale, PLANES=4, ASM=ASSEMBLY
        )
    codes = unpack(packed)
    return launch(
        gemm_kernel, config, x_q, codes, (m, n, 4 * p), None, rescale, PLANES=1, ASM=ASSEMBLY
    )


@triton.jit
def unpack_kernel(
    w_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A tile of uint8 ``[N, P]`` -> int8 ``[N, 4P]``."""
    await_inputs()
    tiles = tl.cdiv(P, BLOCK)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < N) & (at < P)
    byte = tl.load(w_ptr + rows * P + at, mask, other=0)
    for plane in tl.static_range(4):
        code = ((byte >> (2 * plane)) & 3).to(tl.int8) - 1
        tl.store(codes_ptr + rows * (4 * P) + plane * P + at, code, mask)


def unpack(packed: Tensor) -> Tensor:
    """uint8 ``[N, P]`` -> codes int8 ``[N, 4P]``, on the device."""
    n, p = packed.shape
    codes = packed.new_empty((n, 4 * p), dtype=torch.int8)
    rows = min(triton.next_power_of_2(max(n, 1)), 1024) if INTERPRETED else 4
    tiles = triton.cdiv(n, rows) * triton.cdiv(p, 512)
    if tiles:
        with torch.cuda.device_of(packed):
            unpack_kernel[(tiles,)](
                packed,
                codes,
                n,
                p,
                ROWS=rows,
                BLOCK=512,
                num_warps=4,
                **launch_options(packed.device),
            )
    return codes
