"""The CPU implementations of the operators that work token by token: they quantize, normalize and
attend.

fp32 activations run in the native library; other dtypes, and all of them without the library, in
the reference. Both give the same bits, except that attention adds in another order.
"""

import ctypes

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.cpu import native
from bitnet_kernels.ops.register import rows

Quantized = tuple[Tensor, Tensor, Tensor]


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """The library if it accepts the activations x, else None."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    return native.library()


def quant(x: Tensor) -> Quantized:
    """:func:`bitnet_kernels.reference.quant`."""
    if (lib := library_for(x)) is None:
        return reference.quant(x)
    x, out = x.contiguous(), _quantized(x)
    lib.bn_quant(x.data_ptr(), *rows(x).shape, *_pointers(*out), native.threads())
    return out


def rmsnorm_quant(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    """:func:`bitnet_kernels.reference.rmsnorm_quant`."""
    if (lib := library_for(x)) is None:
        return reference.rmsnorm_quant(x, weight, eps)
    x, out = x.contiguous(), _quantized(x)
    weight = weight.float().contiguous()
    lib.bn_rmsnorm_quant(
        *_pointers(x, weight), eps, *rows(x).shape, *_pointers(*out), native.threads()
    )
    return out


def add_rmsnorm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`bitnet_kernels.reference.add_rmsnorm_quant`."""
    if (lib := library_for(x)) is None:
        return reference.add_rmsnorm_quant(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.float().contiguous()
    out, h = _quantized(x), torch.empty_like(x)
    lib.bn_add_rmsnorm_quant(
        *_pointers(x, residual, weight),
        eps,
        *rows(x).shape,
        *_pointers(*out, h),
        native.threads(),
    )
    return *out, h


def relu2_mul_rmsnorm_quant(gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> Quantized:
    """:func:`bitnet_kernels.reference.relu2_mul_rmsnorm_quant`."""
    if (lib := library_for(gate)) is None:
        return reference.relu2_mul_rmsnorm_quant(gate, up, weight, eps)
    gate, up, weight = gate.contiguous(), up.contiguous(), weight.float().contiguous()
    out = _quantized(gate)
    lib.bn_relu2_mul_rmsnorm_quant(
        *_pointers(gate, up, weight),
        eps,
        *rows(gate).shape,
        *_pointers(*out),
        native.threads(),
    )
    return out


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
    """:func:`bitnet_kernels.reference.rope_append`."""
    if (lib := library_for(qkv)) is None:
        return reference.rope_append(
            qkv, cos, sin, k_cache, v_cache, lengths, n_valid, k_scale, v_scale
        )
    (b, t, columns), (_, g, _, e) = qkv.shape, k_cache.shape
    n_heads = columns // e - 2 * g
    inputs = [x.contiguous() for x in (qkv, cos, sin, lengths.long(), n_valid.long())]
    q = qkv.new_empty(b, t, n_heads, e)
    cache = _cache(k_cache, v_cache, k_scale, v_scale)
    lib.bn_rope_append(
        ctypes.byref(cache), *_pointers(*inputs), b, t, n_heads, q.data_ptr(), native.threads()
    )
    return q


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """:func:`bitnet_kernels.reference.decode_attention`."""
    if (lib := library_for(q)) is None:
        return reference.decode_attention(q, k_cache, v_cache, lengths, k_scale, v_scale)
    (b, t, h, e), threads = q.shape, native.threads()
    q, lengths = q.contiguous(), lengths.long().contiguous()
    y = q.new_empty(b, t, h * e)
    cache = _cache(k_cache, v_cache, k_scale, v_scale)
    size = lib.bn_decode_attention_scratch(k_cache.shape[2])
    scratch = q.new_empty(threads, size, dtype=torch.uint8)
    lib.bn_decode_attention(
        ctypes.byref(cache), *_pointers(q, lengths), b, t, h, *_pointers(y, scratch), threads
    )
    return y


def _quantized(x: Tensor) -> Quantized:
    """Uninitialized codes, scale and sum for x's tokens."""
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1]),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _cache(
    k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> native.LayerCache:
    scales = [None if scale is None else scale.data_ptr() for scale in (k_scale, v_scale)]
    return native.LayerCache(native.KINDS[k.dtype], *k.shape[1:], *_pointers(k, v), *scales)
