"""Rotary positions and the append to the cache in one kernel: one program per token and head.

The kernel reads a token's column, which is also its position, on the device, so a launch captured
in a CUDA graph stays right while the rows grow. Bit-exact with
:func:`bitnet_kernels.reference.rope_append`: it computes in fp32 in the same order, without fused
multiply-add, casts once to the activations' dtype, then casts or quantizes to the cache's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.gpu.common import Spec, await_inputs, launch_options, spec_of
from bitnet_kernels.gpu.exact import magnitude, narrow, widen
from bitnet_kernels.gpu.quant import codes_of, scale_of
from bitnet_kernels.reference import EPS


@triton.jit
def append(
    first: tl.tensor,
    second: tl.tensor,
    cache_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    column: tl.tensor,
    lanes: tl.tensor,
    E: tl.constexpr,
    EPS: tl.constexpr,
) -> None:
    """Write both halves of a head into the cache, at a column counted over all rows and heads."""
    first, second = widen(first), widen(second)
    at = cache_ptr + column * E + lanes
    inside = lanes < E // 2
    if scale_ptr is None:
        tl.store(at, narrow(first, cache_ptr.dtype.element_ty), inside)
        tl.store(at + E // 2, narrow(second, cache_ptr.dtype.element_ty), inside)
    else:
        largest = tl.maximum(tl.max(magnitude(first), 0), tl.max(magnitude(second), 0))
        scale, finite = scale_of(largest, EPS)
        tl.store(at, codes_of(first, scale, finite).to(tl.int8), inside)
        tl.store(at + E // 2, codes_of(second, scale, finite).to(tl.int8), inside)
        tl.store(scale_ptr + column, tl.where(finite, scale, float("nan")))


@triton.jit
def rope_append_kernel(
    qkv_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    n_valid_ptr: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    G: tl.tensor,
    L: tl.tensor,
    E: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Head ``program_id(1)`` of the H queries, G keys and G values of token ``program_id(0)`` of
    ``qkv [B, T, H + 2G, E]``; ``BLOCK >= E / 2``, a power of 2. The scales are None for a cache
    that is not int8."""
    await_inputs()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = token // T
    column = tl.load(lengths_ptr + row).to(tl.int64) + token % T
    lanes = tl.arange(0, BLOCK)
    inside = lanes < E // 2
    x_ptrs = qkv_ptr + (token * (H + 2 * G) + head) * E + lanes
    first = tl.load(x_ptrs, inside, other=0.0)
    second = tl.load(x_ptrs + E // 2, inside, other=0.0)
    if head < H + G:
        angle = tl.minimum(tl.maximum(column, 0), L - 1) * E + lanes
        x, y = widen(first), widen(second)
        left = x * tl.load(cos_ptr + angle, inside, other=0.0)
        left += -y * tl.load(sin_ptr + angle, inside, other=0.0)
        right = y * tl.load(cos_ptr + angle + E // 2, inside, other=0.0)
        right += x * tl.load(sin_ptr + angle + E // 2, inside, other=0.0)
        first, second = narrow(left, first.dtype), narrow(right, second.dtype)
    if head < H:
        q_ptrs = q_ptr + (token * H + head) * E + lanes
        tl.store(q_ptrs, first, inside)
        tl.store(q_ptrs + E // 2, second, inside)
    elif (token % T < tl.load(n_valid_ptr + row)) & (column >= 0) & (column < L):
        if head < H + G:
            at = (row * G + head - H) * L + column
            append(first, second, k_ptr, k_scale_ptr, at, lanes, E, EPS)
        else:
            at = (row * G + head - H - G) * L + column
            append(first, second, v_ptr, v_scale_ptr, at, lanes, E, EPS)


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    n_valid: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """:func:`bitnet_kernels.rope_append` for checked arguments."""
    (b, t, columns), (_, g, n_columns, e) = qkv.shape, k_cache.shape
    heads = columns // e
    q = qkv.new_empty((b, t, heads - 2 * g, e))
    if b * t:
        with torch.cuda.device_of(qkv):  # Triton launches on the current device
            rope_append_kernel[(b * t, heads)](
                qkv.contiguous(),
                cos.contiguous(),
                sin.contiguous(),
                q,
                k_cache,
                v_cache,
                k_scale,
                v_scale,
                lengths.contiguous(),
                n_valid.contiguous(),
                t,
                heads - 2 * g,
                g,
                n_columns,
                E=e,
                EPS=EPS,
                BLOCK=triton.next_power_of_2(e // 2),
                num_warps=1,
                num_stages=1,
                **launch_options(qkv.device),
            )
    return q


def specs() -> list[Spec]:
    """A 16-bit and an int8 cache at common widths of a head."""
    return [_spec("bf16", 128, False), _spec("bf16", 128, True), _spec("fp32", 64, False)]


def _spec(dtype: str, e: int, int8: bool) -> Spec:
    cache, scale = "i8" if int8 else dtype, "*fp32" if int8 else None
    types = {"qkv_ptr": f"*{dtype}", "q_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    types |= {"k_ptr": f"*{cache}", "v_ptr": f"*{cache}"}
    types |= {"lengths_ptr": "*i32", "n_valid_ptr": "*i32"}
    constants = {"E": e, "EPS": EPS, "BLOCK": triton.next_power_of_2(e // 2)}
    return spec_of(
        f"rope_append {dtype} E={e}{', int8 cache' if int8 else ''}",
        "attention",
        rope_append_kernel,
        types | {"k_scale_ptr": scale, "v_scale_ptr": scale},
        constants,
        num_warps=1,
    )
