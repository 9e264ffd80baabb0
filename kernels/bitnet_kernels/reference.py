"""Every operator in plain torch: the truth that all other implementations are tested against.

The contract (BitNet b1.58, arXiv 2402.17764), with M tokens, K in_features, N out_features:

    acc = sum_k codes[n,k] * x_q[m,k]                      int32, exact in any order
    y   = ((acc.float() * s_x[m]) * scale[n]) (+ bias[n])  fp32 in this order, then one cast

Because ``acc`` is exact, training, packed inference and every kernel agree on it bit for bit.

Attention (the last functions) has B rows, T new tokens per row, H query heads, G key/value heads,
E channels per head, and a cache of S >= B rows and L columns. Row b's new tokens stand in columns
``lengths[b] .. lengths[b] + T - 1``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_kernels.packing import codes_of

EPS = 1e-5
"""Lower clamp of the statistic (max|x| or mean|W|), not of the scale."""
_EXACT_K = 2**24 // 128**2
"""fp32 sums of products of any two int8 values are exact up to 2^24, and so up to this K."""


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax int8 per token: ``s = max(max|x|, 1e-5) / 127``, ``x_q = round_half_even(x / s)``.

    A token that holds a NaN or an infinity gets scale NaN and codes 0, so that everything computed
    from it is NaN; other tokens are untouched.

    Arguments:
        x: float ``[..., K]``, K >= 1. Statistics are computed in fp32, whatever its dtype.
    Returns:
        codes int8 ``[..., K]`` and scale fp32 ``[...]``; ``codes * scale[..., None]`` is about x.
    """
    x = x.float()
    return int8_codes(x, absmax(x))


def absmax(x: Tensor) -> Tensor:
    """``max|x|`` of each token, ``[..., K]`` -> ``[...]``, in half the time of |x| and its amax."""
    return torch.maximum(x.amax(-1), -x.amin(-1))


def int8_codes(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`absmax_int8` of fp32 tokens whose ``max|x|`` is given, fp32 ``[...]``. ``x`` may hold
    only some of the columns of which that is the maximum."""
    # Divide by a tensor, not by a number: for a number torch multiplies by its reciprocal on CUDA,
    # which rounds differently.
    scale = absmax.clamp(min=EPS) / absmax.new_full((), 127.0)
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    # Allocate the result before the temporaries: else smaller tensors take the hole that a large
    # temporary leaves, and the peak memory of a training step on a CPU is 3% higher.
    codes = torch.empty_like(x, dtype=torch.int8)
    codes.copy_((x / scale.unsqueeze(-1)).round_().nan_to_num_(0.0))  # within +-127: rounds once
    return codes, scale


def clamped_mean(magnitude: Tensor) -> Tensor:
    """``max(mean, EPS)`` over the last axis of a tensor >= 0, fp32; NaN where a term is not finite.

    Each term is truncated to a whole number of units. A unit is 2^(e - bits), where 2^e is the
    largest power of two that the largest term reaches. With n <= 2^L terms and bits = 61 - L, the
    int64 sum stays below 2^62 and is exact in any order. The truncation loses at most 2^(2L - 61)
    of the mean.
    """
    n = int(magnitude.shape[-1])  # torch.jit.trace has tensors there
    if n == 0:  # a weight without rows; it always has columns
        return magnitude.new_full(magnitude.shape[:-1], torch.nan, dtype=torch.float32)
    largest = magnitude.amax(-1).float()
    return mean_of_units(sum_of_units(magnitude, largest, n), largest, n)


def sum_of_units(magnitude: Tensor, largest: Tensor, n: int) -> Tensor:
    """The terms of :func:`clamped_mean` in whole units, added: int64 ``[...]``.

    Arguments:
        magnitude: ``[..., K]`` >= 0: all terms of a mean, or a part of them; the sums of the parts
            add up to the sum of all terms.
        largest: fp32 ``[...]``, the largest of all terms. n: the number of all terms.
    """
    bits, exponent = _unit(largest, n)
    units_per_one = torch.view_copy((254 + bits - exponent) << 23, dtype=torch.float32)
    return (magnitude * units_per_one.unsqueeze(-1)).to(torch.int64).sum(-1)


def mean_of_units(total: Tensor, largest: Tensor, n: int) -> Tensor:
    """:func:`clamped_mean` from :func:`sum_of_units` of all terms: fp32 ``[...]``."""
    bits, exponent = _unit(largest, n)
    unit = torch.view_copy((exponent - bits) << 23, dtype=torch.float32)
    # divide by a tensor: for a Python number CUDA would multiply by its rounded reciprocal
    mean = (total.double() * unit / unit.new_full((), n, dtype=torch.float64)).float()
    return torch.where(largest.isfinite(), mean.clamp(min=EPS), torch.nan)


def _unit(largest: Tensor, n: int) -> tuple[int, Tensor]:
    """Bits per term, and the biased fp32 exponent of the largest, int32 ``[...]``. The callers make
    powers of two from them; products with powers of two are exact."""
    # view_copy, not view: torch.jit.trace cannot record a view with a dtype
    exponent = torch.view_copy(largest.clamp(min=2.0**-60), dtype=torch.int32) >> 23
    return 61 - (n - 1).bit_length(), exponent


def absmean(weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Ternary codes, int8 in the shape of a float weight, and one fp32 scale ``[]`` for all:
    ``gamma = max(mean|W|, 1e-5)``; +1 above ``alpha * gamma``, -1 below ``-alpha * gamma``."""
    gamma = clamped_mean(weight.abs().flatten())
    threshold = alpha * gamma
    return (weight > threshold).to(torch.int8) - (weight < -threshold).to(torch.int8), gamma


def stochastic_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8, rounded up or down at random so that the error is zero on average:
    ``s = max|x| / 127``, ``codes = floor(x / s + u)``, u uniform in [0, 1) from torch's global
    generator; see :func:`bitnet.quant.stochastic_int8`.

    Arguments:
        x: float ``[M, N]``, N >= 1.
    Returns:
        codes int8 ``[M, N]``, |codes| <= 127; scale fp32 ``[M]``. A row that holds a NaN or an
        infinity has scale NaN and codes 0.
    """
    x = x.float()
    absmax = torch.maximum(x.amax(1), -x.amin(1))
    scale = (absmax / 127).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    codes = (x / scale.unsqueeze(1)).add_(torch.rand_like(x)).floor_().clamp_(-127, 127)
    return codes.nan_to_num_(0.0).to(torch.int8), scale


def stochastic_int8_columns(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`stochastic_int8` of the columns of ``x * s``: float ``[M, N]`` and ``[M]`` -> codes
    int8 ``[N, M]``, scale fp32 ``[N]``."""
    return stochastic_int8((x * s.unsqueeze(1)).t())


def quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`absmax_int8` and the row sum ``X = sum_k x_q``, int32 ``[...]``. Kernels that multiply
    by ``code + 1`` subtract it."""
    codes, scale = absmax_int8(x)
    return codes, scale, codes.sum(-1, dtype=torch.int32)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact ``a @ b.mT`` of any values: int8 ``[..., M, K]`` and ``[..., N, K]`` -> int32
    ``[..., M, N]``, K < 2^17 so that int32 holds every sum of products up to 128^2.

    It multiplies in fp32, in slices of K short enough to be exact, with autocast off, whose dtypes
    cannot hold the sums. It reads no value on the host, so it can be traced and transformed.
    """
    acc = a.new_zeros((), dtype=torch.int32)
    with torch.autocast(a.device.type, enabled=False):
        for a_k, b_k in zip(a.split(_EXACT_K, -1), b.split(_EXACT_K, -1), strict=True):
            acc = acc + (a_k.float() @ b_k.float().mT).to(torch.int32)
    return acc


def rescale(
    acc: Tensor, s_x: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The epilogue of every product: ``((acc * s_x) * scale) (+ bias)`` in fp32, one cast.

    Arguments:
        acc: int32 ``[..., N]``; s_x: fp32 ``[...]``; scale: fp32 ``[]`` or ``[N]``;
        bias: ``[N]`` or None, added after the rescale and never scaled.
    """
    return rescale_(acc.float(), s_x, scale, bias, dtype)


def rescale_(
    y: Tensor, s_x: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """:func:`rescale` of accumulators that are already fp32, in place."""
    y *= s_x.unsqueeze(-1)
    y *= scale
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


def scaled_matmul(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 128,
    matmul: Callable[[Tensor, Tensor], Tensor] = int8_matmul,
) -> Tensor:
    """Integer product and rescale, for every granularity of the scale.

    Arguments:
        x_q: int8 ``[..., K]``; s_x: fp32 ``[...]``; codes: int8 ``[N, K]`` in {-1, 0, +1};
        scale: fp32 ``[]`` (one per tensor), ``[N]`` (one per row) or ``[N, ceil(K/group_size)]``
        (one per group of ``group_size`` columns): group terms are rescaled one by one and added in
        ascending order, then the bias;
        matmul: computes the integer product.
    Returns:
        ``dtype`` ``[..., N]``.
    """
    if scale.dim() < 2:
        return rescale(matmul(x_q, codes), s_x, scale, bias, dtype)
    shape = (*x_q.shape[:-1], codes.shape[0])
    y = torch.zeros(shape, device=x_q.device, dtype=torch.float32)
    groups = zip(
        x_q.split(group_size, -1), codes.split(group_size, 1), scale.unbind(1), strict=True
    )
    for x_group, codes_group, scale_group in groups:
        y += rescale(matmul(x_group, codes_group), s_x, scale_group, None, torch.float32)
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


def int8_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`scaled_matmul` with one scale per tensor or per row."""
    return scaled_matmul(x_q, s_x, codes, scale, bias, dtype)


def ternary_matmul(x_q: Tensor, packed: Tensor) -> Tensor:
    """int8 ``[M, K]`` times packed ternary uint8 ``[N, ceil(K/64)*16]`` -> int32 ``[M, N]``."""
    return int8_matmul(x_q, codes_of(packed, x_q.shape[-1]))


def quantized_linear(
    x_q: Tensor,
    s_x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`int8_linear` of packed weights."""
    return int8_linear(x_q, s_x, codes_of(packed, x_q.shape[-1]), scale, bias, dtype)


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int = 128,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize, multiply, rescale: float ``[..., K]`` -> ``[..., N]`` of ``dtype``."""
    x_q, s_x = absmax_int8(x)
    codes = codes_of(packed, x.shape[-1])
    return scaled_matmul(x_q, s_x, codes, scale, bias, dtype or x.dtype, group_size)


def exact_sum(terms: Tensor) -> Tensor:
    """The sum over the last axis, with the same bits in any order of addition.

    A floating-point sum depends on the order of addition, which differs between devices. Here each
    term is first rounded to a multiple of 2^(L - 52) P, by adding and subtracting 2^L P. 2^L is the
    smallest power of 2 that is at least the number of terms, P the power of 2 above the largest
    term. All partial sums are then multiples of 2^(L - 52) P below 2^L P, which fp64 holds exactly,
    so no addition rounds. The rounding of the terms changes the sum by at most 2^(2L - 52) of it:
    2^-28 for 4096 terms, where an ulp of fp32 is 2^-23.

    Arguments:
        terms: float ``[..., K]``, K >= 1, not negative.
    Returns:
        fp64 ``[...]``; NaN where a term is not finite.
    """
    terms = terms.double()
    exponent = terms.amax(-1, keepdim=True).view(torch.int64) & 0x7FF0000000000000
    grid = exponent.view(torch.float64) * 2.0 ** (1 + (terms.shape[-1] - 1).bit_length())
    return ((terms + grid) - grid).sum(-1)


def _mean(total: Tensor, count: int) -> Tensor:
    """``total / count`` in fp64, then rounded to fp32. Divides by a tensor, as int8_codes does."""
    return (total / total.new_full((), count)).float()


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467), one rounding order for every device:

        y = (x * (1 / sqrt(mean(x^2) + eps))) * weight        in fp32, then cast to x's dtype

    with the mean by :func:`exact_sum`, and square root and divisions correctly rounded.

    Arguments:
        x: float ``[..., K]``, K >= 1; weight: float ``[K]``; eps: rounded to fp32.
    Returns:
        x's shape and dtype. A row with NaN or infinity is NaN.
    """
    rows = x.float()
    mean_square = _mean(exact_sum(rows.double().square()), x.shape[-1])
    # The root is taken in fp64: on a CPU torch's fp32 root (MKL's) is not always correctly rounded.
    rms = (mean_square + mean_square.new_full((), eps)).double().sqrt().float()
    rstd = rms.new_full((), 1.0) / rms
    return (rows * rstd.unsqueeze(-1) * weight.float()).to(x.dtype)


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of an RMSNorm y = x r w, with each token's ``r = 1 / sqrt(mean(x^2) + eps)``:
    ``dx = r (g - n mean(g n))`` and ``dw = sum over tokens of dy n``, for n = x r and g = dy w."""
    n, g = x * r.unsqueeze(-1), dy * weight
    dx = r.unsqueeze(-1) * (g - n * (g * n).mean(-1, keepdim=True))
    return dx, (dy * n).reshape(-1, x.shape[-1]).sum(0)


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """``relu(gate)^2 * up``, each operator rounding."""
    return gate.relu().square() * up


def gate_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`gate`: ``2 relu(gate) up dy``, which is 0 where ``gate <= 0``
    whatever ``up`` is, and ``relu(gate)^2 dy``."""
    relu = gate.relu()
    dgate = (dy * up * relu * 2).masked_fill(relu <= 0, 0.0)
    return dgate, relu.square() * dy


def input_gradient(dy: Tensor, codes: Tensor, gamma: Tensor) -> Tensor:
    """``(dy * gamma) @ codes``: fp32 ``[M, N]``, int8 ``[N, K]`` in {-1, 0, +1}, fp32 ``[]`` or
    ``[N]`` -> fp32 ``[M, K]``."""
    return (dy * gamma) @ codes.float()


def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor) -> Tensor:
    """``(dy * s_x).T @ x_q``: fp32 ``[M, N]``, int8 ``[M, K]``, fp32 ``[M]`` -> fp32 ``[N, K]``."""
    return (dy * s_x.unsqueeze(1)).t() @ x_q.float()


def rmsnorm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quant` of :func:`rmsnorm`."""
    return quant(rmsnorm(x, weight, eps))


def add_rmsnorm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`rmsnorm_quant` of ``h = x + residual``, and h."""
    h = x + residual
    return *rmsnorm_quant(h, weight, eps), h


def relu2_mul_rmsnorm_quant(
    gate: Tensor, up: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rmsnorm_quant` of ``relu(gate)^2 * up``, each operator rounding to the dtype."""
    return rmsnorm_quant(gate.relu().square() * up, weight, eps)


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
    # 0 * NaN is NaN, so a column that is not finite would reach queries that do not see it: it is
    # set to 0 in v.
    bad = ~v.isfinite().all(-1)  # [B, G, L]
    y = torch.einsum("bgtrl,bgle->bgtre", p, v.masked_fill(bad.unsqueeze(-1), 0.0))
    y = y.masked_fill((seen & bad[:, :, None, None]).any(-1, keepdim=True), torch.nan)
    return y.permute(0, 2, 1, 3, 4).reshape(b, t, h * e).to(q.dtype)
