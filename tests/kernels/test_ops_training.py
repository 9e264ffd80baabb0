"""The operators of training: the native library against plain torch, in fp64 or to the last bit."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.cpu import gradients, native, training

OPS = torch.ops.bitnet
SHAPES = [(1, 1), (3, 5), (33, 64), (70, 257), (2, 1000), (129, 31), (64, 384)]


@pytest.fixture(params=native.available() or ("none",), autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU runs; plain torch where there is no library."""
    if request.param == "none":
        yield "none"
        return
    before = native.used()
    native.use(request.param)
    yield request.param
    native.use(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randn(*shape: int) -> Tensor:
    """Rows of magnitudes from 1e-3 to 1e3."""
    return torch.randn(shape) * 10 ** (torch.rand(shape[0], *(1 for _ in shape[1:])) * 6 - 3)


def assert_sums_agree(ours: Tensor, exact: Tensor, magnitudes: Tensor) -> None:
    """A sum of products in fp32, in any order: within a few roundings of the sum of magnitudes."""
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert ((ours - exact).abs() <= 16 * 2**-24 * magnitudes).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_backward(shape: tuple[int, int], threads: int) -> None:
    torch.manual_seed(0)
    m, k = shape
    x, weight, dy = randn(m, k), torch.randn(k), randn(m, k)
    r = (x.square().mean(1) + 1e-5).rsqrt()
    dx, dw = OPS.norm_backward(dy, x, weight, r)
    wide = [tensor.double() for tensor in (dy, x, weight, r)]
    exact_dx, exact_dw = reference.norm_backward(*wide)
    n, g = wide[1] * wide[3].unsqueeze(1), wide[0] * wide[2]
    spread = g.abs() + n.abs() * (g * n).abs().mean(1, keepdim=True)
    assert_sums_agree(dx, exact_dx, wide[3].unsqueeze(1) * spread)
    assert_sums_agree(dw, exact_dw, (wide[0] * n).abs().sum(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(shape: tuple[int, int], threads: int) -> None:
    torch.manual_seed(0)
    gate, up, dy = randn(*shape), randn(*shape), randn(*shape)
    gate[0, 0], up[-1, -1] = torch.nan, torch.inf
    y = OPS.gate(gate, up)
    torch.testing.assert_close(y, reference.gate(gate, up), rtol=0, atol=0, equal_nan=True)
    ours = OPS.gate_backward(dy, gate, up)
    theirs = reference.gate_backward(dy, gate, up)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("alpha", [0.5, 0.7])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 300)], ids=str)
def test_absmean(shape: tuple[int, int], alpha: float, threads: int) -> None:
    torch.manual_seed(0)
    for weight in (
        randn(*shape),
        torch.zeros(shape),
        torch.full(shape, 1e30),
        randn(*shape) * 1e-9,
    ):
        codes, gamma = OPS.absmean(weight, alpha)
        expected = reference.absmean(weight, alpha)
        assert torch.equal(gamma, expected[1])
        assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_absmean_of_what_is_not_finite(bad: float) -> None:
    weight = torch.randn(9, 7)
    weight[4, 2] = bad
    codes, gamma = OPS.absmean(weight, 0.5)
    assert gamma.isnan()
    assert not codes.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rescale(shape: tuple[int, int], threads: int) -> None:
    torch.manual_seed(0)
    m, n = shape
    acc = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)
    s_x = torch.rand(m)
    for scale in (torch.tensor(0.3), torch.rand(n)):
        for bias in (None, torch.randn(n)):
            expected = reference.rescale(acc, s_x, scale, bias, torch.float32)
            assert torch.equal(training.rescale_(acc.clone(), s_x, scale, bias), expected)


def mixed(seed: int, row: int) -> int:
    """SplitMix64, in Python's integers: the key of a row in ``native/internal.h``."""
    mask = 2**64 - 1
    key = (seed + 0x9E3779B97F4A7C15 * (row + 1)) & mask
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & mask
    return key ^ (key >> 31)


def uniform(seed: int, rows: int, columns: int) -> Tensor:
    """The random numbers of ``native/internal.h``, fp32 ``[rows, columns]``."""
    mask = 2**32 - 1
    numbers = []
    for row in range(rows):
        key = mixed(seed, row)
        for column in range(columns):
            x = (column * 0x9E3779B9 + key) & mask
            x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
            x ^= key >> 32
            x = ((x ^ (x >> 15)) * 0x735A2D97) & mask
            x ^= x >> 15
            numbers.append((x >> 8) / 2**24)
    return torch.tensor(numbers, dtype=torch.float64).float().reshape(rows, columns)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 67), (2, 130)], ids=str)
def test_stochastic_rounding(shape: tuple[int, int], threads: int) -> None:
    """By the generator that the C code describes, computed here from Python's integers."""
    if native.library() is None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    x, s = randn(*shape), torch.rand(shape[0])
    x[0, 0] = -0.0
    state = torch.get_rng_state()
    seed = int(torch.randint(2**63 - 1, ()))
    u = uniform(seed, *shape)
    for transposed, values in ((False, x), (True, x * s.unsqueeze(1))):
        rows, noise = (values.t(), u.t()) if transposed else (values, u)
        scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        expected = (rows / scale.unsqueeze(1) + noise).floor().clamp(-127, 127).to(torch.int8)
        torch.set_rng_state(state)
        ours = OPS.stochastic_int8_columns(x, s) if transposed else OPS.stochastic_int8(x)
        assert torch.equal(ours[1], scale)
        assert torch.equal(ours[0], expected)


def test_stochastic_rounding_of_rows_and_columns_that_are_not_finite() -> None:
    x = torch.randn(4, 6)
    x[1, 2], x[3, 2] = torch.inf, torch.nan
    codes, scale = OPS.stochastic_int8(x)
    assert scale.isnan().tolist() == [False, True, False, True]
    assert not codes[[1, 3]].any()
    codes, scale = OPS.stochastic_int8_columns(x, torch.ones(4))
    assert scale.isnan().tolist() == [False, False, True, False, False, False]
    assert not codes[2].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 67), (130, 600)], ids=str)
def test_three_digits_of_columns(shape: tuple[int, int], threads: int) -> None:
    lib = native.library()
    if lib is None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    m, n = shape
    x, s = randn(m, n), torch.rand(m) + 0.1
    x[:, n // 2] = 0
    if n > 3:
        x[m // 2, 1], x[m - 1, 2] = torch.nan, -torch.inf
    digits, scale = torch.empty(3, n, m, dtype=torch.int8), torch.empty(n)
    lib.bn_digits_columns(
        x.data_ptr(), s.data_ptr(), m, n, digits.data_ptr(), scale.data_ptr(), threads
    )
    columns = (x * s.unsqueeze(1)).t()
    largest = columns.abs().amax(1)
    tiny = torch.finfo(torch.float32).tiny
    assert torch.equal(
        scale.nan_to_num(-1), (largest / (63 * 2**16)).clamp(min=tiny).nan_to_num(-1, posinf=-1)
    )
    number = digits.long()[0] + 2**8 * digits.long()[1] + 2**16 * digits.long()[2]
    finite = largest.isfinite()
    assert not number[~finite].any()
    assert torch.equal(number[finite], (columns / scale.unsqueeze(1)).round().long()[finite])
    acc, y = digits.int() * 1000, torch.empty(n, m)
    lib.bn_sum_of_digits(acc.data_ptr(), scale.data_ptr(), n, m, y.data_ptr(), threads)
    expected = (number.double() * 1000 * scale.double().unsqueeze(1)).float()
    assert torch.equal(y[finite], expected[finite])
    assert y[~finite].isnan().all()


SIZES = [(1, 1, 1), (3, 5, 7), (33, 70, 45), (64, 32, 96), (600, 40, 33), (40, 1100, 65)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(sizes: tuple[int, int, int], threads: int) -> None:
    torch.manual_seed(0)
    m, n, k = sizes
    dy, s_x = randn(m, n), torch.rand(m) + 0.01
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    for gamma in (torch.tensor(0.37), torch.rand(n)):
        scaled = (dy * gamma).double()
        exact, magnitudes = scaled @ codes.double(), scaled.abs() @ codes.double().abs()
        assert_sums_agree(OPS.input_gradient(dy, codes, gamma), exact, magnitudes)
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    scaled = (dy * s_x.unsqueeze(1)).double().t()
    exact, magnitudes = scaled @ x_q.double(), scaled.abs() @ x_q.double().abs()
    ours = OPS.weight_gradient(dy, x_q, s_x)
    # A sum in fp32, or one of integers: products with dy rounded to 2^-23 of its column's largest.
    rounding = 2**-23 * scaled.abs().amax(1, keepdim=True) * x_q.double().abs().sum(0)
    assert ((ours - exact).abs() <= 16 * 2**-24 * magnitudes + rounding).all()
    largest, size = (ours - exact).norm(), exact.norm()
    assert largest <= 2**-20 * size  # as far as a product in fp32 is off


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_input_gradient_of_integers_is_exact(sizes: tuple[int, int, int], threads: int) -> None:
    torch.manual_seed(0)
    m, n, k = sizes
    dy = torch.randint(-1000, 1001, (m, n))
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    for gamma in (torch.tensor(2.0), 2.0 ** torch.randint(-1, 2, (n,))):
        exact = (dy * gamma).double() @ codes.double()
        assert torch.equal(OPS.input_gradient(dy.float(), codes, gamma).double(), exact)


def test_a_gradient_that_is_not_finite_stays_in_its_row() -> None:
    torch.manual_seed(0)
    dy, codes = torch.randn(9, 8), torch.randint(-1, 2, (8, 5), dtype=torch.int8)
    dy[2, 3], dy[6, 7] = torch.nan, torch.inf
    finite = OPS.input_gradient(dy, codes, torch.tensor(0.5)).isfinite()
    assert finite.all(1).tolist() == [i not in (2, 6) for i in range(9)]
    x_q = torch.randint(1, 128, (9, 4), dtype=torch.int8)
    finite = OPS.weight_gradient(dy, x_q, torch.ones(9)).isfinite()
    assert finite.all(1).tolist() == [i not in (3, 7) for i in range(8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_cross_entropy(shape: tuple[int, int], spread: float, threads: int) -> None:
    if native.library() is None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    m, n = shape
    z, targets, losses = torch.randn(shape) * spread, torch.randint(n, (m,)), torch.empty(m)
    wide = z.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    training.cross_entropy_(z, targets, losses)
    largest = wide.detach().abs().amax(1)
    assert ((losses - expected).abs() <= 2**-20 * (1 + largest)).all()
    assert ((z - gradient).abs() <= 2**-20).all()


def test_cross_entropy_of_what_is_not_finite_or_no_target() -> None:
    if native.library() is None:
        pytest.skip("needs the native library")
    z, losses = torch.randn(4, 9), torch.empty(4)
    z[0, 3], z[1, 2], z[2, 5] = torch.nan, torch.inf, -torch.inf
    training.cross_entropy_(z, torch.tensor([1, 1, 1, 1]), losses)
    assert losses.isfinite().tolist() == [False, False, True, True]
    assert z.isfinite().all(1).tolist() == [False, False, True, True]
    for bad in (-1, 9):
        with pytest.raises(RuntimeError, match=f"{bad} is out of bounds"):
            training.cross_entropy_(z, torch.tensor([0, bad, 0, 0]), losses)


def test_no_number_of_threads_changes_a_bit() -> None:
    torch.manual_seed(0)
    m, n, k = 200, 150, 130
    dy, x, weight, s_x = torch.randn(m, n), torch.randn(m, n), torch.randn(n), torch.rand(m)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    r = (x.square().mean(1) + 1e-5).rsqrt()

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        return [
            *OPS.norm_backward(dy, x, weight, r),
            *OPS.stochastic_int8(dy),
            *OPS.stochastic_int8_columns(dy, s_x),
            *(
                [OPS.input_gradient(dy, codes, torch.tensor(0.5))]
                if gradients.takes_input_gradient(dy)
                else []
            ),
            *([OPS.weight_gradient(dy, x_q, s_x)] if gradients.takes_weight_gradient(dy) else []),
        ]

    before = torch.get_num_threads()
    if native.library() is None:
        pytest.skip("needs the native library")
    try:
        torch.set_num_threads(1)
        one = results()
        for many in (2, 5):
            torch.set_num_threads(many)
            for a, b in zip(one, results(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_what_the_native_library_takes() -> None:
    x = torch.randn(3, 4)
    assert training.takes(x, torch.nn.Parameter(x)) == (native.library() is not None)
    assert not training.takes(x.double())
    assert not training.takes(x, x.bfloat16())
    assert not training.takes(x.to("meta"))
    assert not training.takes(x.to_sparse())
    assert not torch.func.vmap(lambda row: row + training.takes(row))(torch.zeros(2, 2)).any()


def test_other_tensors_take_torchs_operators() -> None:
    """The operators themselves look at dtype and device before a pointer is used."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert OPS.gate(x, x).dtype == torch.float64
    assert torch.equal(OPS.absmean(weight, 0.5)[0], reference.absmean(weight, 0.5)[0])
    assert OPS.gate(x.to("meta"), x.to("meta")).shape == x.shape


def test_strided_and_empty_operands() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)[:, ::2]
    weight = torch.randn(8)[::2]
    assert torch.equal(OPS.gate(x, x), reference.gate(x, x))
    none = torch.empty(0, 4)
    dx, dw = OPS.norm_backward(none, none, weight, none.new_empty(0))
    assert dx.shape == (0, 4)
    assert torch.equal(dw, torch.zeros(4))
    codes = torch.zeros(4, 3, dtype=torch.int8)
    assert OPS.input_gradient(none, codes, torch.tensor(1.0)).shape == (0, 3)
    assert torch.equal(OPS.weight_gradient(none, codes[:0], none.new_empty(0)), torch.zeros(4, 3))
