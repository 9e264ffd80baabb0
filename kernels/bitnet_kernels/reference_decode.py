"""The two operators of attention over a static cache, in torch: what kernels are tested against.

B rows, T new tokens a row, H query heads, G key/value heads, E channels a head, S >= B rows and L
columns of the cache. Row b's new tokens sit in columns ``lengths[b] .. lengths[b] + T - 1``.
"""

import torch
from torch import Tensor

from bitnet_kernels.reference import absmax_int8


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) in the rotate-half form: each pair (i, i + E/2) turns by its angle.

    Arguments:
        x: float ``[..., E]``; cos, sin: fp32 that broadcast to it.
    Returns:
        shape and dtype of x, computed in fp32 with one cast.
    """
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


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
    """Rotate queries and keys, write keys and values: see :func:`bitnet_kernels.rope_append`."""
    (b, t, _), (_, g, n_columns, e) = qkv.shape, k_cache.shape
    steps = torch.arange(t, device=qkv.device, dtype=torch.int64)
    columns = lengths.long().unsqueeze(1) + steps  # [B, T]
    written = (steps < n_valid.unsqueeze(1)) & (columns >= 0) & (columns < n_columns)
    columns = columns.clamp(0, n_columns - 1)
    n_heads = qkv.shape[2] // e
    q, k, v = qkv.reshape(b, t, n_heads, e).split((n_heads - 2 * g, g, g), 2)
    cos, sin = cos[columns].unsqueeze(2), sin[columns].unsqueeze(2)
    q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
    rows, at = torch.nonzero(written, as_tuple=True)
    target = (rows, slice(None), columns[rows, at])  # [written tokens, G]
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is None:
            cache[target] = new[rows, at].to(cache.dtype)
        else:
            cache[target], scale[target] = absmax_int8(new[rows, at])
    return q.contiguous()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention over the cache: see :func:`bitnet_kernels.decode_attention`."""
    (b, t, h, e), (_, g, n_columns, _) = q.shape, k_cache.shape
    k, v = k_cache[:b].float(), v_cache[:b].float()
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale[:b].unsqueeze(-1), v * v_scale[:b].unsqueeze(-1)
    steps = torch.arange(t, device=q.device, dtype=torch.int64)
    columns = torch.arange(n_columns, device=q.device, dtype=torch.int64)
    last = lengths.long().clamp(min=0).unsqueeze(1) + steps  # [B, T]
    seen = columns <= last.unsqueeze(-1)  # [B, T, L]
    seen = seen[:, None, :, None]  # [B, 1, T, 1, L]
    queries = q.float().reshape(b, t, g, h // g, e).permute(0, 2, 1, 3, 4)  # [B, G, T, H/G, E]
    scores = torch.einsum("bgtre,bgle->bgtrl", queries, k) * e**-0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    # 0 * NaN is NaN: what a column must not show to those that do not see it is taken out of v.
    bad = ~v.isfinite().all(-1)  # [B, G, L]
    y = torch.einsum("bgtrl,bgle->bgtre", p, v.masked_fill(bad.unsqueeze(-1), 0.0))
    y = y.masked_fill((seen & bad[:, :, None, None]).any(-1, keepdim=True), torch.nan)
    return y.permute(0, 2, 1, 3, 4).reshape(b, t, h * e).to(q.dtype)
