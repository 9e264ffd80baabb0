"""Code that the matmul kernels share: tiles, split-K, the epilogue, the launch.

M tokens, N out_features, K in_features, P = bytes in a packed row (a quarter of K padded to 64).
The kernels differ only in how they fill their int32 accumulators. All take the same arguments (see
:func:`launch`), so one launch and one description serve all.

**Dependent launch.** A generation step is hundreds of short kernels, and each would wait until the
one before it has finished. From compute capability 9.0 on a kernel may start earlier, while its
predecessor still runs (CUDA C++ Programming Guide, "Programmatic Dependent Launch"). So
*every* Triton kernel of this package, including the matmuls of training, keeps one rule:

* it is launched with :func:`launch_options`, and every thread calls :func:`await_inputs` before its
  first load, store or atomic. Before that call it may use only its parameters and
  :func:`prefetch_weights`, which yields no value.

Then memory is read and written as if kernels ran one after the other. The wait ends when the
preceding kernel has completed and its writes are visible. If that kernel was launched early too, it
completed only after its own wait had ended, so by induction all kernels before it have completed.
No store may precede the wait either: the caching allocator reuses memory in the stream's order, so
a kernel may write memory that earlier ones still read. Kernels of torch, fills and copies do not
take part: the stream waits for completion before them, and a kernel of ours waits for theirs. An
event, and so another stream, sees only completion. A CUDA graph keeps all this: capture turns the
option into a special kind of edge (CUDA 12.3).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from bitnet_kernels.dispatch import TileConfig

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton runs kernels in its CPU interpreter. Triton reads TRITON_INTERPRET when it
decorates a function, so the type of its own functions shows the value at Triton's import."""
ASSEMBLY = not INTERPRETED and torch.version.hip is None
"""Whether kernels take their inline-PTX branch; the plain one runs wherever Triton does."""
_ASSEMBLY = tl.constexpr(ASSEMBLY)
_PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")


class Rescale(NamedTuple):
    """The epilogue from accumulators to outputs: ``((acc * s_x) * scale) + bias``, then one cast.

    s_x: fp32 ``[M]``; scale: fp32 ``[]`` or ``[N]``; bias: any float dtype, ``[N]``, or None.
    """

    s_x: Tensor
    scale: Tensor
    bias: Tensor | None
    dtype: torch.dtype


class Spec(NamedTuple):
    """One compiled form of a kernel, as ahead-of-time compilation needs it.

    ``types`` holds the types of pointers (arguments in neither dict are int32), ``constants`` the
    constexpr values and the pointers that are None, ``aligned`` the arguments that the launch
    guarantees to be divisible by 16. ``tokens`` is the M that the form is made for, ``weights`` the
    number of weights that one program reads per iteration of its main loop; both are 0 without
    packed weights.
    """

    name: str
    family: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    tokens: int = 0
    weights: int = 0
    aligned: tuple[str, ...] = ()


def spec_of(
    name: str,
    family: str,
    kernel: Any,
    types: Mapping[str, str | None],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 1,
    sizes: tuple[str, ...] = (),
) -> Spec:
    """The :class:`Spec` of a kernel without packed weights. A pointer whose type is None is None;
    the other pointers and the ``sizes`` are divisible by 16."""
    given = {pointer: kind for pointer, kind in types.items() if kind is not None}
    missing = dict.fromkeys(types.keys() - given.keys())
    aligned = (*given, *sizes)
    return Spec(
        name, family, kernel, given, constants | missing, num_warps, num_stages, aligned=aligned
    )


def launch_options(device: torch.device) -> dict[str, bool]:
    """The options of every launch on a device: no fused multiply-add, which would skip a rounding
    that the reference makes, and ``launch_pdl`` on CUDA from compute capability 9.0 on. Other
    backends and the interpreter do not know ``launch_pdl``."""
    options = {"enable_fp_fusion": False}
    if ASSEMBLY and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        options["launch_pdl"] = True
    return options


@triton.jit
def await_inputs() -> None:
    """Wait for the kernels before this one, then let the next one start, which waits in turn. Does
    nothing where kernels are not launched early. Before this call a kernel touches no memory."""
    if _ASSEMBLY and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_weights(
    w_ptr: tl.tensor,
    col: tl.tensor,
    begin: tl.tensor,
    N: tl.tensor,
    LENGTH: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Before the wait, make L2 fetch the first block of a program's weights: BLOCK elements from
    ``begin`` on, of each of BLOCK_N rows of ``w [N, LENGTH]``.

    It is safe even while another kernel writes the weights: all reads and writes of memory go
    through L2, and a prefetch to L2 gives the program no value. A line has 128 bytes. If rows begin
    within a line, the last line of a block may be missed.
    """
    if _ASSEMBLY and cuda_capability_geq(9, 0):
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = BLOCK // LINE if BLOCK > LINE else 1
        rows = tl.minimum(col + tl.arange(0, BLOCK_N), N - 1)
        at = tl.minimum(begin + tl.arange(0, LINES) * LINE, LENGTH - 1)
        ptrs = w_ptr + rows[:, None] * LENGTH + at[None, :]
        tl.inline_asm_elementwise(_PREFETCH, "=r,l", [ptrs], tl.int32, False, 1)


@triton.jit
def program(
    M: tl.tensor, N: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr
) -> tl.tuple:
    """(tile, first row, first column, slice of K) of this program.

    The grid has one dimension, which can hold 2^31 programs (the others hold 65535). Neighbors
    share columns first, in groups of 8 tiles: when M is large, many programs read the same weights
    at once, and L2 serves them. Rows and columns are int64: products with K or N may exceed 2^31.
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
    s_x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    N: tl.tensor,
    SCALE_PER_ROW: tl.constexpr,
) -> None:
    """The epilogue, in the order of :func:`bitnet_kernels.reference.rescale`. If ``s_x_ptr`` is
    None, it stores the accumulators themselves. If ``row_sum_ptr`` is not None, ``acc`` sums
    (w + 1) * x."""
    if row_sum_ptr is not None:
        acc -= tl.load(row_sum_ptr + rows)
    if s_x_ptr is None:
        tl.store(y_ptr + rows * N + cols, acc, mask)
    else:
        y = acc.to(tl.float32) * tl.load(s_x_ptr + rows)
        y = y * tl.load(scale_ptr + cols if SCALE_PER_ROW else scale_ptr)
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
    s_x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    SCALE_PER_ROW: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """Add up the slices of K, if there are several, and run the epilogue.

    ``sums[i]`` belongs to ``rows + i`` and ``cols``, which broadcast to its shape. The program that
    arrives last stores the result. Integer atomics are exact in any order, so the result does not
    depend on which one that is. The barrier orders every thread's additions before the arrival that
    announces them.
    """
    if SPLIT_K == 1:
        for i in tl.static_range(len(sums)):
            mask = (rows + i < M) & (cols < N)
            store(
                sums[i], tl.minimum(rows + i, M - 1), tl.minimum(cols, N - 1), mask, y_ptr,
                row_sum_ptr, s_x_ptr, scale_ptr, bias_ptr, N, SCALE_PER_ROW,
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
                    row_sum_ptr, s_x_ptr, scale_ptr, bias_ptr, N, SCALE_PER_ROW,
                )  # fmt: skip


def aligned(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous and on a 16-byte boundary, as 16-byte loads need."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(
    kernel: Any,
    config: TileConfig,
    x: Tensor,
    w: Tensor,
    sizes: tuple[int, int, int],
    row_sum: Tensor | None,
    rescale: Rescale | None,
    **constants: Any,
) -> Tensor:
    """Run a matmul kernel on operands in the kernel's layout.

    Arguments:
        x, w: activations of M tokens and weights of N rows, aligned.
        sizes: M, N and the length of a row of ``w`` in the kernel's units.
        row_sum: int32 ``[M]``, for kernels that sum (w + 1) * x.
        constants: the kernel's own constexprs.
    Returns:
        ``[M, N]``: int32 accumulators, or with ``rescale`` outputs in its dtype.
    """
    m, n, _ = sizes
    s_x, scale, bias, dtype = rescale or (None, None, None, torch.int32)
    # Triton 3.9's interpreter rounds fp32 to bf16 wrongly (ties away from zero, lost carries), so
    # there torch does the cast.
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
                None if scale is None else scale.contiguous(),
                None if bias is None else bias.contiguous(),
                partial,
                arrived,
                *sizes,
                SCALE_PER_ROW=scale is not None and scale.dim() == 1,
                **config.blocks(),
                SPLIT_K=config.split_k,
                **constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **launch_options(x.device),
            )
    return y.to(dtype)


def describe(
    name: str,
    family: str,
    kernel: Any,
    config: TileConfig,
    x_type: str,
    w_type: str,
    outputs: str = "*bf16",
    row_sum: bool = False,
    **constants: Any,
) -> Spec:
    """The :class:`Spec` that :func:`launch` would compile: outputs with one scale per tensor and
    no bias, or int32 accumulators (``outputs`` ``"*i32"``)."""
    types = {"x_ptr": x_type, "w_ptr": w_type, "y_ptr": outputs}
    values: dict[str, Any] = {"bias_ptr": None, "SCALE_PER_ROW": False, "SPLIT_K": config.split_k}
    values |= config.blocks()
    for name_of_pointer, kind, present in (
        ("row_sum_ptr", "*i32", row_sum),
        ("s_x_ptr", "*fp32", outputs != "*i32"),
        ("scale_ptr", "*fp32", outputs != "*i32"),
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
