"""NF4 against its construction in the paper, bitsandbytes' own bytes, and a search by distance."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.qat.nf4 import BLOCK, LEVELS, NF4Linear, dequantize, quantize, unpack

SHAPES = [(1, 1), (1, 63), (1, 64), (1, 65), (3, 43), (7, 130), (64, 64), (5, 1), (100,), (2, 3, 5)]
WIDEST = max(b - a for a, b in pairwise(LEVELS))


def test_levels_are_the_papers_quantiles() -> None:
    """QLoRA section 3 and its code: 8 quantiles above 0, 7 below, 0, over the largest."""
    edge = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = [NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    expected = np.array(sorted([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(LEVELS, expected, rtol=0, atol=1e-6)
    assert [float(np.float32(level)) for level in LEVELS] == list(LEVELS)  # fp32 as published


def test_bytes_of_bitsandbytes() -> None:
    """What bitsandbytes 0.50.2 (quantize_4bit, blocksize=64, quant_type="nf4") makes of it."""
    weight = ((torch.arange(135) * 37) % 101 - 50).float().view(5, 27) / 64
    packed, absmax, shape = quantize(weight)
    assert bytes(packed.tolist()).hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2"
        "af4c06d18e2a04c16e29f3b05d17e29f3c05d18e2af4c17"
    )
    assert absmax.tolist() == [0.78125] * 3
    assert shape == (5, 27)


def by_search(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values, weight by weight, by distances in fp64; the lower of two as near."""
    values = weight.flatten().double().numpy()
    codes = np.zeros(len(values), np.uint8)
    hat = np.zeros(len(values))
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        absmax = np.abs(block).max()
        for i, value in enumerate(block, start):
            distances = [abs(value - level * absmax) for level in LEVELS]
            codes[i] = 7 if absmax == 0 else int(np.argmin(distances))
            hat[i] = LEVELS[codes[i]] * absmax
    return codes, hat


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_nearest_level(shape: tuple[int, ...], scale: float) -> None:
    weight = torch.randn(shape) * scale
    packed, absmax, size = quantize(weight)
    count = weight.numel()
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(count / 2),)
    assert absmax.dtype == torch.float32
    assert absmax.shape == (math.ceil(count / BLOCK),)
    codes, hat = by_search(weight)
    assert unpack(packed, size).shape == shape
    np.testing.assert_array_equal(unpack(packed, size).flatten().numpy(), codes)
    ours = dequantize(packed, absmax, size)
    assert ours.dtype == torch.float32
    assert ours.shape == shape
    np.testing.assert_allclose(ours.flatten().double().numpy(), hat, rtol=1e-7)
    spread = absmax.repeat_interleave(BLOCK)[:count].view(shape)
    assert bool(((ours - weight).abs() <= spread * (WIDEST / 2 + 1e-6)).all())


def test_first_element_in_the_high_half() -> None:
    packed, _, _ = quantize(torch.tensor([1.0, -1.0, 0.0]))
    assert packed.tolist() == [0xF0, 0x77]  # an odd count ends with the code of 0


def test_a_midpoint_goes_to_the_lower_level() -> None:
    levels = torch.tensor(LEVELS)
    middle = (levels[1:] + levels[:-1]) / 2
    block = torch.cat((middle, torch.ones(1)))
    assert unpack(*quantize(block)[::2]).tolist() == [*range(15), 15]
    above = torch.cat((torch.nextafter(middle, torch.tensor(2.0)), torch.ones(1)))
    assert unpack(*quantize(above)[::2]).tolist() == [*range(1, 16), 15]


def test_levels_come_back_exactly() -> None:
    weight = torch.tensor(LEVELS)[torch.randint(16, (6, 96))]
    weight[:, ::32] = 1.0  # each block has its largest
    assert torch.equal(dequantize(*quantize(weight * 0.3125)), weight * 0.3125)


def test_gaussian_weights_use_every_code() -> None:
    packed, _, shape = quantize(torch.randn(256, 1024))
    shares = torch.bincount(unpack(packed, shape).flatten().int(), minlength=16) / shape.numel()
    assert 0.015 < float(shares.min()) < float(shares.max()) < 0.095


def test_quantizing_again_changes_nothing() -> None:
    once = quantize(torch.randn(9, 77))
    again = quantize(dequantize(*once))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, 3e38])
def test_constant_blocks_stay_as_they_are(value: float) -> None:
    """All zeros have a scale of 0 and stay zeros; subnormals and the largest floats stay, too."""
    weight = torch.full((3, 43), value)
    packed, absmax, shape = quantize(weight)
    assert bool((absmax == abs(value)).all())
    assert torch.equal(dequantize(packed, absmax, shape), weight)


def test_a_zero_block_beside_others() -> None:
    weight = torch.randn(3, 64)
    weight[1] = 0
    hat = dequantize(*quantize(weight))
    assert not hat[1].any()
    for row in (0, 2):
        assert torch.equal(hat[row : row + 1], dequantize(*quantize(weight[row : row + 1])))


def test_memory_order_and_dtype() -> None:
    weight = torch.randn(43, 6).t()
    assert torch.equal(quantize(weight)[0], quantize(weight.contiguous())[0])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = weight.to(dtype)
        for ours, expected in zip(quantize(low), quantize(low.float()), strict=True):
            assert ours == expected if isinstance(ours, torch.Size) else torch.equal(ours, expected)


def test_what_is_refused() -> None:
    for value in (math.nan, math.inf, -math.inf):
        weight = torch.randn(5, 27)
        weight[4, 26] = value
        with pytest.raises(ValueError, match="weight: holds NaN or infinity"):
            quantize(weight)
    with pytest.raises(TypeError, match=r"weight: expected a floating-point tensor.*int64"):
        quantize(torch.arange(4))
    packed, absmax, _ = quantize(torch.randn(5, 27))
    with pytest.raises(ValueError, match="expected sizes 65 and 3"):
        dequantize(packed, absmax, torch.Size((5, 26)))
    with pytest.raises(ValueError, match="absmax"):
        dequantize(packed, absmax[:2], torch.Size((5, 27)))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 130), (33, 63), (64, 128)])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_a_linear_of_the_dequantized_weight(n: int, k: int, bias: bool) -> None:
    linear = nn.Linear(k, n, bias)
    layer = NF4Linear(linear)
    weight = torch.tensor(by_search(linear.weight.detach())[1], dtype=torch.float32).view(n, k)
    assert torch.equal(layer.dequantize(), weight)
    x = torch.randn(2, 5, k, requires_grad=True)
    x2 = x.detach().clone().requires_grad_(True)
    y, y2 = layer(x), F.linear(x2, weight, linear.bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    y2.backward(dy)
    torch.testing.assert_close(y, y2)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x2.grad)
    assert layer(torch.randn(0, k)).shape == (0, n)
    assert layer(torch.randn(k)).shape == (n,)


def test_layer_keeps_no_floats_for_the_backward() -> None:
    layer, kept = NF4Linear(nn.Linear(64, 96, bias=False)), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert not kept


@pytest.mark.parametrize(("n", "k"), [(128, 256), (7, 130)])
def test_stored_bytes_of_a_layer_by_hand(n: int, k: int) -> None:
    layer = NF4Linear(nn.Linear(k, n))
    assert layer.weight_bytes == math.ceil(n * k / 2) + 4 * math.ceil(n * k / 64)
    if (n, k) == (128, 256):
        assert layer.weight_bytes / (n * k) == 0.5625
    assert sorted(layer.state_dict()) == ["absmax", "bias", "packed"]
    assert f"weight_bytes={layer.weight_bytes}" in repr(layer)


def test_the_product_follows_the_input_or_autocast() -> None:
    """The scales are never rounded; the product is in the dtype of the input or of autocast."""
    layer = NF4Linear(nn.Linear(66, 5))
    weight, absmax = layer.dequantize(), layer.absmax.clone()
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 66, requires_grad=True)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(
        x.grad, weight.bfloat16().float().sum(0).expand(3, -1), rtol=8e-3, atol=8e-3
    )
    layer.to(torch.bfloat16)
    assert layer.absmax.dtype == torch.float32
    assert torch.equal(layer.absmax, absmax)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(3, 66, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layer_on_the_meta_device() -> None:
    with torch.device("meta"):
        empty = NF4Linear(nn.Linear(27, 5))
    full = NF4Linear(nn.Linear(27, 5))
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 27)
    assert torch.equal(empty(x), full(x))
