"""The backward of a ternary layer: in int8, and what 16 bits may not lose."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bitnet.quant
from bitnet import weights_quantized
from bitnet.linear import BitLinear
from bitnet.quant import (
    TernaryWeight,
    absmean_ternary,
    dequantize,
    output_dtype,
    quantize_weight,
    stochastic_int8,
    ternary_linear_ste,
)
from bitnet_kernels import reference
from tests.helpers.small_training import assert_same, batch, next_token_loss, small


def exact_gradients(x: Tensor, w: Tensor, dy: Tensor, granularity: Any) -> tuple[Tensor, Tensor]:
    """float64: dy @ W_hat and dy.T @ x_hat."""
    codes, gamma = absmean_ternary(w, granularity)
    x_q, s_x = reference.absmax_int8(x)
    x_hat = x_q.double() * s_x.double()[:, None]
    return dy.double() @ dequantize(codes, gamma).double(), dy.double().t() @ x_hat


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("int8_backward", ["input", "both"])
def test_int8_backward_is_right_on_average(granularity: Any, int8_backward: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    m, n, k, draws = 13, 21, 9, 300
    x = torch.randn(m, k, generator=generator, requires_grad=True)
    w = torch.randn(n, k, generator=generator, requires_grad=True)
    # rows and columns of very different size, as gradients have; some far below any epsilon
    dy = torch.randn(m, n, generator=generator) * torch.logspace(-12, 0, m)[:, None]
    dy *= torch.logspace(0, -2, n)
    torch.manual_seed(4)
    sums = [torch.zeros(m, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.float64)]
    for _ in range(draws):
        y = ternary_linear_ste(x, w, granularity=granularity, int8_backward=int8_backward)
        for total, gradient in zip(sums, torch.autograd.grad(y, (x, w), dy), strict=True):
            total += gradient.double() / draws
    dx, dw = exact_gradients(x.detach(), w.detach(), dy, granularity)
    # A rounding has variance <= s^2 / 4, s = max / 127 of its row. dx adds n of them, times a code
    # (times gamma); dW adds m of them, times x_q. 6 standard deviations of a mean of the draws, and
    # 2^-15 of the largest term for fp32's rounding of x/s + u (u has 24 bits, |x/s| up to 127).
    _, gamma = absmean_ternary(w.detach(), granularity)
    folded = (dy * gamma).abs().amax(1, keepdim=True).double()
    bound = folded / 127 * (6 * n**0.5 / 2 / draws**0.5 + n * 2**-15)
    assert ((sums[0] - dx).abs() <= bound).all()
    if int8_backward == "both":
        _, s_x = reference.absmax_int8(x.detach())
        largest = (dy * s_x[:, None]).abs().amax(0).double()[:, None]
        bound = largest * (6 * m**0.5 / 2 / draws**0.5 + m * 2**-15)  # |x_q| <= 127
        assert ((sums[1] - dw).abs() <= bound).all()
    else:
        torch.testing.assert_close(sums[1], dw, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_by_hand() -> None:
    x = torch.tensor([[127.0, 0.25, -0.25, 3.0], [0.0, 0.0, 0.0, 0.0], [1e-42, 0.0, 0.0, -1e-42]])
    torch.manual_seed(0)
    draws = [stochastic_int8(x) for _ in range(4000)]
    for codes, scale in draws:
        assert scale[0] == 1
        assert codes[0, [0, 3]].tolist() == [127, 3]  # integers stay what they are
        assert codes[1].tolist() == [0, 0, 0, 0]
    mean = torch.stack([codes[0].double() for codes, _ in draws]).mean(0)
    # 0.25 is 1 in a quarter of the draws: 6 sigma = 6 sqrt(0.1875 / 4000)
    assert mean[1].item() == pytest.approx(0.25, abs=0.042)
    assert mean[2].item() == pytest.approx(-0.25, abs=0.042)
    again = stochastic_int8(x)[0]
    torch.manual_seed(0)
    assert torch.equal(draws[0][0], stochastic_int8(x)[0])  # torch's generator decides
    assert again.dtype == torch.int8


def test_int8_backward_of_zero_and_of_gradients_that_are_not_finite() -> None:
    layer = BitLinear(6, 5, bias=False, int8_backward="both")
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).backward(torch.zeros(4, 5))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert not x.grad.any()
    assert not layer.weight.grad.any()
    for bad in (float("nan"), float("inf")):
        x.grad = layer.weight.grad = None
        dy = torch.ones(4, 5)
        dy[2, 1] = bad
        layer(x).backward(dy)
        assert x.grad is not None
        assert x.grad.isnan().any(1).tolist() == [False, False, True, False]
        assert layer.weight.grad is not None
        assert layer.weight.grad.isnan().all(1).tolist() == [False, True, False, False, False]
    x = torch.randn(0, 6, requires_grad=True)
    layer.weight.grad = None
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_int8_backward_adds_slices_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers below 127 with 127 among them are codes themselves: nothing is lost, whatever the
    slices."""
    monkeypatch.setattr(bitnet.quant, "_TOKENS_PER_SUM", 4)
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (10, 6), generator=generator).float()
    dy = torch.randint(-127, 128, (10, 5), generator=generator).float()
    x[:, 0] = 127
    dy[::4] = dy[1::4] = 127
    dy[8:] = 127
    w = torch.randn(5, 6, generator=generator, requires_grad=True)
    ternary_linear_ste(x, w, int8_backward="both").backward(dy)
    assert w.grad is not None
    assert torch.equal(w.grad, dy.t() @ x)


def test_int8_backward_errors() -> None:
    with pytest.raises(ValueError, match="int8_backward: expected one of none, input, both"):
        BitLinear(4, 4, int8_backward="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int8_backward: 'input' does not go with granularity"):
        BitLinear(4, 4, granularity="group", int8_backward="input")
    with pytest.raises(ValueError, match="int8_backward: 'both' does not go with granularity"):
        ternary_linear_ste(
            torch.ones(1, 4), torch.ones(2, 4), granularity="group", int8_backward="both"
        )


def test_int8_backward_keeps_transposed_codes_only_where_it_wants_them() -> None:
    w = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert quantize_weight(w).transposed is None
    codes, _, transposed = quantize_weight(w, int8_backward="input")
    assert transposed is not None
    assert transposed.is_contiguous()
    assert torch.equal(transposed, codes.t())


def test_int8_backward_inside_the_scope() -> None:
    torch.manual_seed(0)
    layer = BitLinear(24, 8, bias=False, int8_backward="input")
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 8)
    (exact,) = torch.autograd.grad(ternary_linear_ste(x, layer.weight), x, dy)
    with weights_quantized(layer):
        held = layer._valid_cached_codes()
        assert held is not None
        assert held.transposed is not None
        (dx,) = torch.autograd.grad(layer(x), x, dy)
    assert not torch.equal(dx, exact)
    assert (dx - exact).norm() < 0.1 * exact.norm()  # 1/127 of the largest of 8, a rounding


def test_layers_pickled_before_int8_backward() -> None:
    layer = BitLinear(8, 4)
    old = BitLinear.__new__(BitLinear)
    old.__setstate__({k: v for k, v in layer.__getstate__().items() if k != "int8_backward"})
    x = torch.randn(3, 8)
    assert torch.equal(old(x), layer(x))


def test_quantized_with_other_options() -> None:
    x, w = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6)
    with pytest.raises(ValueError, match="quantized: int8_backward 'input' wants `transposed`"):
        ternary_linear_ste(x, w, quantized=quantize_weight(w), int8_backward="input")
    for made, wanted in (("tensor", "row"), ("row", "tensor"), ("group", "row"), ("row", "group")):
        quantized = quantize_weight(w, made)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"quantized: .* for granularity '{wanted}'"):
            ternary_linear_ste(x, w, granularity=wanted, quantized=quantized)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantized: expected codes"):
        ternary_linear_ste(x, w, quantized=quantize_weight(w[:3]))
    # what this backward does not want changes nothing
    quantized = quantize_weight(w, int8_backward="both")
    assert isinstance(quantized, TernaryWeight)
    ours, theirs = ternary_linear_ste(x, w, quantized=quantized), ternary_linear_ste(x, w)
    dy = torch.randn(3, 4)
    assert_same(list(torch.autograd.grad(ours, x, dy)), list(torch.autograd.grad(theirs, x, dy)))


def test_int8_backward_trains() -> None:
    """One batch again and again, as well as exactly; with codes of zero in int8's place the loss
    ends at 0.7 (input) and 1.6 (both)."""
    losses = {}
    for int8_backward in ("none", "input", "both"):
        model = small(int8_backward=int8_backward)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            with weights_quantized(model):
                loss = next_token_loss(model, batch(0))
                loss.backward()
            optimizer.step()
        losses[int8_backward] = loss.item()
    assert losses["none"] < 0.4  # from log(50) = 3.91
    for approximate in ("input", "both"):
        assert losses[approximate] == pytest.approx(losses["none"], abs=0.2)  # seeds: 0.17 to 0.31


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("int8_backward", ["input", "both"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_int8_backward_compiles_whole(int8_backward: Any, granularity: Any) -> None:
    layer = BitLinear(24, 8, granularity=granularity, int8_backward=int8_backward)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


# In 16 bits


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_gamma_is_not_rounded_in_a_backward_of_16_bits(granularity: Any) -> None:
    """bf16 has steps of 2^-7 above 1: gamma = 1 + 38.45 * 2^-7 would lose 2^-8.5 of itself, for all
    tokens alike. Other roundings (2^-9 each) are of either sign and average out over 64 * 64."""
    generator = torch.Generator().manual_seed(0)
    gamma = 1 + 38.45 * 2**-7
    w = gamma * (2.0 * torch.randint(2, (32, 64), generator=generator) - 1)
    x = torch.randn(64, 64, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(64, 32, generator=generator).bfloat16()
    y = ternary_linear_ste(x, w, granularity=granularity)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy.double() @ w.double()
    assert abs((dx.double() * exact).sum() / exact.square().sum() - 1) < 2**-11


def test_a_backward_in_fp16_does_not_overflow() -> None:
    """2048 gradients of 100 sum to 204,800, beyond fp16; times a gamma of 0.01, they do not."""
    w, x = torch.full((2048, 4), 0.01), torch.ones(2, 4).half().requires_grad_()
    for granularity in ("tensor", "row"):
        y = ternary_linear_ste(x, w, granularity=granularity)  # type: ignore[arg-type]
        (dx,) = torch.autograd.grad(y, x, torch.full((2, 2048), 100.0).half())
        torch.testing.assert_close(dx.float(), torch.full((2, 4), 2048.0), rtol=2**-9, atol=0)


def test_fp64_stays_fp64_under_autocast() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert output_dtype(x) == F.linear(x, x).dtype == torch.float64
        assert output_dtype(x.float()) == torch.bfloat16
