import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_kernels import pack_ternary, reference
from bitnet_kernels.cpu import int_mm
from tests.helpers.scripts import run_script

SHAPES = [(1, 1, 1), (5, 3, 1), (3, 5, 2), (1, 7, 63), (17, 1, 64), (16, 9, 65), (33, 40, 300)]


def random_operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Full-range int8 activations [M, K] and ternary codes [N, K]."""
    generator = torch.Generator().manual_seed(m + 1000 * n + 10**6 * k)
    x_q = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    codes = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    return x_q, codes


def int64_product(x_q: Tensor, codes: Tensor) -> Tensor:
    product = x_q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    return torch.from_numpy(product.astype(np.int32))


@pytest.mark.parametrize("vnni", [True, False])  # False: the native library, where there is one
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_are_exact(
    m: int, n: int, k: int, vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    x_q, codes = random_operands(m, n, k)
    want = int64_product(x_q, codes)
    for got in (
        reference.int8_matmul(x_q, codes),
        reference.ternary_matmul(x_q, pack_ternary(codes)),
        int_mm.codes_matmul(x_q, codes),
        int_mm.codes_matmul(x_q.t().contiguous().t(), codes.t().contiguous().t()),
    ):
        assert got.dtype == torch.int32
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [-128, 127])
def test_products_beyond_fp32_stay_exact(value: int) -> None:
    """140001 * 127 > 2^24: fp32 accumulation would lose the odd units."""
    x_q = torch.full((2, 140_001), value, dtype=torch.int8)
    codes = torch.ones(3, 140_001, dtype=torch.int8)
    codes[1] = -1
    want = torch.tensor([value, -value, value], dtype=torch.int32).mul(140_001).expand(2, 3)
    assert torch.equal(int_mm.codes_matmul(x_q, codes), want)
    assert torch.equal(reference.int8_matmul(x_q, codes), want)


def test_empty_products_are_empty_int32() -> None:
    x_q, codes = random_operands(4, 3, 9)
    for matmul in (reference.int8_matmul, int_mm.codes_matmul, int_mm.int8_matmul):
        assert matmul(x_q[:0], codes).shape == (0, 3)
        assert matmul(x_q, codes[:0]).shape == (4, 0)
        assert matmul(x_q[:0], codes).dtype == torch.int32


ISA_CHECK = """
import numpy as np, torch
from bitnet_kernels.cpu.int_mm import codes_matmul
torch.manual_seed(0)
for m, n, k in ((1, 1, 1), (3, 5, 2), (16, 16, 64), (64, 48, 256), (31, 65, 300)):
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    x_q[: m // 2] = torch.where(x_q[: m // 2] > 0, 127, -128)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    codes[: n // 2] = codes[: n // 2, :1]
    want = x_q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    assert np.array_equal(codes_matmul(x_q, codes).numpy(), want), (m, n, k)
"""


@pytest.mark.parametrize("isa", ["AVX2", "SSE41"])
def test_products_are_exact_on_older_processors(isa: str) -> None:
    """Without VNNI, oneDNN adds pairs of products in int16, where full-range operands saturate."""
    run_script(ISA_CHECK, ONEDNN_MAX_CPU_ISA=isa, OMP_NUM_THREADS="1")


def test_absmax_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.0, 0.02, 0.05]])
    codes, scale, row_sum = reference.quant(x)
    assert codes.tolist() == [[127, -64, 1, 0], [0, 0, 0, 0], [-127, 50, 1, 2]]
    torch.testing.assert_close(scale, torch.tensor([1.0, 1e-5 / 127, 0.02]))
    assert row_sum.tolist() == [64, 0, -74]
    assert (codes.dtype, scale.dtype, row_sum.dtype) == (torch.int8, torch.float32, torch.int32)


def test_absmax_rounds_half_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5])
    codes, scale = reference.absmax_int8(x)
    assert scale == 1.0
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_absmax_against_numpy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for k in (1, 2, 63, 300):
        x = (torch.randn(2, 5, k, generator=generator) * 10).to(dtype)
        values = x.float().numpy()
        scale = np.maximum(np.abs(values).max(-1), np.float32(1e-5)) / np.float32(127)
        got_codes, got_scale = reference.absmax_int8(x)
        assert np.array_equal(got_scale.numpy(), scale)
        assert np.array_equal(got_codes.numpy(), np.rint(values / scale[..., None]))


def test_absmax_of_extreme_rows() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor(
        [
            [1.0, float("nan"), 2.0],
            [1.0, float("inf"), 2.0],
            [-float("inf"), float("inf"), float("nan")],
            [largest, -largest, largest / 4],
            [1e-45, -1e-45, 0.0],
            [1e-5, -2.5e-6, 0.0],
            [1e-7, -1e-7, 1e-8],
            [3.0, 1.0, -3.0],
        ]
    )
    codes, scale, row_sum = reference.quant(x)
    assert scale.isnan().tolist() == 3 * [True] + 5 * [False]
    assert bool((scale[3:] > 0).all())
    assert codes.tolist() == [
        *3 * [[0, 0, 0]],
        [127, -127, 32],
        [0, 0, 0],
        [127, -32, 0],
        [1, -1, 0],
        [127, 42, -127],
    ]
    assert torch.equal(row_sum, codes.sum(-1, dtype=torch.int32))


def test_the_rescale_rounds_in_its_stated_order() -> None:
    """((acc * s_x) * scale) + bias, each rounded to fp32, on numbers where the order shows."""
    acc = torch.randint(-(2**25), 2**25, (64, 64), generator=torch.Generator().manual_seed(2))
    acc = acc.to(torch.int32)
    s_x, scale, bias = torch.rand(3, 64, generator=torch.Generator().manual_seed(3)).unbind()
    want = acc.numpy().astype(np.float32) * s_x.numpy()[:, None] * scale.numpy() + bias.numpy()
    assert np.array_equal(reference.rescale(acc, s_x, scale, bias, torch.float32).numpy(), want)
    other = acc.numpy().astype(np.float32) * (s_x.numpy()[:, None] * scale.numpy()) + bias.numpy()
    assert not np.array_equal(want, other)


def test_linear_by_hand() -> None:
    x = torch.tensor([[127.0, 2.0, -1.0]])
    codes = torch.tensor([[1, 0, -1], [-1, -1, 1]], dtype=torch.int8)
    packed = pack_ternary(codes)
    bias = torch.tensor([10.0, -10.0])
    y = reference.ternary_linear(x, packed, torch.tensor(0.5), None)
    assert y.tolist() == [[64.0, -65.0]]
    y = reference.ternary_linear(x, packed, torch.tensor([0.5, 2.0]), bias)
    assert y.tolist() == [[74.0, -270.0]]
    groups = torch.tensor([[0.5, 2.0], [1.0, 0.25]])  # columns 0..1 and 2
    y = reference.ternary_linear(x, packed, groups, bias, group_size=2)
    assert y.tolist() == [[63.5 + 2.0 + 10.0, -129.0 - 0.25 - 10.0]]


def test_nan_tokens_do_not_spread() -> None:
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(4))
    packed = pack_ternary(random_operands(1, 5, 70)[1])
    want = reference.ternary_linear(x, packed, torch.tensor(0.5), None)
    x[1, 3] = float("nan")
    x[2, 69] = float("inf")
    got = reference.ternary_linear(x, packed, torch.tensor(0.5), None)
    assert got[1:3].isnan().all()
    assert torch.equal(got[[0, 3]], want[[0, 3]])


def test_one_group_is_a_scale_per_row() -> None:
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(5))
    packed = pack_ternary(random_operands(1, 5, 70)[1])
    scale = torch.rand(5, generator=torch.Generator().manual_seed(6))
    per_row = reference.ternary_linear(x, packed, scale, None)
    grouped = reference.ternary_linear(x, packed, scale.unsqueeze(1), None, group_size=128)
    assert torch.equal(per_row, grouped)


@pytest.mark.parametrize(("m", "k"), [(1, 70), (4, 64), (5, 2), (3, 1), (2, 200)])
def test_products_of_any_strides(m: int, k: int) -> None:
    """torch._int_mm leaves its output unwritten where a row's stride is below K, which rows that
    are expanded have, and transposes of one column."""
    generator = torch.Generator().manual_seed(k)
    wide = torch.randint(-128, 128, (3 * k + 3, 3 * k + 3), dtype=torch.int8, generator=generator)
    codes = torch.randint(-1, 2, (7, k), dtype=torch.int8, generator=generator)
    for x in (
        wide[:k, :m].t(),
        wide[:1, :k].expand(m, k),
        wide[:m, :1].expand(m, k),
        wide[:m, :k],
        wide[:m, ::3][:, :k],
        wide[:k, :1].clone().t().expand(m, k),
    ):
        for weights in (codes, codes.t().clone().t(), codes[:1].expand(7, k)):
            want = (x.long() @ weights.long().t()).int()
            assert torch.equal(int_mm.codes_matmul(x, weights), want)
