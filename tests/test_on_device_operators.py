"""Each public operator on the device that is here, against the CPU's arithmetic."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.model import rotary
from bitnet_kernels import (
    KERNELS,
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
from tests.helpers.findings import hostile_rows, oracle_quant
from tests.helpers.on_device import (
    DTYPES,
    EPS,
    OWN_WARNINGS,
    Layout,
    all_equal,
    device,
    equal,
    here,
    no_waits,
    size,
)

__all__ = ["device"]  # a fixture
pytestmark = OWN_WARNINGS


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def unaligned(tensor: Tensor) -> Tensor:
    """Contiguous, but an element behind where an allocation begins."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS: tuple[Layout, ...] = (strided, transposed, unaligned)


def product(x_q: Tensor, codes: Tensor) -> Tensor:
    """``x_q @ codes.T``: in fp64 integers are exact up to 2^53."""
    return (x_q.double() @ codes.double().t()).to(torch.int32)


def rescaled(
    acc: Tensor, s_x: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = acc.float() * s_x[:, None]
    y = y * scale
    return (y if bias is None else y + bias.float()).to(dtype)


class Matmul(NamedTuple):
    """A random product on the CPU: codes of tokens that use all of int8, and float tokens."""

    x_q: Tensor
    s_x: Tensor
    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def random(cls, index: int, m: int, n: int, k: int) -> "Matmul":
        x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        x_q[: m // 2] = -128
        s_x, x = torch.rand(m), (3 * torch.randn(m, k)).to(DTYPES[index % 4])
        if m > 2:
            x[-1, -1], s_x[-1] = torch.nan, torch.nan
        codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
        scale = torch.rand(n) if index % 2 else torch.rand(())
        bias = None if index % 3 == 0 else torch.randn(n).to(DTYPES[(index + 1) % 4])
        return cls(x_q, s_x, x, codes, scale, bias)


SHAPES = [
    *((1, 1, 1), (2, 5, 1), (3, 7, 63), (1, 40, 64), (16, 17, 65), (17, 33, 300), (65, 129, 70)),
    *((300, 257, 131), (0, 5, 70), (3, 0, 70)),
]
LARGE = [(1, 4096, 4096), (3, 2560, 6912), (64, 1000, 4100), (4100, 512, 704)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_matmuls(device: torch.device, kernel: str) -> None:
    """By every kernel: sums, outputs of codes, and outputs of floats; a token with NaN alone is
    NaN."""
    for index, (m, n, k) in enumerate(SHAPES + size([], LARGE)):
        one = Matmul.random(index, m, n, k)
        packed = pack_ternary(one.codes.to(device))
        planes = bit_planes(packed) if kernel in ("addsub", "popcount") or index % 2 else None
        scale, bias = one.scale.to(device), None if one.bias is None else one.bias.to(device)
        x_q, dtype, acc = one.x_q.to(device), one.x.dtype, product(one.x_q, one.codes)
        case = (m, n, k, dtype)
        if index % 3 == 0:  # each form of a kernel takes a second to compile
            assert equal(ternary_matmul(x_q, packed, here(kernel), planes), acc), case
        tokens = (x_q, one.s_x.to(device), x_q.sum(1, dtype=torch.int32))
        y = quantized_linear(*tokens, packed, scale, bias, here(kernel), planes, dtype)
        assert equal(y, rescaled(acc, one.s_x, one.scale, one.bias, dtype)), case

        codes, s_x, _ = quantized(one.x)
        want = rescaled(product(codes, one.codes), s_x, one.scale, one.bias, dtype)
        y = ternary_linear(one.x.to(device), packed, scale, bias, here(kernel), planes=planes)
        assert equal(y, want), case


def quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with np.errstate(all="ignore"):  # tokens that hold infinity and NaN
        return oracle_quant(x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts_of_matmuls(device: torch.device, kernel: str) -> None:
    one = Matmul.random(1, 6, 33, 300)
    codes, s_x, _ = quantized(one.x)
    want = rescaled(product(codes, one.codes), s_x, one.scale, one.bias, one.x.dtype)
    acc = product(one.x_q, one.codes)
    for layout in LAYOUTS:
        packed = pack_ternary(one.codes.to(device))
        planes = layout(bit_planes(packed))
        x, x_q, s_x, scale, bias = (
            layout(t.to(device)) for t in (one.x, one.x_q, one.s_x, one.scale, one.bias)
        )
        packed = layout(packed)
        assert equal(ternary_matmul(x_q, packed, here(kernel), planes), acc), layout
        for lead in ((6,), (2, 3), (1, 6, 1)):
            leading = x.contiguous().view(*lead, 300) if len(lead) > 1 else x
            y = ternary_linear(leading, packed, scale, bias, here(kernel), planes=planes)
            assert equal(y, want.view(*lead, 33)), (layout, lead)
        row_sum = layout(x_q.sum(1, dtype=torch.int32))
        y = quantized_linear(x_q, s_x, row_sum, packed, scale, bias, here(kernel), planes)
        expected = rescaled(acc, one.s_x, one.scale, one.bias, torch.bfloat16)
        assert equal(y, expected), layout


def test_group_scales(device: torch.device) -> None:
    one = Matmul.random(1, 17, 33, 300)
    codes, s_x, _ = quantized(one.x)
    scale, want = torch.rand(33, 10), torch.zeros(17, 33)
    for group in range(10):
        part = slice(32 * group, 32 * group + 32)
        want += rescaled(
            product(codes[:, part], one.codes[:, part]), s_x, scale[:, group], None, torch.float32
        )
    packed = pack_ternary(one.codes.to(device))
    y = ternary_linear(one.x.to(device), packed, scale.to(device), group_size=32)
    assert equal(y, want.to(one.x.dtype))


def test_packing(device: torch.device) -> None:
    for n, k in ((1, 1), (5, 63), (33, 64), (7, 300), *size((), ((2560, 6912),))):
        codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
        packed, base3 = pack_ternary(codes), pack_base3(codes)
        assert equal(pack_ternary(codes.to(device)), packed)
        assert equal(pack_base3(codes.to(device)), base3)
        assert equal(bit_planes(packed.to(device)), bit_planes(packed))
        assert equal(unpack_ternary(packed.to(device), k), codes)
        assert equal(unpack_base3(base3.to(device), k), codes)


TOKEN_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "quant": (quant, reference.quant, 1),
    "rmsnorm": (rmsnorm_quant, reference.rmsnorm_quant, 1),
    "add_rmsnorm": (add_rmsnorm_quant, reference.add_rmsnorm_quant, 2),
    "relu2_mul_rmsnorm": (relu2_mul_rmsnorm_quant, reference.relu2_mul_rmsnorm_quant, 2),
}


@pytest.mark.parametrize("name", TOKEN_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizers(device: torch.device, dtype: torch.dtype, name: str) -> None:
    """NaN, infinity, denormals, ties and zeros among the tokens, each of which stays alone."""
    op, expected, n_inputs = TOKEN_OPS[name]
    for index, k in enumerate((1, 63, 65, 300, *size((), (4096, 8193, 14336)))):
        x = torch.randn(300, k) * 10.0 ** torch.randint(-2, 3, (300, 1))
        hostile = hostile_rows(k, torch.float32 if dtype == torch.float64 else dtype)
        x = torch.cat([hostile.to(dtype), x.to(dtype)])
        if dtype == torch.float64:
            x[5, 0] = 1e300  # beyond fp32: counts as infinite
        other = torch.randn(309, k).to(dtype)
        other[:, ::3] = -x[:, ::3]
        rest = () if name == "quant" else (torch.randn(k).to(DTYPES[index % 4]), EPS)
        for m in (1, 17, 309):
            inputs = (x[-m:] if m < 17 else x[:m], other[:m])[:n_inputs]
            want = expected(*inputs, *rest)
            on_device = [t.to(device) if isinstance(t, Tensor) else t for t in (*inputs, *rest)]
            assert all_equal(op(*on_device), want), (m, k)
            if name == "quant":
                assert all_equal(want, quantized(inputs[0])), (m, k)
            for layout in LAYOUTS if k == 65 else ():
                changed = [layout(t) if isinstance(t, Tensor) else t for t in on_device]
                assert all_equal(op(*changed), want), (m, k, layout)


def test_products_of_training(device: torch.device) -> None:
    shapes = [*SHAPES, (2, 3, 2**17 - 1), *size((), (*LARGE, (2048, 4096, 1024)))]
    for index, (m, n, k) in enumerate(shapes):
        one, dtype = Matmul.random(index, m, n, k), DTYPES[index % 4]
        w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        w[: n // 2] = -128
        want = rescaled(product(one.x_q, one.codes), one.s_x, one.scale, one.bias, dtype)
        for layout in (as_it_is, *LAYOUTS) if k == 300 else (as_it_is,):
            x_q, s_x, codes, b = (layout(t.to(device)) for t in (one.x_q, one.s_x, one.codes, w))
            bias = None if one.bias is None else layout(one.bias.to(device))
            y = int8_linear(x_q, s_x, codes, one.scale.to(device), bias, dtype)
            assert equal(y, want), (m, n, k, layout)
            assert equal(int8_matmul(x_q, b), product(one.x_q, w)), (m, n, k, layout)


class Rows(NamedTuple):
    """Attention of B rows, T tokens, H and G heads of E channels, over L columns."""

    t: int
    h: int
    g: int
    e: int
    n_columns: int
    lengths: list[int]

    def cache(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Keys and values, and of int8 their scales: NaN, or codes of scale NaN; a row more than
        there are."""
        shape = (len(self.lengths) + 1, self.g, self.n_columns, self.e)
        if dtype == torch.int8:
            scales = [torch.full(shape[:3], torch.nan) for _ in range(2)]
            return (*(torch.full(shape, 99, dtype=dtype) for _ in range(2)), *scales)
        return tuple(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))

    def filled_cache(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same with numbers in the columns that its queries see."""
        cache = self.cache(dtype)
        for row, length in enumerate(self.lengths):
            n = min(max(length, 0) + self.t, self.n_columns)
            for part in cache:
                filled = torch.randn(self.g, n, *part.shape[3:])
                if part.dtype == torch.int8:
                    filled = (40 * filled).clamp(-127, 127)
                elif dtype == torch.int8:
                    filled = 0.02 * filled.abs()
                part[row, :, :n] = filled.to(part.dtype)
        return cache


ROWS = [
    Rows(1, 4, 2, 16, 64, [0]),
    Rows(1, 6, 2, 80, 131, [130, 5, 64]),
    Rows(3, 4, 4, 18, 70, [67, 0, 69, -2]),
    Rows(17, 8, 2, 64, 300, [0, 283]),
    Rows(65, 3, 1, 256, 130, [60]),
    Rows(1, 8, 1, 128, 640, [639, 0, 63, 64, 65, 300, 127, 700]),
]
ROWS += size(
    [],
    [
        Rows(1, 32, 8, 128, 4160, [4095]),
        Rows(1, 32, 8, 128, 2112, [2047, 3, 900, 1024] * 8),
        Rows(256, 32, 8, 128, 2112, [1500, 0]),
    ],
)
CACHES = [
    *((torch.float32, torch.float32), (torch.float32, torch.int8), (torch.bfloat16, torch.int8)),
    *((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
def test_rope_append(device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Columns that are not there are not written, and those of padding tokens neither."""
    for index, rows in enumerate(ROWS):
        b = len(rows.lengths)
        qkv = torch.randn(b, rows.t, (rows.h + 2 * rows.g) * rows.e).to(dtype)
        qkv[0, -1, -1] = torch.inf
        cos, sin = rotary(torch.arange(rows.n_columns), rows.e, 10_000.0)
        n_valid = torch.tensor([(rows.t, 0, 1, rows.t + 5)[(index + i) % 4] for i in range(b)])
        lengths = torch.tensor(rows.lengths, dtype=torch.int32)
        want = rows.cache(cache_dtype)
        q = reference.rope_append(qkv, cos, sin, *want[:2], lengths, n_valid, *want[2:])
        for layout in (strided, unaligned):
            got = [part.to(device) for part in rows.cache(cache_dtype)]
            got = [unaligned(part) for part in got] if layout is unaligned else got
            of_layout = [layout(t.to(device)) for t in (qkv, cos, sin)]
            counts = (layout(lengths.to(device)), n_valid.to(device))
            turned = rope_append(*of_layout, *got[:2], *counts, *got[2:])
            assert equal(turned, q), (rows, layout)
            assert all_equal(got, want), (rows, layout)


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
def test_attention(device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Against fp64, within the roundings of the contract; other columns hold NaN."""
    for rows in ROWS:
        q = torch.randn(len(rows.lengths), rows.t, rows.h, rows.e).to(dtype)
        parts = rows.filled_cache(cache_dtype)
        lengths = torch.tensor(rows.lengths)
        want, slack = attention(q, parts, lengths)
        for layout in (strided, unaligned):
            on_device = [part.to(device) for part in parts]
            on_device = (
                [unaligned(part) for part in on_device] if layout is unaligned else on_device
            )
            counts = layout(lengths.to(device))
            y = decode_attention(layout(q.to(device)), *on_device[:2], counts, *on_device[2:])
            assert y.dtype == dtype
            assert ((y.cpu().double() - want).abs() <= slack).all(), (rows, layout)


def attention(q: Tensor, cache: tuple[Tensor, ...], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 outputs ``[B, T, H * E]``, and how far they may be off.

    u = 2^-24. A score adds E products in fp32, off by at most (E + 8) u sum |q k| / sqrt(E), which
    is a relative error of its probability, in the numerator and in the sum: twice; tensor cores
    truncate what they add instead of rounding it: twice again in 16 bits. Sums over columns add
    (columns + 16) u, the approximate exponentials and division of a GPU 16 u. Where the second dot
    is of 16 bits, probabilities are rounded to 2^-8 (bf16), or to 2^-11 and 2^-24 of the largest
    value (fp16). Last the output's own rounding.
    """
    (b, t, h, e), (_, g, n_columns, _) = q.shape, cache[0].shape
    k, v = (part[:b].double().nan_to_num(0.0) for part in cache[:2])
    if len(cache) == 4:
        k_scale, v_scale = (part[:b].double().nan_to_num(0.0).unsqueeze(-1) for part in cache[2:])
        k, v = k * k_scale, v * v_scale
    kind, u = cache[0].dtype, 2.0**-24
    wide = q.dtype == torch.float32 or kind not in (q.dtype, torch.int8)
    rounded = torch.float32 if wide else torch.bfloat16 if kind == torch.int8 else kind
    unit = {torch.float32: u, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    queries = q.double().unflatten(2, (g, h // g)) / e**0.5
    last = lengths.clamp(min=0)[:, None] + torch.arange(t)
    unseen = (torch.arange(n_columns) > last[..., None])[:, :, None, None]
    scores = torch.einsum("btgre,bgle->btgrl", queries, k).masked_fill(unseen, -torch.inf)
    p = scores.softmax(-1)
    y = torch.einsum("btgrl,bgle->btgre", p, v)
    largest = torch.einsum("btgre,bgle->btgrl", queries.abs(), k.abs()).masked_fill(unseen, 0.0)
    relative = (2 if wide else 4) * (e + 8) * u * largest.amax(-1, keepdim=True)
    relative = relative + (n_columns + 32) * u + (0.0 if wide else unit[rounded])
    slack = relative * torch.einsum("btgrl,bgle->btgre", p, v.abs()) + unit[q.dtype] * y.abs()
    slack = slack + 2.0**-25 + (n_columns * u * v.abs().max() if rounded == torch.float16 else 0.0)
    return y.flatten(2), slack.flatten(2)


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=str)
@pytest.mark.parametrize("t", [1, 6])
def test_what_is_not_finite_stays_in_its_row(
    device: torch.device, t: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """A bad key or value spoils the outputs of its head that see it, and no others."""
    rows = Rows(t, 4, 2, 16, 70, [64, 33])
    q = torch.randn(2, t, 4, 16).to(device, dtype)
    lengths = torch.tensor(rows.lengths, device=device)
    for part, at in ((0, 33), (1, 33), (1, 33 + t // 2)):
        cache = rows.filled_cache(cache_dtype)
        cache[part + 2 if cache_dtype == torch.int8 else part][1, 1, at] = torch.nan
        on_device = [one.to(device) for one in cache]
        y = decode_attention(q, *on_device[:2], lengths, *on_device[2:]).cpu()
        finite = y.view(2, t, 2, -1).isfinite()
        want = torch.ones_like(finite)
        want[1, at - 33 :, 1] = False
        assert torch.equal(finite, want), (part, at)


def calls(device: torch.device, m: int) -> dict[str, Callable[[], Any]]:
    """Each operator, on m tokens or rows."""
    one, rows = Matmul.random(1, m, 40, 300), Rows(1, 4, 2, 16, 70, list(range(m)))
    x, x_q, s_x, codes, scale = (
        t.to(device) for t in (one.x.float(), one.x_q, one.s_x, one.codes, one.scale)
    )
    packed = pack_ternary(codes)
    planes, row_sum = bit_planes(packed), x_q.sum(1, dtype=torch.int32)
    weight, cache = torch.rand(300, device=device), [c.to(device) for c in rows.cache(torch.int8)]
    table, lengths = torch.rand(70, 16, device=device), torch.arange(m, device=device)
    qkv, q = torch.rand(m, 1, 128, device=device), torch.rand(m, 1, 4, 16, device=device)
    groups = torch.rand(40, 3, device=device)
    found: dict[str, Callable[[], Any]] = {
        "quant": lambda: quant(x),
        "rmsnorm_quant": lambda: rmsnorm_quant(x, weight, EPS),
        "add_rmsnorm_quant": lambda: add_rmsnorm_quant(x, x, weight, EPS),
        "relu2_mul_rmsnorm_quant": lambda: relu2_mul_rmsnorm_quant(x, x, weight, EPS),
        "int8_linear": lambda: int8_linear(x_q, s_x, codes, scale),
        "int8_matmul": lambda: int8_matmul(x_q, codes),
        "groups": lambda: ternary_linear(x, packed, groups),
        "rope_append": lambda: rope_append(
            qkv, table, table, *cache[:2], lengths, lengths, *cache[2:]
        ),
        "decode_attention": lambda: decode_attention(q, *cache[:2], lengths, *cache[2:]),
    }
    for kernel in dict.fromkeys(map(here, KERNELS)):
        options = {"kernel": kernel, "planes": planes}
        found |= {
            f"ternary_matmul {kernel}": lambda options=options: ternary_matmul(
                x_q, packed, **options
            ),
            f"ternary_linear {kernel}": lambda options=options: ternary_linear(
                x, packed, scale, **options
            ),
            f"quantized_linear {kernel}": lambda options=options: quantized_linear(
                x_q, s_x, row_sum, packed, scale, **options
            ),
        }
    return found


def test_no_operator_waits(device: torch.device) -> None:
    """Once its kernels are compiled."""
    operators = calls(device, 3)
    for call in operators.values():
        call()
    with no_waits(device):
        for call in operators.values():
            call()


def test_no_tokens(device: torch.device) -> None:
    for name, call in calls(device, 0).items():
        results = call()
        for result in results if isinstance(results, tuple) else (results,):
            assert result.shape[0] == 0, name
            assert result.device.type == device.type, name
