"""The operators of attention over a static cache.

The kernels read the rows' lengths, which grow, on the device. Shapes and launches stay the same
from one generation step to the next, nothing waits for the device, and one CUDA graph serves every
step. The reference, which runs without Triton, does wait for the device.

B rows, T new tokens per row, H query heads, G key/value heads (G divides H), E channels per head
(even, at most 256), S >= B rows and L columns of the cache. The cache of one layer is contiguous:
keys and values ``[S, G, L, E]``, float, or int8 with scales fp32 ``[S, G, L]``, one per head and
token (:func:`bitnet_kernels.reference.absmax_int8`).
"""

from typing import Any

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.checks import check_device, check_dtype, check_tensor
from bitnet_kernels.cpu import rows as native_rows
from bitnet_kernels.ops.register import register

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of activations, and of the caches that are not int8."""
MAX_HEAD_DIM = 256
"""Most channels per head: a block of the kernels holds that many."""


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
    """Rotate the new tokens' queries and keys by their positions (RoPE, arXiv 2104.09864, the
    rotate-half form) and write keys and values into the cache, in place.

    Token t of row b has position and column ``lengths[b] + t``. It is written if ``t < n_valid[b]``
    and the cache has that column, else dropped. So an ``n_valid`` above T means T, a row with
    ``n_valid`` 0 is left as it is, and nothing is ever written from column L on. Queries are
    rotated whether their token is written or not. A position outside the tables takes their nearest
    row. Lengths are not advanced.

    Arguments:
        qkv: fp32, bf16 or fp16 ``[B, T, (H + 2G) * E]``: queries, keys, values, head by head.
        cos, sin: fp32 ``[L, E]``, the cosine and sine of each position's and channel's angle.
        k_cache, v_cache: fp32, bf16, fp16 or int8 ``[S, G, L, E]``, contiguous. Keys are rotated in
            fp32 and cast to the dtype of qkv, then cast or quantized to the cache's.
        lengths, n_valid: int32 or int64 ``[B]``, on the device: the columns filled and the tokens
            that count (right padding does not).
        k_scale, v_scale: fp32 ``[S, G, L]``, contiguous, with an int8 cache; else None. A key or
            value that holds a NaN or an infinity gets scale NaN and codes 0.
    Returns:
        the queries, ``[B, T, H, E]``, in the dtype of qkv.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device, shape or layout.
    """
    _check_activations("qkv", qkv, 3, "[B, T, (H + 2G) * E]")
    _check_cache(qkv, k_cache, v_cache, k_scale, v_scale)
    _, g, n_columns, e = k_cache.shape
    if qkv.shape[2] % (g * e) or qkv.shape[2] < 3 * g * e:
        raise ValueError(
            f"qkv: expected (H + 2G) * E columns, H a multiple of G = {g}, E = {e}; "
            f"got {qkv.shape[2]}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        _check_shaped(name, table, torch.float32, [n_columns, e])
    _check_counts(qkv, lengths=lengths, n_valid=n_valid)
    check_device(qkv, cos=cos, sin=sin)
    return _rope_append(qkv, cos, sin, k_cache, v_cache, lengths, n_valid, k_scale, v_scale)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention of the new tokens over the cache:
    ``softmax(q k^T / sqrt(E)) v`` in fp32, one cast at the end.

    Query t of row b sees columns ``0 .. lengths[b] + t``, which include those that
    :func:`rope_append` has just written, or all L where the cache ends before. A negative length
    counts as 0. Other columns do not change its output, whatever they hold. If a column that it
    sees holds a NaN or an infinity, the output of that head is not finite. Queries of padding
    tokens may see columns that were never written: their outputs have no meaning.

    Arguments:
        q: fp32, bf16 or fp16 ``[B, T, H, E]``, rotated.
        k_cache, v_cache, k_scale, v_scale: as for :func:`rope_append`, with any contents.
        lengths: int32 or int64 ``[B]``, on the device: columns filled *before* the new tokens.
    Returns:
        ``[B, T, H * E]`` in the dtype of q. On CUDA the columns are cut into slices whose number
        depends on shapes and device, never on the lengths. Where q and cache have 16 bits or fewer,
        probabilities are rounded to 16 bits for the product with the values.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device, shape or layout.
    """
    _check_activations("q", q, 4, "[B, T, H, E]")
    _check_cache(q, k_cache, v_cache, k_scale, v_scale)
    _, g, _, e = k_cache.shape
    if q.shape[3] != e:
        raise ValueError(f"q: expected E = {e} as the cache, got {q.shape[3]}")
    if q.shape[2] == 0 or q.shape[2] % g:
        raise ValueError(f"q: expected H as a multiple of the cache's G = {g}, got {q.shape[2]}")
    _check_counts(q, lengths=lengths)
    return _decode_attention(q, k_cache, v_cache, lengths, k_scale, v_scale)


def _check_activations(name: str, x: Tensor, dims: int, shape: str) -> None:
    check_tensor(name, x)
    if x.dtype not in ACTIVATIONS:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")


def _check_shaped(name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    check_dtype(name, tensor, dtype)
    if list(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")


def _check_written(name: str, tensor: Tensor) -> None:
    """ValueError unless an operator can write to it in place."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _check_cache(
    x: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    check_tensor("k_cache", k_cache)
    if k_cache.dtype not in (*ACTIVATIONS, torch.int8):
        raise TypeError(
            f"k_cache: expected float32, bfloat16, float16 or int8, got {k_cache.dtype}"
        )
    shape = list(k_cache.shape)
    if k_cache.dim() != 4 or 0 in shape[1:]:
        raise ValueError(f"k_cache: expected shape [S, G, L, E] with G, L, E >= 1, got {shape}")
    if shape[0] < x.shape[0]:
        raise ValueError(f"k_cache: has {shape[0]} rows for a batch of {x.shape[0]}")
    if shape[3] % 2 or shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"k_cache: expected an even E of at most {MAX_HEAD_DIM}, got {shape[3]}")
    _check_shaped("v_cache", v_cache, k_cache.dtype, shape)
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype != torch.int8:
            if scale is not None:
                raise ValueError(f"{name}: a cache of {k_cache.dtype} has no scales; give None")
        elif scale is None:
            raise ValueError(f"{name}: an int8 cache needs its scales, fp32 {shape[:3]}")
        else:
            _check_shaped(name, scale, torch.float32, shape[:3])
            caches[name] = scale
    check_device(x, **caches)
    for name, cache in caches.items():
        _check_written(name, cache)


def _check_counts(x: Tensor, **counts: Tensor) -> None:
    for name, count in counts.items():
        check_tensor(name, count)
        if count.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {count.dtype}")
        if list(count.shape) != [x.shape[0]]:
            raise ValueError(f"{name}: expected shape [{x.shape[0]}], got {list(count.shape)}")
    check_device(x, **counts)


def _rope_append_cuda(*arguments: Any) -> Tensor:
    from bitnet_kernels.gpu.decode_rope import rope_append as triton_rope_append

    return triton_rope_append(*arguments)


def _rope_append_fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, *rest: object
) -> Tensor:
    (b, t, columns), (_, g, _, e) = qkv.shape, k_cache.shape
    return qkv.new_empty((b, t, columns // e - 2 * g, e))


def _decode_attention_cuda(*arguments: Any) -> Tensor:
    from bitnet_kernels.gpu.decode_attention import decode_attention as triton_attention

    return triton_attention(*arguments)


def _decode_attention_fake(q: Tensor, *rest: object) -> Tensor:
    b, t, h, e = q.shape
    return q.new_empty((b, t, h * e))


_rope_append = register(
    "rope_append",
    reference.rope_append,
    cpu=native_rows.rope_append,
    cuda=_rope_append_cuda,
    fake=_rope_append_fake,
    mutates=("k_cache", "v_cache", "k_scale", "v_scale"),
)
_decode_attention = register(
    "decode_attention",
    reference.decode_attention,
    cpu=native_rows.decode_attention,
    cuda=_decode_attention_cuda,
    fake=_decode_attention_fake,
)
