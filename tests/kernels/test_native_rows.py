"""The native library's operations on single tokens, for every instruction set of this CPU, against
bitnet_kernels/reference.py and torch in float64."""

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_kernels import reference
from bitnet_kernels.cpu import native, rows

EPS = 1e-5
U = 2.0**-24
"""Half a unit in the last place of 1 in fp32: what an operation rounds off, relative."""
ODD = [1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 1000, 4096 + 3]
KINDS = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 64
ISAS = native.available()

pytestmark = pytest.mark.skipif(
    not ISAS, reason=f"no native library here: {native.missing()}" if not ISAS else ""
)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.used()
    native.use(request.param)
    yield request.param
    native.use(before)


def library() -> ctypes.CDLL:
    lib = native.library()
    assert lib is not None
    return lib


class Guarded:
    """Outputs between bytes that nobody may touch, filled with something that is no result."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        buffer = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(dtype).view(shape)

    def intact(self) -> bool:
        return all(
            bool((buffer[:GUARD] == 0xA5).all() and (buffer[GUARD + size :] == 0xA5).all())
            for buffer, size in self.buffers
        )


def same(got: Tensor, want: Tensor) -> bool:
    """torch.equal, but a NaN equals a NaN."""
    nan = want.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(
        got.masked_fill(nan, 0), want.masked_fill(nan, 0)
    )


def hostile(m: int, k: int) -> Tensor:
    """Tokens [m, k] of the kinds that go wrong, in turn."""
    x = torch.randn(m, k)
    for i in range(m):
        match i % 12:
            case 1:
                x[i] = 0.0
            case 2:
                x[i] *= 1e-42  # denormal
            case 3:
                x[i] *= 1e38
                x[i].clamp_(-3.4e38, 3.4e38)
            case 4:
                x[i, i % k] = math.nan
            case 5:
                x[i, -1] = -math.inf
            case 6:  # ties: codes of n + 1/2 are rounded to even
                x[i] = torch.randint(-254, 255, (k,)) / 2
                x[i, 0] = 127.0
            case 7:
                x[i] = -x[i].abs() * 1e-20
            case 8:  # squares of very different size
                x[i] *= torch.logspace(-18, 18, k)
            case 9:
                x[i] = -0.0
            case 10:  # near ties, where x / s must be divided
                x[i] = (torch.randint(-127, 127, (k,)) + 0.5) * 0.3
                x[i, -1] = 127 * 0.3
    return x


def tokens_agree(m: int, k: int, threads: int) -> None:
    lib = library()
    x, other, weight = hostile(m, k), hostile(m, k).flip(0), torch.randn(k)

    def quantized(name: str, inputs: tuple[Any, ...], want: tuple[Tensor, ...], h: bool) -> None:
        out = Guarded()
        results = [out(m, k, dtype=torch.int8), out(m), out(m, dtype=torch.int32)]
        results += [out(m, k)] * h
        pointers = [value.data_ptr() if isinstance(value, Tensor) else value for value in inputs]
        getattr(lib, name)(*pointers, m, k, *(t.data_ptr() for t in results), threads)
        assert out.intact(), (name, m, k)
        for got, expected in zip(results, want, strict=True):
            assert same(got, expected), (name, m, k)

    quantized("bn_quant", (x,), reference.quant(x), False)
    norm = reference.rmsnorm_quant(x, weight, EPS)
    quantized("bn_rmsnorm_quant", (x, weight, EPS), norm, False)
    norm = reference.rmsnorm_quant(x, torch.ones(k), 0.0)
    quantized("bn_rmsnorm_quant", (x, None, 0.0), norm, False)
    added = reference.add_rmsnorm_quant(x, other, weight, EPS)
    quantized("bn_add_rmsnorm_quant", (x, other, weight, EPS), added, True)
    middle = reference.relu2_mul_rmsnorm_quant(x, other, weight, EPS)
    quantized("bn_relu2_mul_rmsnorm_quant", (x, other, weight, EPS), middle, False)

    out = Guarded()
    y = out(m, k)
    lib.bn_rmsnorm(x.data_ptr(), weight.data_ptr(), EPS, m, k, y.data_ptr(), threads)
    assert same(y, reference.rmsnorm(x, weight, EPS))
    lib.bn_rmsnorm(x.data_ptr(), None, EPS, m, k, y.data_ptr(), threads)
    assert same(y, reference.rmsnorm(x, torch.ones(k), EPS))
    y.copy_(x)  # in place
    lib.bn_rmsnorm(y.data_ptr(), weight.data_ptr(), EPS, m, k, y.data_ptr(), threads)
    assert same(y, reference.rmsnorm(x, weight, EPS))
    lib.bn_gate_mul(x.data_ptr(), other.data_ptr(), 1, m * k, y.data_ptr(), threads)
    assert same(y, x.relu().square() * other)
    lib.bn_gate_mul(x.data_ptr(), other.data_ptr(), 0, m * k, y.data_ptr(), threads)
    assert out.intact()
    silu_agrees(y, x, other)


def silu_agrees(y: Tensor, gate: Tensor, up: Tensor) -> None:
    """The exponential is off by 4 U of itself, sum, quotient and two products by U each; below
    exp(-87) it counts as 0. Overflows where the exact product is at the end of fp32's range."""
    g, u = gate.double(), up.double()
    want = F.silu(g) * u
    close = (y - want).abs() <= 12 * U * want.abs() + 1e-35 * u.abs().clamp(min=1.0)
    close |= want.isnan() & y.isnan()
    close |= (want.abs() >= 3.4e38) & ~y.isfinite()
    close |= want.isinf() & (y == want)
    assert close.all(), (gate[~close], up[~close], y[~close])


@pytest.mark.parametrize("k", ODD)
def test_tokens_have_the_bits_of_the_reference(k: int) -> None:
    for m, threads in ((1, 1), (12, 2), (25, 3)):
        tokens_agree(m, k, threads)


def test_threads_that_are_woken_give_the_same() -> None:
    tokens_agree(49, 4096 + 3, 3)


@pytest.mark.slow
def test_tokens_of_many_shapes() -> None:
    for _ in range(350):
        m, k = int(torch.randint(1, 40, ())), int(torch.randint(1, 6000, ()))
        tokens_agree(m, k, int(torch.randint(1, 4, ())))


def test_instruction_sets_give_the_same_silu() -> None:
    x, up = torch.randn(4099) * 30, torch.randn(4099)
    found = []
    for name in ISAS:
        native.use(name)
        y = torch.empty(4099)
        library().bn_gate_mul(x.data_ptr(), up.data_ptr(), 0, 4099, y.data_ptr(), 1)
        found.append(y)
    assert all(torch.equal(y, found[0]) for y in found)


# --- matrices that are not ternary ----------------------------------------------------------------


def dense_agrees(m: int, n: int, k: int, dtype: torch.dtype, threads: int) -> None:
    """A sum of K products in any order is off by K U of the sum of their sizes, at most."""
    x, weight = torch.randn(m, k), torch.randn(n, k).to(dtype)
    out = Guarded()
    y = out(m, n)
    library().bn_dense_linear(
        x.data_ptr(), m, k, weight.data_ptr(), native.KINDS[dtype], n, y.data_ptr(), threads
    )
    want = x.double() @ weight.double().T
    assert out.intact()
    assert ((y - want).abs() <= (k + 1) * U * (x.abs().double() @ weight.abs().double().T)).all()


def int8_agrees(m: int, n: int, k: int, threads: int) -> None:
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    s_x, scale, out = torch.rand(m), torch.rand(n), Guarded()
    codes = F.pad(x_q, (0, -k % 64))
    sums, y = codes.sum(-1, dtype=torch.int32), out(m, n)
    inputs = [t.data_ptr() for t in (codes, s_x, sums)]
    outputs = [t.data_ptr() for t in (weight, scale)]
    library().bn_int8_linear(*inputs, m, k, *outputs, n, y.data_ptr(), threads)
    assert out.intact()
    assert torch.equal(y, reference.int8_linear(x_q, s_x, weight, scale, None, torch.float32))


SHAPES = [(1, 1, 1), (1, 8, 64), (2, 9, 65), (3, 17, 100), (4, 7, 63), (5, 33, 129), (13, 21, 300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_products(shape: tuple[int, int, int]) -> None:
    for threads in (1, 2, 3):
        for dtype in KINDS:
            dense_agrees(*shape, dtype, threads)
        int8_agrees(*shape, threads)


def test_dense_products_that_threads_share() -> None:
    for threads in (2, 3):
        for dtype in KINDS:
            dense_agrees(2, 101, 1000, dtype, threads)
        int8_agrees(2, 403, 1000, threads)


@pytest.mark.slow
def test_dense_products_of_many_shapes() -> None:
    for _ in range(350):
        m, n, k = (int(torch.randint(1, most, ())) for most in (20, 150, 2000))
        for dtype in KINDS:
            dense_agrees(m, n, k, dtype, 1 + m % 3)
        int8_agrees(m, n, k, 1 + m % 3)


def test_every_fp16_and_bf16_number_is_read_right() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = torch.ones(1, 1)
    for dtype in (torch.float16, torch.bfloat16):
        weight, y = every.view(dtype), torch.empty(2**16)
        library().bn_dense_linear(
            x.data_ptr(), 1, 1, weight.data_ptr(), native.KINDS[dtype], 2**16, y.data_ptr(), 1
        )
        assert same(y, weight.float())


# --- attention ------------------------------------------------------------------------------------


Cache = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def cache_of(s: int, g: int, length: int, e: int, dtype: torch.dtype) -> Cache:
    """Random keys and values, with their scales."""
    if dtype == torch.int8:
        codes = [torch.randint(-127, 128, (s, g, length, e), dtype=dtype) for _ in range(2)]
        scales = [torch.rand(s, g, length) / 60 for _ in range(2)]
        return codes[0], codes[1], scales[0], scales[1]
    k, v = (torch.randn(s, g, length, e).to(dtype) for _ in range(2))
    return k, v, None, None


def copies(cache: Cache) -> Cache:
    k, v, k_scale, v_scale = (None if t is None else t.clone() for t in cache)
    assert k is not None
    assert v is not None
    return k, v, k_scale, v_scale


def in_double(q: Tensor, cache: Cache, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the columns that each query sees, one by one in float64, and what the answer
    in fp32 may be off by.

    A score s = q . k / sqrt(E) is off by d = (E + 4) U sum |q k| / sqrt(E), a weight by a relative
    2 d (its own score's and the sum's) and the exponentials' (8 + n) U, the output by that and
    (n + 4) U of sum p |v|.
    """
    (b, t, h, e), (_, g, n_columns, _) = q.shape, cache[0].shape
    k, v = (
        x.double() if scale is None else x.double() * scale.double().unsqueeze(-1)
        for x, scale in ((cache[0], cache[2]), (cache[1], cache[3]))
    )
    y, slack = torch.empty(b, t, h, e, dtype=torch.float64), torch.empty(b, t, h, e)
    for row in range(b):
        for step in range(t):
            n = min(max(int(lengths[row]), 0) + step + 1, n_columns)
            for head in range(h):
                keys, values = k[row, head // (h // g), :n], v[row, head // (h // g), :n]
                terms = keys * q[row, step, head].double() * e**-0.5
                p = terms.sum(-1).softmax(0)
                y[row, step, head] = p @ values
                d = (e + 4) * U * terms.abs().sum(-1).max()
                slack[row, step, head] = (2 * d + (2 * n + 12) * U) * (p @ values.abs())
    return y.view(b, t, h * e), slack.view(b, t, h * e)


def attention_agrees(
    b: int, t: int, h: int, g: int, e: int, n_columns: int, dtype: torch.dtype
) -> None:
    cache = cache_of(b + 1, g, n_columns, e, dtype)
    lengths = torch.randint(-1, n_columns + 2, (b,), dtype=torch.int32)
    q = torch.randn(b, t, h, e) * 2
    want, slack = in_double(q, cache, lengths)
    k, v, k_scale, v_scale = cache
    got = rows.decode_attention(q, k, v, lengths, k_scale, v_scale)
    assert ((got - want).abs() <= slack + 1e-36).all(), (b, t, h, g, e, n_columns, dtype)


ATTENTION = [  # b, t, h, g, e, columns
    (1, 1, 1, 1, 2, 1),
    (2, 1, 4, 4, 64, 150),
    (1, 1, 6, 2, 64, 131),
    (1, 1, 5, 1, 50, 70),
    (1, 1, 7, 1, 128, 33),
    (1, 1, 11, 1, 64, 90),
    (1, 2, 2, 2, 80, 65),
    (2, 7, 2, 1, 16, 130),
    (1, 9, 2, 2, 30, 77),
    (1, 17, 1, 1, 64, 129),
    (1, 33, 3, 1, 64, 64),
    (1, 70, 1, 1, 256, 200),
    (1, 140, 1, 1, 6, 139),
]


@pytest.mark.parametrize("dtype", [*KINDS, torch.int8])
def test_attention(dtype: torch.dtype) -> None:
    for shape in ATTENTION:
        attention_agrees(*shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*KINDS, torch.int8])
def test_attention_of_many_shapes(dtype: torch.dtype) -> None:
    for _ in range(75):
        b, t, g, r, e, columns = (int(torch.randint(1, n, ())) for n in (3, 60, 3, 4, 80, 300))
        attention_agrees(b, t, g * r, g, 2 * e, columns, dtype)


@pytest.mark.parametrize("dtype", [*KINDS, torch.int8])
@pytest.mark.parametrize("t", [1, 3, 12, 40])
def test_columns_that_are_not_seen_do_not_matter(dtype: torch.dtype, t: int) -> None:
    """NaN in a column makes those NaN who see it, in keys and in values, and no bit of others."""
    h, g, e, n_columns, length = 4, 2, 48, 90, 37
    cache, lengths = cache_of(1, g, n_columns, e, dtype), torch.tensor([length])
    q = torch.randn(1, t, h, e)
    good = rows.decode_attention(q, cache[0], cache[1], lengths, cache[2], cache[3])
    for which in (0, 1):
        for column in (length + t, length + t // 2, length + 1, 3):
            bad = copies(cache)
            target = bad[which] if dtype != torch.int8 else bad[which + 2]
            assert target is not None
            target[0, 1, column] = math.nan if column % 2 else math.inf
            got = rows.decode_attention(q, bad[0], bad[1], lengths, bad[2], bad[3])
            got, want = got.view(t, h, e), good.view(t, h, e)
            seen = torch.arange(length, length + t) >= column
            assert torch.equal(got[:, :2], want[:, :2])  # heads of another key-value head
            assert torch.equal(got[~seen, 2:], want[~seen, 2:])
            if which == 1 or column % 2:
                assert got[seen, 2:].isnan().all()


def test_large_scores() -> None:
    """Softmax of scores that overflow an exponential: the largest wins."""
    q, k = torch.full((1, 1, 1, 16), 40.0), torch.zeros(1, 1, 100, 16)
    k[0, 0, 70], v = 40.0, torch.arange(100.0).view(1, 1, 100, 1).repeat(1, 1, 1, 16)
    assert (rows.decode_attention(q, k, v, torch.tensor([99])) == 70.0).all()
    many = q.repeat(1, 20, 1, 1)
    assert (rows.decode_attention(many, k, v, torch.tensor([90])) == 70.0).all()


@pytest.mark.parametrize("dtype", [*KINDS, torch.int8])
@pytest.mark.parametrize("e", [2, 6, 16, 50, 64, 100, 256])
def test_rope_append_has_the_bits_of_the_reference(dtype: torch.dtype, e: int) -> None:
    b, t, h, g, n_columns = 3, 5, 4, 2, 20
    cos, sin = torch.randn(n_columns, e), torch.randn(n_columns, e)
    lengths = torch.tensor([4, 17, 2**40])
    for n_valid in ([5, 9, 3], [0, 2, -1]):
        qkv = hostile(b * t * (h + 2 * g), e).view(b, t, -1)
        got, want = (copies(cache_of(b + 1, g, n_columns, e, dtype)) for _ in range(2))
        for one, other in zip(got, want, strict=True):
            if one is not None and other is not None:
                one.copy_(other)
        counts = lengths, torch.tensor(n_valid)
        q = rows.rope_append(qkv, cos, sin, *got[:2], *counts, *got[2:])
        assert same(q, reference.rope_append(qkv, cos, sin, *want[:2], *counts, *want[2:]))
        for one, other in zip(got, want, strict=True):
            assert one is None or other is None or same(one, other)


def test_rounding_to_16_bits() -> None:
    """Every fp16 and bf16 number, and the numbers half-way between neighbours and next to those."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    ones = torch.ones(1, 256)
    for dtype, last in ((torch.float16, 2**12), (torch.bfloat16, 2**15)):
        exact = every.view(dtype).float().view(torch.int32)
        x = torch.cat([exact + step for step in (-last - 1, -last, -1, 0, 1, last, last + 1)])
        v = x.view(torch.float32).view(-1, 256)
        cache = torch.zeros(2, 1, 1, v.shape[0], 256, dtype=dtype)
        qkv = torch.cat([ones.expand_as(v), ones.expand_as(v), v], 1)[None]
        table = ones.repeat(v.shape[0], 1)
        rows.rope_append(
            qkv, table, table, cache[0], cache[1], torch.tensor([0]), torch.tensor([2**30])
        )
        assert same(cache[1, 0, 0], v.to(dtype))


# --- the operators --------------------------------------------------------------------------------


def test_other_dtypes_and_a_missing_library_take_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = torch.randn(3, 70), torch.randn(70)
    calls: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
        (rows.quant, reference.quant, (x,)),
        (rows.rmsnorm_quant, reference.rmsnorm_quant, (x, weight, EPS)),
        (rows.add_rmsnorm_quant, reference.add_rmsnorm_quant, (x, x, weight, EPS)),
        (rows.relu2_mul_rmsnorm_quant, reference.relu2_mul_rmsnorm_quant, (x, x, weight, EPS)),
    ]
    for op, expected, arguments in calls:
        wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
        assert all(map(same, op(*wide), expected(*wide)))
        assert all(map(same, op(*arguments), expected(*arguments)))
    with monkeypatch.context() as without:
        without.setattr(native, "library", lambda: None)
        for op, expected, arguments in calls:
            assert all(map(same, op(*arguments), expected(*arguments)))


def test_layouts() -> None:
    x, weight = torch.randn(2, 3, 70), torch.randn(70)
    want = reference.rmsnorm_quant(x, weight, EPS)
    transposed = x.mT.contiguous().mT
    strided = weight.repeat_interleave(2)[::2]
    for got in (
        rows.rmsnorm_quant(transposed, weight, EPS),
        rows.rmsnorm_quant(x, strided, EPS),
        rows.rmsnorm_quant(x, weight.double(), EPS),
    ):
        assert all(map(same, got, want))
    assert [t.shape for t in rows.quant(x[:0])] == [(0, 3, 70), (0, 3), (0, 3)]
