"""Check that every operator is right on this device: a few shapes of each, then the timed products.

``tests/test_on_device_*.py`` is the full check, with many forms of every kernel. This one is for
the first minutes on a device. Each case is small and independent, so several processes can compile
cases side by side, and a crash spoils no other case.

The CPU computes the expected values: integer products in fp64, exact in any order, and the
operators of :mod:`bitnet_kernels.reference`, whose bits every operator must give. Only attention
has a tolerance. The timed products are checked on the device itself, as in the benchmark
(:mod:`.verify`), since a CPU would take minutes for them. This also leaves their kernels in
Triton's cache for the benchmark.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_kernels import (
    add_rmsnorm_quant,
    bit_planes,
    decode_attention,
    int8_linear,
    int8_matmul,
    pack_base3,
    pack_ternary,
    quant,
    quantized_linear,
    reference,
    relu2_mul_rmsnorm_quant,
    rmsnorm_quant,
    rope_append,
    ternary_linear,
    ternary_matmul,
    unpack_base3,
    unpack_ternary,
)
from bitnet_kernels.bench.contenders import DTYPES, contenders, few_enough, make_problem
from bitnet_kernels.bench.verify import Inexact, Judge
from bitnet_kernels.dispatch import FORMULATIONS

EPS = 1e-5
TIMED = "as timed"
"""The ``operator`` of a case that checks what the benchmark times."""
KERNELS = ("auto", *FORMULATIONS)
SMALL = ((1, 33, 300), (5, 40, 256), (17, 33, 300))
"""(M, N, K) of the products: one token, few tokens, more than a tile; with and without padded K."""
_ATTENTION_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}
"""Relative, in the Frobenius norm: for fp32 sums in another order, or a few 16-bit roundings."""


class Case(NamedTuple):
    """An operator at one shape."""

    operator: str
    """Its public name, or :data:`TIMED`."""
    kernel: str
    """One of :data:`KERNELS`; "" where the operator has no choice."""
    m: int
    n: int
    k: int
    dtype: str
    """dtype of the activations, a name of :data:`DTYPES`; for a cache also "int8"."""

    def __str__(self) -> str:
        """The case's name in messages."""
        kernel = f" {self.kernel}" if self.kernel else ""
        return f"{self.operator}{kernel} M={self.m} {self.n}x{self.k} {self.dtype}"


def small_cases() -> list[Case]:
    """Every operator, products by every kernel: some seconds of compilation each."""
    products = ("ternary_matmul", "quantized_linear", "ternary_linear")
    found = [
        Case(operator, kernel, *shape, dtype)
        for shape, dtype in zip(SMALL, ("bf16", "fp32", "fp16"), strict=True)
        for kernel in KERNELS
        for operator in products
    ]
    found.append(Case("group scales", "auto", 5, 33, 320, "bf16"))
    norms = ("quant", "rmsnorm_quant", "add_rmsnorm_quant", "relu2_mul_rmsnorm_quant")
    found += [
        Case(name, "", m, 1, k, dtype)
        for name in norms
        for m, k, dtype in ((1, 2560, "bf16"), (17, 300, "fp32"))
    ]
    found += [Case("packing", "", 1, n, k, "int8") for n, k in ((7, 300), (64, 256))]
    found += [
        Case(name, "", *shape, "bf16")
        for name in ("int8_linear", "int8_matmul")
        for shape in ((17, 33, 300), (300, 256, 256))
    ]
    return found + [
        Case(name, "", tokens, 2, length, dtype)
        for name in ("rope_append", "decode_attention")
        for tokens, length in ((1, 131), (6, 70))
        for dtype in ("bf16", "fp32", "int8")
    ]


def timed_cases(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], dtype: str = "bf16"
) -> list[Case]:
    """The products by each kernel at shapes (N, K) that are timed."""
    return [
        Case(TIMED, kernel, m, n, k, dtype)
        for n, k in shapes
        for m in tokens
        for kernel in KERNELS
        if few_enough(kernel, m)
    ]


def check(case: Case, device: torch.device) -> str:
    """``"yes"`` if outputs are right bit for bit, ``"rel 1.2e-06"`` if within a tolerance.

    Raises:
        Inexact: they are neither; the message says where.
        ValueError: this kernel cannot run on this device.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        return _CHECKS[case.operator](case, device)


def _compare(case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    """Compare bit for bit; NaN equals NaN."""
    for place, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        ours, theirs = ours.cpu(), theirs.cpu()
        where = f"{case}: output {place}"
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            raise Inexact(
                f"{where} is {ours.dtype} {list(ours.shape)}, "
                f"not {theirs.dtype} {list(theirs.shape)}"
            )
        wrong = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
        if wrong.any():
            raise Inexact(f"{where}: {int(wrong.sum())} of {wrong.numel()} values are wrong")
    return "yes"


def _product(x_q: Tensor, codes: Tensor) -> Tensor:
    """``x_q @ codes.T``: integers in fp64 are exact up to 2^53."""
    return (x_q.double() @ codes.double().t()).to(torch.int32)


def _tokens(case: Case) -> Tensor:
    """Activations ``[M, K]``; with three tokens or more the last one holds a NaN."""
    x = 3.0 * torch.randn(case.m, case.k, dtype=torch.float32, device="cpu")
    if case.m > 2:
        x[-1, -1] = torch.nan
    return x.to(DTYPES[case.dtype])


def _codes(low: int, n: int, k: int) -> Tensor:
    """int8 codes from ``low`` to ``-low`` (to 127 of -128)."""
    return torch.randint(low, min(-low, 127) + 1, (n, k), dtype=torch.int8, device="cpu")


def _linear(case: Case, device: torch.device) -> str:
    codes, scale, bias = (
        _codes(-1, case.n, case.k),
        torch.rand(case.n, dtype=torch.float32, device="cpu"),
        None,
    )
    packed, dtype = pack_ternary(codes.to(device)), DTYPES[case.dtype]
    planes = bit_planes(packed) if case.kernel == "popcount" else None
    if case.operator == "ternary_matmul":
        x_q = _codes(-128, case.m, case.k)
        got = ternary_matmul(x_q.to(device), packed, case.kernel, planes)
        return _compare(case, [got], [_product(x_q, codes)])
    x = _tokens(case)
    x_q, s_x, row_sum = reference.quant(x)
    if case.m > 1:
        bias = torch.randn(case.n, dtype=torch.float32, device="cpu").to(dtype)
    want = reference.rescale(_product(x_q, codes), s_x, scale, bias, dtype)
    scales = (scale.to(device), None if bias is None else bias.to(device))
    if case.operator == "ternary_linear":
        got = ternary_linear(x.to(device), packed, *scales, case.kernel, planes=planes)
    else:
        quantized = (x_q.to(device), s_x.to(device), row_sum.to(device))
        got = quantized_linear(*quantized, packed, *scales, case.kernel, planes, dtype)
    return _compare(case, [got], [want])


def _groups(case: Case, device: torch.device) -> str:
    """One scale per 32 columns: partial outputs are added in the order of the groups."""
    codes, x = _codes(-1, case.n, case.k), _tokens(case)
    scale = torch.rand(case.n, case.k // 32, dtype=torch.float32, device="cpu")
    x_q, s_x, _ = reference.quant(x)
    want = torch.zeros(case.m, case.n, dtype=torch.float32, device="cpu")
    for group in range(case.k // 32):
        part = slice(32 * group, 32 * group + 32)
        acc = _product(x_q[:, part], codes[:, part])
        want += reference.rescale(acc, s_x, scale[:, group], None, torch.float32)
    packed = pack_ternary(codes.to(device))
    got = ternary_linear(x.to(device), packed, scale.to(device), group_size=32)
    return _compare(case, [got], [want.to(x.dtype)])


def _packing(case: Case, device: torch.device) -> str:
    codes = _codes(-1, case.n, case.k)
    packed, base3 = pack_ternary(codes), pack_base3(codes)
    ours = pack_ternary(codes.to(device)), pack_base3(codes.to(device))
    back = unpack_ternary(ours[0], case.k), unpack_base3(ours[1], case.k)
    want = [packed, base3, bit_planes(packed), codes, codes]
    return _compare(case, [*ours, bit_planes(ours[0]), *back], want)


def _quantizer(
    ours: Callable[..., tuple[Tensor, ...]],
    theirs: Callable[..., tuple[Tensor, ...]],
    inputs: int,
    norm: bool,
) -> Callable[[Case, torch.device], str]:
    def run(case: Case, device: torch.device) -> str:
        x = _tokens(case)
        given = [x, torch.randn(x.shape, dtype=torch.float32, device="cpu").to(x.dtype)][:inputs]
        if norm:
            given.append(torch.rand(case.k, dtype=torch.float32, device="cpu") + 0.5)
        rest = (EPS,) if norm else ()
        got = ours(*(tensor.to(device) for tensor in given), *rest)
        return _compare(case, got, theirs(*given, *rest))

    return run


def _int8(case: Case, device: torch.device) -> str:
    x_q = _codes(-128, case.m, case.k)
    if case.operator == "int8_matmul":
        other = _codes(-128, case.n, case.k)
        got = int8_matmul(x_q.to(device), other.to(device))
        return _compare(case, [got], [_product(x_q, other)])
    codes, scale = _codes(-1, case.n, case.k), torch.rand(case.n, dtype=torch.float32, device="cpu")
    s_x, dtype = torch.rand(case.m, dtype=torch.float32, device="cpu"), DTYPES[case.dtype]
    given = (x_q.to(device), s_x.to(device), codes.to(device), scale.to(device))
    want = reference.rescale(_product(x_q, codes), s_x, scale, None, dtype)
    return _compare(case, [int8_linear(*given, None, dtype)], [want])


_HEADS, _KV_HEADS, _CHANNELS = 8, 2, 64


def _cache(case: Case, fill: bool) -> list[Tensor]:
    """Keys and values of ``case.n`` rows over ``case.k`` columns; for int8 also their scales."""
    shape = (case.n, _KV_HEADS, case.k, _CHANNELS)
    scale = 1.0 if fill else 0.0
    parts = [scale * torch.randn(shape, dtype=torch.float32, device="cpu") for _ in range(2)]
    if case.dtype != "int8":
        return [part.to(DTYPES[case.dtype]) for part in parts]
    pairs = [reference.absmax_int8(part) for part in parts]
    return [*(codes for codes, _ in pairs), *(scales for _, scales in pairs)]


def _scales(cache: list[Tensor]) -> dict[str, Tensor]:
    """The scales of an int8 cache, by argument name."""
    return dict(zip(("k_scale", "v_scale"), cache[2:], strict=False))


def _on(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


def _lengths(case: Case) -> Tensor:
    """The lengths of a row that the new tokens fill, and of a short one."""
    return torch.tensor([case.k - case.m, 5], dtype=torch.int32, device="cpu")


def _append(case: Case, device: torch.device) -> str:
    dtype = DTYPES.get(case.dtype, torch.bfloat16)
    heads = _HEADS + 2 * _KV_HEADS
    qkv = torch.randn(case.n, case.m, heads * _CHANNELS, dtype=torch.float32, device="cpu").to(
        dtype
    )
    angles = torch.rand(case.k, _CHANNELS, dtype=torch.float32, device="cpu")
    counts = [
        _lengths(case),
        torch.tensor([case.m, max(1, case.m - 2)], dtype=torch.int32, device="cpu"),
    ]
    given, want = [qkv, angles.cos(), angles.sin()], _cache(case, fill=False)
    got = _on(device, want)
    q = reference.rope_append(*given, *want[:2], *counts, **_scales(want))
    given, counts = _on(device, given), _on(device, counts)
    turned = rope_append(*given, *got[:2], *counts, **_scales(got))
    return _compare(case, [turned, *got], [q, *want])


def _attention(case: Case, device: torch.device) -> str:
    name = "bf16" if case.dtype == "int8" else case.dtype
    q = torch.randn(case.n, case.m, _HEADS, _CHANNELS, dtype=torch.float32, device="cpu").to(
        DTYPES[name]
    )
    cache, lengths = _cache(case, fill=True), _lengths(case)
    want = reference.decode_attention(q.float(), cache[0], cache[1], lengths, **_scales(cache))
    ours = _on(device, cache)
    got = decode_attention(q.to(device), ours[0], ours[1], lengths.to(device), **_scales(ours))
    if got.dtype != q.dtype or got.shape != want.shape:
        raise Inexact(f"{case}: gives {got.dtype} {list(got.shape)}")
    error = float((got.cpu().double() - want.double()).norm() / want.double().norm())
    if not error <= _ATTENTION_TOLERANCE[name]:  # NaN is not
        allowed = _ATTENTION_TOLERANCE[name]
        raise Inexact(f"{case}: relative error {error:.2g}, allowed {allowed}")
    return f"rel {error:.1e}"


def _timed(case: Case, device: torch.device) -> str:
    """Check a layer with float inputs and outputs, and the product alone, as the benchmark does."""
    problem = make_problem(case.n, case.k, case.m, device)
    judge, verdicts = Judge(problem), []
    for one in contenders(device, (case.kernel,), (case.dtype,), ("linear", "matmul"), case.m):
        if one.who == "bitnet":
            verdicts.append(judge.check(one, one.build(problem, 1)(0)))
    if not verdicts:
        raise ValueError(f"kernel: {case.kernel!r} is timed on GPUs only")
    return verdicts[0]


_CHECKS: dict[str, Callable[[Case, torch.device], str]] = {
    "ternary_matmul": _linear,
    "quantized_linear": _linear,
    "ternary_linear": _linear,
    "group scales": _groups,
    "packing": _packing,
    "quant": _quantizer(quant, reference.quant, 1, norm=False),
    "rmsnorm_quant": _quantizer(rmsnorm_quant, reference.rmsnorm_quant, 1, norm=True),
    "add_rmsnorm_quant": _quantizer(add_rmsnorm_quant, reference.add_rmsnorm_quant, 2, norm=True),
    "relu2_mul_rmsnorm_quant": _quantizer(
        relu2_mul_rmsnorm_quant, reference.relu2_mul_rmsnorm_quant, 2, norm=True
    ),
    "int8_linear": _int8,
    "int8_matmul": _int8,
    "rope_append": _append,
    "decode_attention": _attention,
    TIMED: _timed,
}
