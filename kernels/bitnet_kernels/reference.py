"""Every op in a few lines of torch: the truth that all else is tested against.

M tokens, K in_features, N out_features. The one contract (BitNet b1.58, arXiv 2402.17764):

    acc = sum_k codes[n,k] * x_q[m,k]                      int32, exact in any order
    y   = ((acc.float() * s_x[m]) * gamma[n]) (+ bias[n])  fp32 in this order, then one cast

Because ``acc`` is exact, training, packed inference and every kernel agree on it bit for bit.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitnet_kernels.packing import codes_of

EPS = 1e-5
"""Lower clamp of the statistic (max|x| or mean|W|), not of the scale."""
_TERNARY_EXACT_K = 2**24 // 128
"""fp32 sums of |x_q * code| <= 128 are exact integers up to 2^24: up to this K."""
_INT8_EXACT_K = 2**24 // 128**2
"""The same of products of any two int8 values."""


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax int8 per token: ``s = max(max|x|, 1e-5) / 127``, ``x_q = round_half_even(x / s)``.

    A token that holds a NaN or an infinity gets scale NaN and codes 0, so that everything computed
    from it is NaN; other tokens are untouched.

    Arguments:
        x: float ``[..., K]``, K >= 1. Statistics are taken in fp32 whatever its dtype.
    Returns:
        codes int8 ``[..., K]`` and scale fp32 ``[...]``; ``codes * scale[..., None]`` is about x.
    """
    x = x.float()
    absmax = torch.maximum(x.amax(-1), -x.amin(-1))  # half the time of |x| and its maximum
    # A tensor, not a number: on CUDA torch divides by a number by multiplying with its reciprocal,
    # which rounds differently.
    scale = absmax.clamp(min=EPS) / absmax.new_full((), 127.0)
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    # What stays is allocated before what goes: else the hole that a large temporary leaves is taken
    # by smaller tensors, and on a CPU a training step peaks 3% higher.
    codes = torch.empty_like(x, dtype=torch.int8)
    codes.copy_((x / scale.unsqueeze(-1)).round_().nan_to_num_(0.0))  # within +-127: rounds once
    return codes, scale


def quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`absmax_int8` and the row sum ``X = sum_k x_q`` (int32 ``[...]``) that kernels which
    work on ``code + 1`` subtract."""
    codes, scale = absmax_int8(x)
    return codes, scale, codes.sum(-1, dtype=torch.int32)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact ``a @ b.T``: activations int8 ``[M, K]``, ternary codes int8 ``[N, K]`` -> int32.

    ``torch._int_mm`` where it runs, with what its kernels want: on CUDA M > 16 and K, N in
    multiples of 8; on CPU K > 1 (torch 2.13 returns wrong products at K = 1), and the activations
    on the left: without VNNI instructions oneDNN adds pairs of products in int16, which codes of
    magnitude 1 cannot overflow from that side but activations could from the other. Elsewhere an
    fp32 product, exact while K * 128 <= 2^24, in slices of K.
    """
    m, n = a.shape[0], b.shape[0]
    if 0 in (m, n):
        return a.new_empty((m, n), dtype=torch.int32)
    a, b = _row_major(a), _row_major(b)
    if a.device.type == "cpu":
        if a.shape[1] == 1:
            a, b = pad(a, (0, 1)), pad(b, (0, 1))
        return torch._int_mm(a, b.t())
    if a.device.type == "cuda":
        k_pad = -a.shape[1] % 8
        a = pad(a, (0, k_pad, 0, max(0, 17 - m)))
        b = pad(b, (0, k_pad, 0, -n % 8))
        return torch._int_mm(a, b.t())[:m, :n]
    return fp32_matmul(a, b, _TERNARY_EXACT_K)


def any_int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact ``a @ b.T`` of any values: int8 ``[M, K]`` and ``[N, K]``, K < 2^17 so that int32 holds
    every sum of products up to 128^2, -> int32 ``[M, N]``.

    As :func:`int8_matmul` on CUDA, and on a CPU where oneDNN adds products in int32; elsewhere
    :func:`fp32_matmul`.
    """
    kind = a.device.type
    if kind == "cuda" or (kind == "cpu" and int_mm_takes_any_int8()):
        return int8_matmul(a, b)
    return fp32_matmul(a, b)


@cache
def int_mm_takes_any_int8() -> bool:
    """Whether ``torch._int_mm`` on this CPU is exact for any int8 values: where it has the VNNI
    instructions, and oneDNN uses them (ONEDNN_MAX_CPU_ISA may forbid it), which a product whose
    pairs overflow int16 tells."""
    if not torch.cpu._is_vnni_supported():
        return False
    a = torch.tensor([[127], [-128]], dtype=torch.int8, device="cpu").repeat(32, 256)
    return torch.equal(torch._int_mm(a, a.t()), fp32_matmul(a, a))


def _row_major(matrix: Tensor) -> Tensor:
    """With strides [K, 1] to the letter: torch takes those of a dimension of size 1 for whatever
    they are, and ``torch._int_mm`` (2.13, CPU) leaves its output unwritten for strides below K."""
    if matrix.stride() == (matrix.shape[1], 1):
        return matrix
    return matrix.new_empty(matrix.shape).copy_(matrix)


def fp32_matmul(a: Tensor, b: Tensor, exact_k: int = _INT8_EXACT_K) -> Tensor:
    """Exact ``a @ b.mT`` of int8 ``[..., M, K]`` and ``[..., N, K]`` -> int32 ``[..., M, N]``: fp32
    products in slices of ``exact_k`` columns, as many as are exact, out of autocast, whose dtypes
    cannot hold the sums. It asks nothing of the CPU, so it can be traced and transformed."""
    acc = a.new_zeros((), dtype=torch.int32)
    with torch.autocast(a.device.type, enabled=False):
        for a_k, b_k in zip(a.split(exact_k, -1), b.split(exact_k, -1), strict=True):
            acc = acc + (a_k.float() @ b_k.float().mT).to(torch.int32)
    return acc


def rescale(
    acc: Tensor, s_x: Tensor, gamma: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The epilogue shared by every path: ``((acc * s_x) * gamma) (+ bias)`` in fp32, one cast.

    Arguments:
        acc: int32 ``[M, N]``; s_x: fp32 ``[M]``; gamma: fp32 ``[]`` or ``[N]``;
        bias: ``[N]`` or None, added after the rescale and never scaled.
    """
    return _rescaled(acc.float(), s_x, gamma, bias, dtype)


def _rescaled(
    y: Tensor, s_x: Tensor, gamma: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """:func:`rescale` of accumulators that are fp32 already, in place."""
    y *= s_x.unsqueeze(-1)
    y *= gamma
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


def scaled_matmul(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 128,
) -> Tensor:
    """Integer product and rescale, for every granularity of the scale.

    Arguments:
        x_q: int8 ``[M, K]``; s_x: fp32 ``[M]``; codes: int8 ``[N, K]`` in {-1, 0, +1};
        gamma: fp32 ``[]`` (one a tensor), ``[N]`` (one a row) or ``[N, ceil(K/group_size)]`` (one
        a group of ``group_size`` columns): group terms are rescaled one by one and added in
        ascending order, then the bias.
    Returns:
        ``dtype`` ``[M, N]``.
    """
    if gamma.dim() < 2:
        acc = int8_matmul(x_q, codes)
        # The outputs take the memory of the accumulators, element for element: on a CPU half of the
        # time went into touching new memory.
        return _rescaled(acc.view(torch.float32).copy_(acc), s_x, gamma, bias, dtype)
    y = torch.zeros(x_q.shape[0], codes.shape[0], device=x_q.device, dtype=torch.float32)
    groups = zip(x_q.split(group_size, 1), codes.split(group_size, 1), gamma.unbind(1), strict=True)
    for x_g, codes_g, gamma_g in groups:
        y += rescale(int8_matmul(x_g, codes_g), s_x, gamma_g, None, torch.float32)
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


def ternary_matmul(x_q: Tensor, packed: Tensor) -> Tensor:
    """int8 ``[M, K]`` times packed ternary uint8 ``[N, ceil(K/64)*16]`` -> int32 ``[M, N]``."""
    return int8_matmul(x_q, codes_of(packed, x_q.shape[1]))


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int = 128,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize, multiply, rescale: float ``[M, K]`` -> ``dtype`` (x's where None) ``[M, N]``."""
    x_q, s_x = absmax_int8(x)
    codes = codes_of(packed, x.shape[1])
    return scaled_matmul(x_q, s_x, codes, scale, bias, dtype or x.dtype, group_size)


def exact_sum(terms: Tensor) -> Tensor:
    """The sum over the last axis, with the same bits in whatever order it is added.

    A floating-point sum depends on its order, and every device has its own. Here each term is first
    rounded to a multiple of 2^(L - 52) P, with 2^L the power of 2 from the number of terms on and P
    the one above the largest term; adding and subtracting 2^L P does that. All partial sums are
    then multiples of it below 2^L P, which fp64 holds exactly, so no addition rounds. What is lost
    is at most 2^(2L - 52) of the sum: 2^-28 for 4096 terms, an ulp of fp32 being 2^-23.

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
    """``total / count`` in fp64, rounded once more to fp32. By a tensor, as in absmax_int8."""
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
    # By way of fp64: torch's fp32 root is not always correctly rounded on CPU (MKL's is used).
    rms = (mean_square + mean_square.new_full((), eps)).double().sqrt().float()
    rstd = rms.new_full((), 1.0) / rms
    return (rows * rstd.unsqueeze(-1) * weight.float()).to(x.dtype)


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
