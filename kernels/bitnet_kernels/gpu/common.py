"""What the matmul kernels share: who computes which outputs, split-K, the epilogue, the launch.

M tokens, N out_features, K in_features, P = bytes in a packed row (a quarter of K padded to 64).
A kernel differs from the next one only in how it fills its int32 accumulators. They all take the
same arguments (see :func:`launch`), so one launch and one description serve them all.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.dispatch import Config

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton runs kernels in its CPU interpreter. TRITON_INTERPRET is read when a function is
decorated, so what Triton's own functions became when it was imported is what counts."""
ASSEMBLY = not INTERPRETED and torch.version.hip is None
"""Whether kernels take their inline-PTX branch; the plain one runs anywhere Triton does."""


class Rescale(NamedTuple):
    """What turns accumulators into outputs: ``((acc * s_x) * gamma) + bias``, cast to ``dtype``.

    s_x: fp32 ``[M]``; gamma: fp32 ``[]`` or ``[N]``; bias: any float dtype, ``[N]``, or None.
    """

    s_x: Tensor
    gamma: Tensor
    bias: Tensor | None
    dtype: torch.dtype


class Spec(NamedTuple):
    """One compiled form of a kernel, as ahead-of-time compilation needs it.

    ``types`` holds the types of pointers (arguments in neither dict are int32), ``constants`` the
    constexpr values and the pointers that are None, ``aligned`` the arguments that the launch
    guarantees to be divisible by 16. ``tokens`` is the M it is made for and ``weights`` what one
    program reads in one iteration of its main loop; both 0 where there are no packed weights.
    """

    name: str
    family: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    tokens: int
    weights: int
    aligned: tuple[str, ...]


@triton.jit
def program(
    M: tl.tensor, N: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr
) -> tl.tuple:
    """(tile, first row, first column, slice of K) of this program.

    The grid has one dimension, which may hold 2^31 programs (the others stop at 65535). Neighbours
    share columns first, in groups of 8 tiles: while M is large, so many programs read the same
    weights at once that L2 serves them. int64: products with K or N may pass 2^31.
    """
    tile = tl.program_id(0) // SPLIT_K
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = 8 * tiles_n
    first_m = (tile // per_group) * 8
    height = tl.minimum(tiles_m - first_m, 8)
    inside = tile % per_group
    row = (first_m + inside % height).to(tl.int64) * BLOCK_M
    col = (inside // height).to(tl.int64) * BLOCK_N
    return tile, row, col, tl.program_id(0) % SPLIT_K


@triton.jit
def store(
    acc: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    mask: tl.tensor,
    y_ptr: tl.tensor,
    row_sum_ptr: tl.tensor,
    s_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    N: tl.tensor,
    GAMMA_PER_ROW: tl.constexpr,
) -> None:
    """The epilogue, in the order of :func:`bitnet_kernels.reference.rescale`; with ``s_ptr`` None
    it stores the accumulators themselves. A ``row_sum_ptr`` that is not None says that ``acc`` sums
    (w + 1) * x."""
    if row_sum_ptr is not None:
        acc -= tl.load(row_sum_ptr + rows)
    if s_ptr is None:
        tl.store(y_ptr + rows * N + cols, acc, mask)
    else:
        y = acc.to(tl.float32) * tl.load(s_ptr + rows)
        y = y * tl.load(gamma_ptr + cols if GAMMA_PER_ROW else gamma_ptr)
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + cols).to(tl.float32)
        tl.store(y_ptr + rows * N + cols, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def finish(
    sums: tl.tuple,
    rows: tl.tensor,
    cols: tl.tensor,
    tile: tl.tensor,
    y_ptr: tl.tensor,
    row_sum_ptr: tl.tensor,
    s_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    GAMMA_PER_ROW: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """Add up the slices of K, if there are several, and run the epilogue.

    ``sums[i]`` belongs to ``rows + i`` and ``cols``, which broadcast to its shape. Integer atomics
    are exact in any order, so the result does not depend on which program comes last; that one
    stores. The barrier puts every thread's additions before the arrival that announces them.
    """
    if SPLIT_K == 1:
        for i in tl.static_range(len(sums)):
            mask = (rows + i < M) & (cols < N)
            store(
                sums[i], tl.minimum(rows + i, M - 1), tl.minimum(cols, N - 1), mask, y_ptr,
                row_sum_ptr, s_ptr, gamma_ptr, bias_ptr, N, GAMMA_PER_ROW,
            )  # fmt: skip
    else:
        for i in tl.static_range(len(sums)):
            mask = (rows + i < M) & (cols < N)
            tl.atomic_add(partial_ptr + (rows + i) * N + cols, sums[i], mask, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1:
            for i in tl.static_range(len(sums)):
                mask = (rows + i < M) & (cols < N)
                at = partial_ptr + (rows + i) * N + cols
                acc = tl.load(at, mask, other=0, cache_modifier=".cg")  # from L2: L1 is not shared
                store(
                    acc, tl.minimum(rows + i, M - 1), tl.minimum(cols, N - 1), mask, y_ptr,
                    row_sum_ptr, s_ptr, gamma_ptr, bias_ptr, N, GAMMA_PER_ROW,
                )  # fmt: skip


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and on a 16-byte boundary, as 16-byte loads want it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(
    kernel: Any,
    config: Config,
    x: Tensor,
    w: Tensor,
    sizes: tuple[int, int, int],
    row_sum: Tensor | None,
    rescale: Rescale | None,
    **constants: Any,
) -> Tensor:
    """Run a matmul kernel on operands laid out as it wants them.

    Arguments:
        x, w: activations of M tokens and weights of N rows, aligned.
        sizes: M, N and the length of a row of ``w`` in the kernel's units.
        row_sum: int32 ``[M]``, for kernels that sum (w + 1) * x.
        constants: the kernel's own constexprs.
    Returns:
        ``[M, N]``: int32 accumulators, or with ``rescale`` outputs of its dtype.
    """
    m, n, _ = sizes
    s_x, gamma, bias, dtype = rescale or (None, None, None, torch.int32)
    # The interpreter of Triton 3.9 rounds fp32 to bf16 wrongly (ties away from zero, lost carries),
    # so there the cast is torch's.
    stored_dtype = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    y = x.new_empty((m, n), dtype=stored_dtype)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    partial = arrived = None
    if config.split_k > 1:
        scratch = x.new_zeros((m * n + tiles,), dtype=torch.int32)
        partial, arrived = scratch[: m * n], scratch[m * n :]
    if tiles:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            kernel[(tiles * config.split_k,)](
                x,
                w,
                y,
                row_sum,
                s_x,
                None if gamma is None else gamma.contiguous(),
                None if bias is None else bias.contiguous(),
                partial,
                arrived,
                *sizes,
                GAMMA_PER_ROW=gamma is not None and gamma.dim() == 1,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                SPLIT_K=config.split_k,
                **constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=False,  # an FMA would skip a rounding that the reference makes
            )
    return y.to(dtype)


def describe(
    name: str,
    family: str,
    kernel: Any,
    config: Config,
    x_type: str,
    w_type: str,
    outputs: str = "*bf16",
    row_sum: bool = False,
    **constants: Any,
) -> Spec:
    """The :class:`Spec` of what :func:`launch` would compile: outputs with one gamma a tensor and
    no bias, or int32 accumulators (``outputs`` ``"*i32"``)."""
    types = {"x_ptr": x_type, "w_ptr": w_type, "y_ptr": outputs}
    values: dict[str, Any] = {"bias_ptr": None, "GAMMA_PER_ROW": False, "SPLIT_K": config.split_k}
    values |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    for name_of_pointer, kind, present in (
        ("row_sum_ptr", "*i32", row_sum),
        ("s_ptr", "*fp32", outputs != "*i32"),
        ("gamma_ptr", "*fp32", outputs != "*i32"),
        ("partial_ptr", "*i32", config.split_k > 1),
        ("arrived_ptr", "*i32", config.split_k > 1),
    ):
        if present:
            types[name_of_pointer] = kind
        else:
            values[name_of_pointer] = None
    return Spec(
        name,
        family,
        kernel,
        types,
        values | constants,
        config.num_warps,
        config.num_stages,
        tokens=config.block_m,
        weights=config.block_n * config.block_k,
        aligned=("x_ptr", "w_ptr", "y_ptr", "N", "P"),
    )
