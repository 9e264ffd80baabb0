"""Quantizers of activations against numpy: dynamic and static, their gradients and errors."""

import math

import numpy as np
import pytest
import torch

from bitnet.qat.activations import (
    absmax_codes,
    fake_quantize_activation,
    static_codes,
    static_range,
)
from bitnet.qat.recipe import Recipe
from bitnet_kernels.reference import absmax_int8
from tests.helpers.quantizers import BAD, off_tie, random


def activation(kind: str, bits: int = 8, symmetric: bool = True) -> Recipe:
    return Recipe(
        weights="int", activations=kind, activation_bits=bits, activation_symmetric=symmetric
    )


@pytest.mark.parametrize("bits", range(4, 9))
def test_dynamic_activations_match_numpy(bits: int) -> None:
    x = random(3, 5, 33, seed=bits)
    x[0, 0] = 0
    codes, scale, zero_point, hat = fake_quantize_activation(x, activation("absmax", bits))
    assert zero_point is None
    assert list(scale.shape) == [3, 5]
    top = np.float32(2 ** (bits - 1) - 1)
    a = np.maximum(np.abs(x.numpy()).max(-1), np.float32(1e-5)) / top
    assert (scale.numpy() == a).all()
    expected = np.clip(np.rint(x.numpy() / a[..., None]), -top, top)
    assert (codes.numpy() == expected).all()
    assert (hat.numpy() == expected.astype(np.float32) * a[..., None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eight_bits_are_absmax_int8(dtype: torch.dtype) -> None:
    x = random(50, 33, seed=6).to(dtype)
    x[0], x[1, 0], x[2, 3] = 0, math.nan, -math.inf
    x[3] *= 1e-20
    codes, scale = absmax_codes(x, 8)
    expected_codes, expected_scale = absmax_int8(x)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    hat = fake_quantize_activation(x, activation("absmax")).hat
    assert hat.dtype == dtype
    assert hat.isnan().any(1).tolist() == [False, True, True] + [False] * 47


def test_a_scale_a_sample() -> None:
    x = random(4, 3, 5, 6, seed=7)
    quantized = fake_quantize_activation(x, activation("absmax"), per_sample=True)
    codes, scale = absmax_int8(x.reshape(4, -1))
    assert torch.equal(quantized.codes, codes.reshape(x.shape))
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.hat, quantized.codes * scale.reshape(4, 1, 1, 1))


@pytest.mark.parametrize("per_sample", [False, True])
def test_dynamic_gradients_are_the_identity(per_sample: bool) -> None:
    x, dy = random(3, 5, 7).requires_grad_(), random(3, 5, 7, seed=8)
    fake_quantize_activation(x, activation("absmax"), per_sample=per_sample).hat.backward(dy)
    assert x.grad is not None
    assert torch.equal(x.grad, dy)


RANGES = [(-1.0, 3.0), (0.0, 6.0), (-6.0, 0.0), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0), (3.0, 3.0)]


@pytest.mark.parametrize(("low", "high"), [*RANGES, (-1e-30, 1e-30), (-7e30, 1e-3)])
@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_activations_match_numpy(
    low: float, high: float, bits: int, symmetric: bool
) -> None:
    scale, zero_point = static_range(torch.tensor(low), torch.tensor(high), bits, symmetric)
    assert scale.dtype == torch.float32
    half = 2 ** (bits - 1)
    wide_low, wide_high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        assert zero_point is None
        s, zero, lowest = max(-wide_low, wide_high, 1e-5) / (half - 1), 0, 1 - half
    else:
        assert zero_point is not None
        assert zero_point.dtype == torch.int32
        s = max(wide_high - wide_low, 1e-5) / (2 * half - 1)
        zero, lowest = round(-wide_low / s) - half, -half
        assert zero_point.item() == zero
    assert scale.item() == pytest.approx(s, rel=1e-6)

    width = max(wide_high - wide_low, 1e-3)
    x = torch.linspace(wide_low - width, wide_high + width, 1001)
    x = torch.cat([x, torch.zeros(1)]).requires_grad_()
    recipe = activation("static", bits, symmetric)
    quantized = fake_quantize_activation(x, recipe, scale, zero_point)
    v = x.detach().double().numpy() / scale.double().item()
    clear = off_tie(v) > 1e-4
    expected = np.clip(np.rint(v) + zero, lowest, half - 1)
    assert (quantized.codes.numpy()[clear] == expected[clear]).all()
    assert torch.equal(quantized.codes, static_codes(x, scale, zero_point, bits))
    hat = (quantized.codes.float() - zero) * scale
    assert torch.equal(quantized.hat, hat)
    assert hat[-1] == 0  # zero is a level
    # every value of the range is within a step (the zero point may round half a step away)
    inside = (x >= wide_low) & (x <= wide_high)
    assert ((hat - x).abs()[inside] <= scale * 1.001).all()
    # straight through where the code needed no clamping, 0 elsewhere
    quantized.hat.sum().backward()
    assert x.grad is not None
    expected_grad = (np.rint(v) + zero >= lowest) & (np.rint(v) + zero <= half - 1)
    assert (x.grad.numpy()[clear] == expected_grad[clear]).all()
    assert 0 < expected_grad.mean() < 1


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_codes_do_not_hide_what_is_not_finite(bad: float, symmetric: bool) -> None:
    scale, zero_point = static_range(torch.tensor(-1.0), torch.tensor(2.0), 8, symmetric)
    x = torch.tensor([0.5, bad])
    quantized = fake_quantize_activation(x, activation("static", 8, symmetric), scale, zero_point)
    assert quantized.scale.isnan()
    assert quantized.hat.isnan().all()
    code = static_codes(x, scale, zero_point, 8)[1].item()
    zero = 0 if zero_point is None else zero_point.item()
    lowest = -127 if symmetric else -128
    assert code == (zero if math.isnan(bad) else 127 if bad > 0 else lowest)
    ends = (bad, 1.0) if bad < 0 else (-1.0, bad)
    assert static_range(torch.tensor(ends[0]), torch.tensor(ends[1]), 8, symmetric)[0].isnan()


def test_empty_batches() -> None:
    x = torch.zeros(0, 5, requires_grad=True)
    assert fake_quantize_activation(x, activation("absmax")).scale.shape == (0,)
    quantized = fake_quantize_activation(x, activation("static"), torch.tensor(1.0))
    assert quantized.hat.shape == (0, 5)
    assert quantized.scale.item() == 1


def test_activation_errors_name_the_argument() -> None:
    x, one = random(2, 3), torch.tensor(1.0)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        fake_quantize_activation(x.long(), activation("absmax"))
    with pytest.raises(ValueError, match="recipe: activations 'none'"):
        fake_quantize_activation(x, activation("none"))
    with pytest.raises(ValueError, match="scale: expected for static"):
        fake_quantize_activation(x, activation("static"))
    with pytest.raises(ValueError, match="scale: expected for static"):
        fake_quantize_activation(x, activation("absmax"), one)
