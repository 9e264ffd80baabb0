"""bitnet/quant.py against numpy and the formulas of the BitNet papers, written out here again."""

from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.quant import absmean_ternary, dequantize, quantize_weight, ternary_linear_ste

Granularity = Literal["tensor", "row", "group"]
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row", "group")


def numpy_scales(w: np.ndarray, granularity: str, group_size: int) -> np.ndarray:
    """One scale for every weight, [N, K], in float64."""
    a = np.abs(w.astype(np.float64))
    out = np.empty_like(a)
    if granularity == "tensor":
        out[:] = a.mean()
    elif granularity == "row":
        out[:] = a.mean(1, keepdims=True)
    else:
        for k in range(0, a.shape[1], group_size):
            out[:, k : k + group_size] = a[:, k : k + group_size].mean(1, keepdims=True)
    return np.maximum(out, 1e-5)


def test_absmean_by_hand() -> None:
    # mean|W| = (0.9 + 0.2 + 0.4 + 0.5) / 4 = 0.5, threshold 0.25
    codes, gamma = absmean_ternary(torch.tensor([[0.9, -0.2], [-0.4, 0.5]]))
    assert codes.tolist() == [[1, 0], [-1, 1]]
    assert codes.dtype == torch.int8
    assert gamma.item() == pytest.approx(0.5)
    codes, gamma = absmean_ternary(torch.tensor([[0.9, -0.2], [-0.4, 0.5]]), "row")
    assert gamma.tolist() == pytest.approx([0.55, 0.45])
    assert codes.tolist() == [[1, 0], [-1, 1]]


def test_ties_go_to_zero() -> None:
    # mean|W| = 1 exactly, so +-0.5 sits on the threshold and rounds half to even: 0
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5]])
    assert absmean_ternary(w)[0].tolist() == [[0, 0, 1, -1]]
    assert np.round(w.numpy()).clip(-1, 1).tolist() == [[0.0, 0.0, 1.0, -1.0]]


def test_alpha_moves_the_threshold() -> None:
    w = torch.tensor([[0.6, -0.6, 1.4, -1.4]])  # mean 1
    assert absmean_ternary(w, alpha=0.5)[0].tolist() == [[1, -1, 1, -1]]
    assert absmean_ternary(w, alpha=0.7)[0].tolist() == [[0, 0, 1, -1]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 128), (5, 129), (64, 300)])
def test_absmean_matches_numpy(granularity: Granularity, shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    codes, gamma = absmean_ternary(w, granularity, group_size=32)
    scales = numpy_scales(w.numpy(), granularity, 32)
    # fp32 means differ from float64 ones by rounding; keep weights that are clear of it
    ratio = w.numpy() / scales
    clear = np.abs(np.abs(ratio) - 0.5) > 1e-5
    expected = np.clip(np.round(ratio), -1, 1)
    assert (codes.numpy()[clear] == expected[clear]).all()
    w_hat = dequantize(codes, gamma, 32).numpy()
    np.testing.assert_allclose(w_hat[clear], (expected * scales)[clear], rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 1e30])
@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000, 4097])
def test_gamma_is_the_exact_mean_rounded_once(n: int, scale: float, dtype: torch.dtype) -> None:
    w = (torch.randn(1, n, generator=torch.Generator().manual_seed(n)) * scale).to(dtype)
    (gamma,) = absmean_ternary(w, "row")[1].tolist()
    exact = sum(map(Fraction, w.abs().flatten().tolist())) / n
    lost = exact * Fraction(2) ** (2 * (n - 1).bit_length() - 61) + exact * Fraction(2) ** -52
    bounds = (exact - lost, exact + lost)
    below, above = (max(np.float32(float(b)), np.float32(1e-5)) for b in bounds)
    assert below <= gamma <= above


@pytest.mark.parametrize(
    ("granularity", "shape"), [("tensor", ()), ("row", (0,)), ("group", (0, 2))]
)
def test_a_weight_without_rows_has_codes_and_gamma(
    granularity: Granularity, shape: tuple[int, ...]
) -> None:
    codes, gamma = absmean_ternary(torch.empty(0, 40), granularity, 32)
    assert (codes.shape, codes.dtype) == ((0, 40), torch.int8)
    assert (gamma.shape, gamma.dtype) == (shape, torch.float32)
    assert gamma.isnan().all()


def test_gamma_has_the_same_bits_in_any_order() -> None:
    """As other devices, thread counts and splits among ranks would add."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(61, 333, generator=generator) * torch.logspace(-6, 0, 333)
    flat = w.flatten()
    naive = set()
    for _ in range(20):
        shuffled = flat[torch.randperm(flat.numel(), generator=generator)].view(w.shape)
        assert torch.equal(absmean_ternary(shuffled)[1], absmean_ternary(w)[1])
        naive.add(shuffled.abs().mean().item())
    assert len(naive) > 1  # so that the order does matter to a sum of floats


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own tracing
@pytest.mark.parametrize("k", [20, 33, 130])
def test_short_groups_are_compiled_right(k: int) -> None:
    """torch 2.13 compiles a slice of repeated scales into reads past their end."""

    def scales(w: Tensor) -> tuple[Tensor, ...]:
        codes, gamma = absmean_ternary(w, "group", 32)
        return codes, gamma, dequantize(codes, gamma, 32)

    torch.compiler.reset()
    w = torch.randn(5, k, generator=torch.Generator().manual_seed(k)) * 0.02
    compiled = torch.compile(scales, fullgraph=True)(w)
    for got, want in zip(compiled, scales(w), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own tracing
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_a_weight_of_any_shape_compiles_as_one_graph(
    granularity: Literal["tensor", "row", "group"],
) -> None:
    """Dimensions are symbols, which dynamo (torch 2.13) does not take in every operation."""

    def quantize(weight: Tensor) -> Tensor:
        return dequantize(*absmean_ternary(weight, granularity, 16), 16)

    torch.compiler.reset()
    compiled = torch.compile(quantize, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((3, 65), (7, 33), (5, 16)):
        weight = torch.randn(shape)
        assert torch.equal(compiled(weight), quantize(weight))


def test_zeros_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1000, 1000, generator=generator)
    uniform = torch.rand(1000, 1000, generator=generator) - 0.5
    for w, expected in ((gaussian, 0.3101), (uniform, 0.25)):  # P(|z| < E|z|/2)
        zeros = (absmean_ternary(w)[0] == 0).float().mean().item()
        assert zeros == pytest.approx(expected, abs=0.003)  # 6 sigma of a million draws


def test_absmean_is_not_idempotent() -> None:
    """Why every artefact stores codes and scale: the scale would shrink by mean|codes|."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    codes, gamma = absmean_ternary(w)
    again, shrunk = absmean_ternary(dequantize(codes, gamma))
    assert torch.equal(again, codes)
    share = codes.abs().float().mean()
    assert shrunk.item() == pytest.approx((gamma * share).item(), rel=1e-5)
    assert share < 0.75


def test_all_zero_weights_have_the_smallest_scale() -> None:
    codes, gamma = absmean_ternary(torch.zeros(3, 4))
    assert not codes.any()
    assert gamma.item() == pytest.approx(1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_give_nan(bad: float) -> None:
    w = torch.ones(3, 4)
    w[1, 2] = bad
    assert absmean_ternary(w)[1].isnan()
    assert absmean_ternary(w, "row")[1].isnan().tolist() == [False, True, False]
    y = ternary_linear_ste(torch.ones(2, 4), w, granularity="row")
    assert y.isnan().tolist() == [[False, True, False]] * 2


def numpy_forward(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Quantize, multiply as int64, rescale in float32 in the order of the contract."""
    absmax = np.maximum(np.abs(x).max(1), np.float32(1e-5)).astype(np.float32)
    s_x = (absmax / np.float32(127)).astype(np.float32)
    x_q = np.clip(np.rint(x / s_x[:, None]), -128, 127).astype(np.int64)
    codes, gamma = absmean_ternary(torch.from_numpy(w))
    acc = x_q @ codes.numpy().astype(np.int64).T
    y = acc.astype(np.float32) * s_x[:, None] * gamma.numpy()
    return y if bias is None else y + bias


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (33, 65, 127), (2, 300, 299)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_exact(shape: tuple[int, int, int], with_bias: bool) -> None:
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n)
    x = torch.randn(m, k, generator=generator)
    w = torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator) if with_bias else None
    y = ternary_linear_ste(x, w, bias)
    expected = numpy_forward(x.numpy(), w.numpy(), None if bias is None else bias.numpy())
    assert torch.equal(y, torch.from_numpy(expected))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("mask", "c"), [("none", 1.0), ("clip", 1.2), ("trust", 0.5)])
def test_gradients_are_the_formulas(
    granularity: Granularity, with_bias: bool, mask: Any, c: float
) -> None:
    """docs/quantization.md in float64: dx = dy @ W_hat, dW = dy.T @ x_hat, db = sum dy."""
    generator = torch.Generator().manual_seed(7)
    b, t, n, k, group_size = 2, 5, 11, 37, 16
    x = torch.randn(b, t, k, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(n, k, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(b, t, n, generator=generator, dtype=torch.float64)
    y = ternary_linear_ste(x, w, bias if with_bias else None, granularity, group_size, mask, c)
    assert y.dtype == torch.float64
    y.backward(dy)

    w32, x32 = w.detach().float().numpy(), x.detach().float().numpy().reshape(-1, k)
    scales = numpy_scales(w32, granularity, group_size)
    codes = np.where(w32 > scales / 2, 1.0, 0.0) - np.where(w32 < -scales / 2, 1.0, 0.0)
    w_hat = codes * scales
    s_x = np.maximum(np.abs(x32).max(1, keepdims=True), 1e-5) / 127
    x_hat = np.clip(np.rint(x32 / s_x), -128, 127) * s_x
    g = dy.numpy().reshape(-1, n)
    passes = {
        "none": np.ones_like(w32),
        "clip": np.abs(w32) <= c * scales,
        "trust": np.abs(w32 - w_hat) <= c * scales,
    }[mask]
    assert mask == "none" or 0 < passes.mean() < 1
    # scales are fp32 by contract: each product carries their relative rounding, 2^-23 or so
    tolerance = 1e-6
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy().reshape(-1, k), g @ w_hat, rtol=0, atol=tolerance)
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy(), (g.T @ x_hat) * passes, rtol=0, atol=4 * tolerance)
    if with_bias:
        assert bias.grad is not None
        np.testing.assert_allclose(bias.grad.numpy(), g.sum(0), rtol=1e-6)
    else:
        assert bias.grad is None


def test_gradients_only_where_wanted() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    ternary_linear_ste(x, w).sum().backward()
    assert w.grad is not None
    x.requires_grad_()
    ternary_linear_ste(x, w.detach()).sum().backward()
    assert x.grad is not None


def test_int8_codes_are_kept_for_the_backward() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(64, 32, requires_grad=True)
    w = torch.randn(48, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ternary_linear_ste(x, w)
    large = [tensor for tensor in saved if tensor.numel() > 64]
    assert sorted(tensor.shape[0] for tensor in large) == [48, 64]
    assert {tensor.dtype for tensor in large} == {torch.int8}


def test_autocast_rounds_once() -> None:
    """bf16 autocast changes the output's dtype and nothing before it."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 33, generator=generator)
    w = torch.randn(17, 33, generator=generator, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ternary_linear_ste(x, w)
    assert torch.equal(y, ternary_linear_ste(x, w).to(torch.bfloat16))
    y.float().square().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    exact = torch.autograd.grad(ternary_linear_ste(x, w).square().sum(), w)[0]
    # factors rounded to bf16 (2^-9 each), summed over 9 tokens
    assert (w.grad - exact).norm() <= 2**-7 * exact.norm()


def test_input_errors_name_the_argument() -> None:
    w = torch.randn(5, 4)
    with pytest.raises(TypeError, match="input: expected a floating-point"):
        ternary_linear_ste(torch.ones(2, 4, dtype=torch.int64), w)
    with pytest.raises(ValueError, match=r"input: expected shape \[..., 4\]"):
        ternary_linear_ste(torch.randn(4, 2), w)
    with pytest.raises(ValueError, match="input: expected shape"):
        ternary_linear_ste(torch.tensor(1.0), w)


def test_statistics_are_fp32_whatever_the_dtype() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    codes, gamma = absmean_ternary(w)
    exact_codes, exact_gamma = absmean_ternary(w.float())
    assert gamma.dtype == torch.float32
    assert torch.equal(gamma, exact_gamma)
    assert torch.equal(codes, exact_codes)


def test_bf16_gradients_are_rounded_once() -> None:
    """Small integers are exact in bf16, so what is left is one rounding of each result."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(6, 32, generator=generator)
    bias = torch.zeros(6, requires_grad=True)
    x = torch.randn(1001, 32, generator=generator).bfloat16().requires_grad_()
    dy = torch.randint(-3, 4, (1001, 6), generator=generator).bfloat16()
    dy[:, 0] = 1
    ternary_linear_ste(x, w, bias).backward(dy)
    codes, gamma = absmean_ternary(w)
    assert x.grad is not None
    assert torch.equal(x.grad, ((dy.float() @ codes.float()) * gamma).bfloat16())
    assert bias.grad is not None
    assert torch.equal(bias.grad, dy.float().sum(0))  # 1001 is no bf16


@pytest.mark.parametrize(("mask", "c"), [("clip", 1.0), ("trust", 0.0)])
def test_a_weight_on_the_border_of_the_mask_passes(mask: Any, c: float) -> None:
    w = torch.ones(2, 4, requires_grad=True)  # |W| = gamma = 1, W = W_hat
    ternary_linear_ste(torch.ones(1, 4), w, mask=mask, mask_c=c).sum().backward()
    assert w.grad is not None
    assert (w.grad != 0).all()


def test_errors_name_the_argument() -> None:
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    options: list[tuple[dict[str, Any], str]] = [
        ({"granularity": "rows"}, "granularity: expected one of tensor, row, group, got 'rows'"),
        ({"granularity": "group", "group_size": 0}, "group_size: expected >= 1, got 0"),
        ({"int8_backward": "yes"}, "int8_backward: expected one of"),
        ({"mask": "clips"}, "mask: expected one of none, clip, trust, got 'clips'"),
        ({"mask": "clip", "mask_c": float("nan")}, "mask_c: expected a finite number"),
        ({"mask": "clip", "mask_c": -1.0}, "mask_c: expected a finite number"),
    ]
    for kwargs, message in options:
        with pytest.raises(ValueError, match=f"^{message}"):
            ternary_linear_ste(x, w, **kwargs)
        if "mask" not in kwargs:
            with pytest.raises(ValueError, match=f"^{message}"):
                quantize_weight(w, **kwargs)
    for bad, error, message in (
        (torch.ones(3, 4, dtype=torch.int8), TypeError, "weight: expected a floating-point tensor"),
        (torch.ones(4), ValueError, r"weight: expected shape \[N, K\] with K >= 1, got \[4\]"),
        (torch.ones(3, 0), ValueError, r"weight: expected shape .* got \[3, 0\]"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            ternary_linear_ste(x, bad)
        with pytest.raises(error, match=f"^{message}"):
            quantize_weight(bad)
