"""The integer product of quantized layers, against numpy."""

import numpy as np
import pytest
import torch

from bitnet.qat.grid import Codes
from bitnet.qat.product import int_matmul, quantized_linear
from bitnet_kernels import reference
from tests.helpers.qat_oracles import Granularity, oracle, random_codes


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 3, 1025), (17, 9, 2500), (0, 3, 4)])
@pytest.mark.parametrize("autocast", [False, True])
def test_integer_product_is_exact(shape: tuple[int, int, int], autocast: bool) -> None:
    m, n, k = shape
    a, b = random_codes(m, k), random_codes(n, k)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        acc = int_matmul(a, b)
        batched = int_matmul(a.expand(2, m, k), b.expand(2, n, k))
    assert acc.dtype == torch.int32
    assert np.array_equal(acc.numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)
    assert torch.equal(batched, torch.stack([acc, acc]))


def test_integer_product_at_its_extremes() -> None:
    """All products of one sign and of the largest size, where pairs of them overflow int16."""
    for k in (2, 1024, 1025, 5000):
        least = torch.full((1, k), -128, dtype=torch.int8)
        assert int_matmul(least, least).item() == 128 * 128 * k
        assert int_matmul(least, -1 - least).item() == -128 * 127 * k


def test_integer_product_of_one_slice_too_long_for_fp32() -> None:
    """An odd sum beyond 2^26, where fp32 has multiples of 8 only: 4095 * 128^2 + 127^2."""
    a = torch.full((1, 4096), -128, dtype=torch.int8)
    a[0, 0] = -127
    assert int_matmul(a, a).item() == 67_108_609


def test_zero_points_beyond_int32() -> None:
    """255 * 255 * 40000 > 2^31."""
    k = 40_000
    one, zero = torch.ones(()), torch.tensor(-128, dtype=torch.int32)
    most = Codes(torch.full((1, k), 127, dtype=torch.int8), one, zero)
    assert quantized_linear(most, most, None, torch.float64).item() == np.float32(255 * 255 * k)
    least = Codes(torch.full((1, k), -128, dtype=torch.int8), one, -1 - zero)
    y = quantized_linear(most, least, None, torch.float64)
    assert y.item() == np.float32(-255 * 255 * k)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("zero_x", [False, True])
@pytest.mark.parametrize("zero_w", [False, True])
def test_quantized_linear_in_the_stated_order(
    granularity: Granularity, zero_x: bool, zero_w: bool
) -> None:
    for m, n, k, group_size in [(1, 1, 1, 4), (3, 5, 13, 4), (7, 2, 64, 16), (2, 3, 1100, 512)]:
        shape = {"tensor": (), "row": (n,), "group": (n, -(-k // group_size))}[granularity]
        zero = torch.randint(-128, 128, shape, dtype=torch.int32) if zero_w else None
        w = Codes(random_codes(n, k), torch.rand(shape), zero)
        zero = torch.randint(-128, 128, (), dtype=torch.int32) if zero_x else None
        x = Codes(random_codes(m, k), torch.rand(() if zero_x else (m,)), zero)
        for bias in (None, torch.randn(n)):
            y = quantized_linear(x, w, bias, torch.float32, group_size)
            assert np.array_equal(y.numpy(), oracle(x, w, bias, group_size))
            half = quantized_linear(x, w, bias, torch.bfloat16, group_size)
            assert torch.equal(half, y.bfloat16())
            ternary = Codes(w.codes.sign(), w.scale, None)
            if not zero_x:
                expected = reference.scaled_matmul(
                    x.codes, x.scale, ternary.codes, w.scale, bias, torch.float32, group_size
                )
                y = quantized_linear(x, ternary, bias, torch.float32, group_size)
                assert torch.equal(y, expected)
