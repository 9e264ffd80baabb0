"""Quantizers of weights against float64 numpy, written out here again from the papers.

Codes are compared where the float64 value is clear of a decision boundary by more than the fp32
rounding of a statistic; ties have tests by hand. Learned gradients are compared with finite
differences of the function whose rounding is replaced by the addition of a constant.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.export.folder import load_model, read_config, save_model
from bitnet.model import ModelConfig, Transformer, as_transformer
from bitnet.qat.grid import dequantize
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.quantizers import WEIGHT_QUANTIZERS
from bitnet.qat.recipe import Recipe
from bitnet.qat.straight_through import Quantized
from bitnet.quant import absmean_ternary, ternary_linear_ste
from tests.helpers.quantizers import BAD, ends, off_tie, random

KINDS = list(WEIGHT_QUANTIZERS)
LEARNED = [name for name, kind in WEIGHT_QUANTIZERS.items() if kind.learned]
GRANULARITIES = ["tensor", "row", "group"]
SHAPES = [(1, 1), (1, 5), (5, 1), (3, 37), (2, 32), (7, 33)]
GROUP = 16


def recipe_of(kind: str, granularity: str = "row", **options: Any) -> Recipe:
    return Recipe(weights=kind, granularity=granularity, group_size=GROUP, **options)


def blocks(n: int, k: int, granularity: str) -> Iterator[tuple[Any, tuple[slice, slice]]]:
    """Index of a scale, and the weights that it stands for."""
    if granularity == "tensor":
        yield (), (slice(None), slice(None))
        return
    for row in range(n):
        if granularity == "row":
            yield row, (slice(row, row + 1), slice(None))
        else:
            for g in range(-(-k // GROUP)):
                yield (row, g), (slice(row, row + 1), slice(g * GROUP, (g + 1) * GROUP))


def oracle(
    w: np.ndarray, recipe: Recipe, step: float | None
) -> tuple[np.ndarray, float, int | None, np.ndarray]:
    """Codes, scale, zero point of one block in float64, and how far each code is from another."""
    kind, bits, a = recipe.weights, recipe.bits, np.abs(w)
    if kind == "int" and recipe.symmetric:
        scale = max(a.max(), 1e-5) / (2 ** (bits - 1) - 1)
        return np.rint(w / scale), scale, None, off_tie(w / scale)
    if kind == "int":
        low, high = min(w.min(), 0.0), max(w.max(), 0.0)
        scale = max(high - low, 1e-5) / (2**bits - 1)
        zero = int(np.clip(np.rint(-low / scale), 0, 2**bits - 1)) - 2 ** (bits - 1)
        codes = np.clip(np.rint(w / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return codes, scale, zero, np.minimum(off_tie(w / scale), off_tie(np.array(low / scale)))
    if kind in ("absmean", "absmedian", "twn"):
        median = np.sort(a.ravel())[(a.size - 1) // 2]
        statistic = max(median if kind == "absmedian" else a.mean(), 1e-5)
        alpha = 0.7 if kind == "twn" else recipe.alpha
        codes = np.where(a > alpha * statistic, np.sign(w), 0.0)
        if kind == "twn":
            kept = a[a > alpha * statistic]
            scale = max(kept.mean() if kept.size else 0.0, 1e-5)
        else:
            scale = statistic
        return codes, scale, None, np.abs(a / statistic - alpha)
    if kind == "sign":
        return np.where(w >= 0, 1.0, -1.0), max(a.mean(), 1e-5), None, np.ones_like(w)
    assert step is not None
    if kind == "lsq":
        v = w / abs(step)
        codes = np.clip(np.rint(v), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return codes, abs(step), None, off_tie(v)
    levels = np.array([-3, -1, 1, 3] if kind == "seq" else [-1, 0, 1])
    scale = abs(step) * (1 / 4 if kind == "seq" else 2 / 3)
    codes = levels[np.abs(w[..., None] / scale - levels).argmin(-1)].astype(float)  # nearest level
    middles = (levels[1:] + levels[:-1]) / 2
    return codes, scale, None, np.abs(w[..., None] / scale - middles).min(-1)


def step_of(w: Tensor, recipe: Recipe, seed: int = 9) -> Tensor | None:
    if recipe.weights not in LEARNED:
        return None
    step = recipe.quantizer.initial_step(w)
    spread = torch.rand(step.shape, generator=torch.Generator().manual_seed(seed))
    return step * (0.5 + spread)


@pytest.mark.parametrize("kind", [*KINDS, "affine"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_match_numpy(kind: str, granularity: str, shape: tuple[int, int]) -> None:
    affine = kind == "affine"
    for bits in (2, 3, 4, 8) if kind in ("int", "affine", "lsq") else (4,):
        recipe = recipe_of("int" if affine else kind, granularity, bits=bits, symmetric=not affine)
        w = random(*shape, seed=bits, scale=0.02) + 0.01 * affine
        step = step_of(w, recipe)
        quantized = recipe.quantizer.fake_quantize(w, step)
        codes, scale, zero_point, hat = quantized
        n, k = shape
        expected_shape = {"tensor": [], "row": [n], "group": [n, -(-k // GROUP)]}[granularity]
        assert list(scale.shape) == expected_shape
        assert (codes.dtype, scale.dtype, hat.dtype) == (torch.int8, torch.float32, torch.float32)
        assert (zero_point is not None) == affine
        assert codes.shape == hat.shape == w.shape
        lowest, highest = ends(recipe)
        assert lowest <= int(codes.min()) <= int(codes.max()) <= highest
        clear_share = []
        for index, part in blocks(n, k, granularity):
            expected, s, zero, margin = oracle(
                w.double().numpy()[part],
                recipe,
                None if step is None else float(step[index]),
            )
            assert scale[index].item() == pytest.approx(s, rel=1e-6)
            clear = margin > 1e-4
            clear_share.append(clear.mean())
            np.testing.assert_array_equal(codes.numpy()[part][clear], expected[clear])
            if zero_point is not None and clear.any():
                assert zero_point.dtype == torch.int32
                assert zero_point[index].item() == zero
            value = (expected - (zero or 0)) * s
            np.testing.assert_allclose(hat.numpy()[part][clear], value[clear], rtol=2e-6)
        assert np.mean(clear_share) > 0.9 or w.numel() < 8
        # hat is to the bit what the codes say, and the pieces agree with the whole
        assert torch.equal(hat, dequantize(codes, scale, zero_point, GROUP))
        for a, b in zip(recipe.quantizer.quantize(w, step), quantized[:3], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        if kind not in LEARNED:
            found, zero_found = recipe.quantizer.scale(w)
            assert torch.equal(found, scale)
            assert (zero_found is None) == (zero_point is None)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("alpha", [0.5, 0.7])
def test_absmean_is_bitnet(granularity: Any, alpha: float) -> None:
    w = random(9, 37, scale=0.02)
    codes, scale, _ = recipe_of("absmean", granularity, alpha=alpha).quantizer.quantize(w)
    expected_codes, gamma = absmean_ternary(w, granularity, GROUP, alpha)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, gamma)


def test_integer_ties_go_to_even() -> None:
    w = torch.tensor([[3, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scale, _ = recipe_of("int", bits=3).quantizer.quantize(w)
    assert scale.item() == 1
    assert codes.tolist() == [[3, 0, 2, 2, 0, -2, -2]]
    w = torch.tensor([[0.0, 15, 0.5, 1.5, 2.5, 13.5, 14.5]])
    codes, scale, zero_point = recipe_of("int", bits=4, symmetric=False).quantizer.quantize(w)
    assert (scale.item(), zero_point) == (1, torch.tensor([-8]))
    assert (codes + 8).tolist() == [[0, 15, 0, 2, 2, 14, 14]]
    w = torch.tensor([[0.5, 1.5, -0.5, -1.5, -2.5, 9.0, -9.0]])
    codes, _, _ = recipe_of("lsq", bits=3).quantizer.quantize(w, torch.ones(1))
    assert codes.tolist() == [[0, 2, 0, -2, -2, 3, -4]]


def test_borders_of_the_other_quantizers() -> None:
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5]])  # mean 1: what is on the threshold is 0
    assert recipe_of("absmean").quantizer.quantize(w)[0].tolist() == [[0, 0, 1, -1]]
    w = torch.tensor([[1.0, -1.0, 0.5, -0.5, 7.0]])  # median 1
    codes, scale, _ = recipe_of("absmedian").quantizer.quantize(w)
    assert (codes.tolist(), scale.item()) == ([[1, -1, 0, 0, 1]], 1)
    w = torch.tensor([[0.0, -0.0, 2.0, -6.0]])
    codes, scale, _ = recipe_of("sign").quantizer.quantize(w)
    assert (codes.tolist(), scale.item()) == ([[1, 1, 1, -1]], 2)
    # mean 1, threshold 0.7; the kept ones have the mean 1.75
    codes, scale, _ = recipe_of("twn").quantizer.quantize(torch.tensor([[0.25, -0.25, 1.5, -2.0]]))
    assert (codes.tolist(), scale.item()) == ([[0, 0, 1, -1]], 1.75)
    # round(2 W / alpha - 0.5): 0 -> -0.5 -> 0, 0.5 -> 0.5 -> 0, -0.5 -> -1.5 -> -2; level = +0.5
    w = torch.tensor([[0.0, 2.0, -2.0, 1.0, -1.0, 4.0, -4.0, 99.0]])
    codes, scale, _ = recipe_of("seq").quantizer.quantize(w, torch.tensor([4.0]))
    assert (codes.tolist(), scale.item()) == ([[1, 1, -3, 1, -1, 3, -3, 3]], 1)
    codes, scale, _ = recipe_of("seq_ternary").quantizer.quantize(w, torch.tensor([3.0]))
    assert (codes.tolist(), scale.item()) == ([[0, 1, -1, 0, 0, 1, -1, 1]], 2)


@pytest.mark.parametrize(
    ("kind", "levels", "storage_bits", "weight_bits"),
    [
        ("absmean", [-1, 0, 1], 2, 1.58),
        ("absmedian", [-1, 0, 1], 2, 1.58),
        ("twn", [-1, 0, 1], 2, 1.58),
        ("seq_ternary", [-1, 0, 1], 2, 1.58),
        ("sign", [-1, 1], 1, 1),
        ("seq", [-3, -1, 1, 3], 2, 2),
    ],
)
def test_levels_and_bits_by_hand(
    kind: str, levels: list[int], storage_bits: int, weight_bits: float
) -> None:
    quantizer = recipe_of(kind, bits=8).quantizer
    assert list(quantizer.levels) == levels
    assert (quantizer.storage_bits, quantizer.weight_bits) == (storage_bits, weight_bits)
    assert quantizer.ternary == (weight_bits == 1.58)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_of_integers(bits: int) -> None:
    affine = recipe_of("int", bits=bits, symmetric=False)
    for recipe in (recipe_of("int", bits=bits), affine, recipe_of("lsq", bits=bits)):
        quantizer = recipe.quantizer
        assert (quantizer.storage_bits, quantizer.weight_bits) == (bits, bits)
        assert not quantizer.ternary
        assert quantizer.affine == (recipe is affine)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ranges_of_codes_by_hand(bits: int) -> None:
    half = 2 ** (bits - 1)
    assert ends(recipe_of("int", bits=bits)) == (1 - half, half - 1)
    assert ends(recipe_of("int", bits=bits, symmetric=False)) == (-half, half - 1)
    assert ends(recipe_of("lsq", bits=bits)) == (-half, half - 1)
    assert ends(recipe_of("seq", bits=bits)) == (-3, 3)
    for kind in ("absmean", "absmedian", "twn", "sign", "seq_ternary"):
        assert ends(recipe_of(kind, bits=bits)) == (-1, 1)


def test_initial_steps_by_hand() -> None:
    w = torch.tensor([[1.0, -2, 3], [4, 5, -6]])
    lsq = recipe_of("lsq", bits=4).quantizer.initial_step(w)
    assert lsq.tolist() == pytest.approx([2 * 2 / math.sqrt(7), 2 * 5 / math.sqrt(7)])
    assert recipe_of("lsq", "tensor", bits=2).quantizer.initial_step(w).item() == pytest.approx(7)
    assert recipe_of("seq", "tensor").quantizer.initial_step(w).item() == 6
    assert recipe_of("seq_ternary").quantizer.initial_step(w).tolist() == [3, 6]
    assert recipe_of("lsq", "group").quantizer.initial_step(random(2, 37)).shape == (2, 3)


@pytest.mark.parametrize("kind", [*KINDS, "affine"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_and_constants_are_finite(kind: str, granularity: str) -> None:
    recipe = recipe_of("int" if kind == "affine" else kind, granularity, symmetric=kind != "affine")
    for value in (0.0, 3.0, -3.0, 1e-30):
        w = torch.full((3, 20), value)
        step = recipe.quantizer.initial_step(w) if kind in LEARNED else None
        _, scale, _, hat = recipe.quantizer.fake_quantize(w, step)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        if abs(value) < 1:
            assert hat.abs().max() <= 1e-5
        elif kind not in ("lsq", "seq", "seq_ternary"):
            assert torch.allclose(hat, w)  # a constant is a level of every found grid


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", [*KINDS, "affine"])
def test_weights_that_are_not_finite_give_nan(kind: str, bad: float) -> None:
    recipe = recipe_of("int" if kind == "affine" else kind, "group", symmetric=kind != "affine")
    w = random(3, 37)
    step = recipe.quantizer.initial_step(w) if kind in LEARNED else None
    w[1, 20] = bad
    _, scale, _, hat = recipe.quantizer.fake_quantize(w, step)
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(scale.isnan(), expected)
    assert torch.equal(hat.isnan(), expected.repeat_interleave(GROUP, 1)[:, :37])
    if kind in LEARNED:
        assert torch.equal(recipe.quantizer.initial_step(w).isnan(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_do_not_depend_on_the_dtype(kind: str, dtype: torch.dtype) -> None:
    """Statistics and codes are those of the fp32 values; the value is rounded once.

    absmean averages fp64 weights in fp64: a mean in fp32 has up to GROUP roundings more.
    """
    w = random(5, 37).to(dtype)
    recipe = recipe_of(kind, "group")
    step = step_of(w, recipe)
    exact = recipe.quantizer.fake_quantize(w.float(), step)
    w.requires_grad_()
    quantized = recipe.quantizer.fake_quantize(w, step)
    assert torch.equal(quantized.codes, exact.codes)
    roundings = GROUP if dtype == torch.float64 else 0
    torch.testing.assert_close(quantized.scale, exact.scale, rtol=roundings * 2**-24, atol=0.0)
    value = dequantize(quantized.codes, quantized.scale, quantized.zero_point, GROUP)
    assert torch.equal(quantized.hat, value.to(dtype))
    quantized.hat.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == dtype


def test_views_are_quantized_as_their_values() -> None:
    w = random(37, 6).t()
    for kind in KINDS:
        recipe = recipe_of(kind, "group")
        step = step_of(w, recipe)
        assert torch.equal(
            recipe.quantizer.quantize(w, step)[0],
            recipe.quantizer.quantize(w.contiguous(), step)[0],
        )


def expand(per_scale: Tensor, shape: tuple[int, int], granularity: str) -> np.ndarray:
    out = np.empty(shape)
    for index, part in blocks(*shape, granularity):
        out[part] = float(per_scale[index])
    return out


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("kind", "bits", "n_levels", "shift"),
    [("lsq", 2, 0, 0), ("lsq", 4, 0, 0), ("seq", 4, 2, 0.5), ("seq_ternary", 4, 1.5, 0)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_learned_gradients_are_finite_differences(
    kind: str, bits: int, n_levels: float, shift: float, granularity: str, sign: int
) -> None:
    shape = (5, 37)
    recipe = recipe_of(kind, granularity, bits=bits)
    w = random(*shape, seed=1)
    start = step_of(w, recipe)
    assert start is not None
    start = start * {2: 0.6, 4: 0.3}[bits] if kind == "lsq" else start * 0.4  # both ends saturate
    w0, s0 = w.double().numpy(), expand(start, shape, granularity)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def grid(w: np.ndarray, s: np.ndarray) -> np.ndarray:
        """What is rounded: W on the grid of the paper, clipped."""
        if kind == "lsq":
            return np.clip(w / s, lowest, highest)
        return np.clip(w / s, -0.99, 0.99) * n_levels - shift

    constant = np.rint(grid(w0, s0)) - grid(w0, s0)

    def surrogate(w: np.ndarray, s: np.ndarray) -> np.ndarray:
        rounded = grid(w, s) + constant
        return rounded * s if kind == "lsq" else s * (rounded + shift) / n_levels

    step = (sign * start).requires_grad_()  # the scale is |step|
    w.requires_grad_()
    hat = recipe.quantizer.fake_quantize(w, step).hat
    np.testing.assert_allclose(hat.detach().numpy(), surrogate(w0, s0), rtol=1e-6, atol=1e-7)
    dy = random(*shape, seed=2)
    hat.backward(dy)

    h = 1e-6
    dw = (surrogate(w0 + h, s0) - surrogate(w0 - h, s0)) / (2 * h)
    assert 0.02 < (np.abs(dw) < 0.5).mean() < 0.8
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy(), dw * dy.numpy(), rtol=1e-5, atol=1e-8)
    ds = (surrogate(w0, s0 + h) - surrogate(w0, s0 - h)) / (2 * h) * dy.double().numpy()
    top = {"lsq": highest, "seq": 3 / 4, "seq_ternary": 2 / 3}[kind]
    assert step.grad is not None
    assert step.grad.shape == step.shape
    for index, part in blocks(*shape, granularity):
        g = 1 / math.sqrt(ds[part].size * top)
        expected = sign * g * ds[part].sum()
        assert step.grad[index].item() == pytest.approx(expected, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("kind", LEARNED)
def test_a_step_at_zero_recovers(kind: str) -> None:
    """Below the floor the scale stays, and the gradient says that a larger one would be better."""
    w, recipe = random(4, 16), recipe_of(kind)
    step = torch.tensor([0.0, 1e-12, -1e-12, -0.0]).requires_grad_()
    _, scale, _, hat = recipe.quantizer.fake_quantize(w, step)
    assert (scale > 0).all()
    assert hat.isfinite().all()
    (hat - w).square().sum().backward()
    assert step.grad is not None
    moved = step.detach() - step.grad
    assert (moved.abs() > 1e-3).all()


def test_a_step_that_is_not_finite_gives_nan() -> None:
    for bad in BAD:
        step = torch.tensor([1.0, bad])
        scale = recipe_of("lsq").quantizer.quantize(random(2, 8), step)[1]
        assert scale.isnan().tolist() == [False, True]


def passes(quantized: Quantized, w: Tensor) -> np.ndarray:
    """Where a gradient of 1 arrives."""
    (gradient,) = torch.autograd.grad(quantized.hat.sum(), w)
    assert set(gradient.unique().tolist()) <= {0.0, 1.0}
    return gradient.numpy() == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_masks(kind: str, granularity: str) -> None:
    w = random(5, 37, seed=3)
    free = recipe_of(kind, granularity)
    step = step_of(w, free)
    w.requires_grad_()
    plain = free.quantizer.fake_quantize(w, step)
    everywhere = passes(plain, w)
    if kind not in LEARNED:
        assert everywhere.all()
    w0, scale = w.detach().numpy(), expand(plain.scale, (5, 37), granularity)
    for c in (0.3, 0.5, 1.2):
        trust = recipe_of(kind, granularity, grad_mask="trust", grad_mask_c=c)
        error = np.abs(w0 - plain.hat.detach().numpy())
        expected = everywhere & (error <= c * scale)
        assert (passes(trust.quantizer.fake_quantize(w, step), w) == expected).mean() > 0.99
        clip = recipe_of(kind, granularity, grad_mask="clip", grad_mask_c=c)
        got = passes(clip.quantizer.fake_quantize(w, step), w)
        if kind in LEARNED or kind == "int":  # a grid from the maximum saturates nowhere
            assert (got == everywhere).all()
        else:
            assert (got == (np.abs(w0) <= c * scale)).all()


def test_an_affine_grid_clips_what_its_zero_point_pushed_out() -> None:
    """Low -1.5 and high 1.5 of 2 bits: scale 1, -low rounds to 2, so the codes end at 1."""
    w = torch.tensor([[-1.5, -0.5, 0.4, 1.5]], requires_grad=True)
    recipe = recipe_of("int", bits=2, symmetric=False, grad_mask="clip")
    quantized = recipe.quantizer.fake_quantize(w)
    assert (quantized.scale.item(), quantized.zero_point) == (1, torch.tensor([0]))
    assert quantized.codes.tolist() == [[-2, 0, 0, 1]]
    assert passes(quantized, w).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("mask", "c"), [("none", 1.0), ("clip", 1.2), ("trust", 0.5)])
def test_masks_are_those_of_bitlinear(granularity: Any, mask: Any, c: float) -> None:
    w = random(11, 37, seed=4).requires_grad_()
    recipe = recipe_of("absmean", granularity, grad_mask=mask, grad_mask_c=c)
    got = passes(recipe.quantizer.fake_quantize(w), w)
    y = ternary_linear_ste(torch.ones(1, 37), w, None, granularity, GROUP, mask, c)
    (gradient,) = torch.autograd.grad(y.sum(), w)
    assert ((gradient != 0).numpy() == got).all()


def test_codes_under_a_given_scale() -> None:
    w = random(6, 40, seed=5)
    for symmetric in (True, False):
        recipe = recipe_of("int", "group", bits=3, symmetric=symmetric)
        codes, scale, zero_point = recipe.quantizer.quantize(w)
        assert torch.equal(recipe.quantizer.codes(w, scale, zero_point), codes)
        for column in (0, 15, 16, 39):  # one column at a time, as GPTQ goes
            g = column // GROUP
            zero = None if zero_point is None else zero_point[:, g]
            one = recipe.quantizer.codes(w[:, column : column + 1], scale[:, g], zero)
            assert torch.equal(one, codes[:, column : column + 1])
    recipe = recipe_of("absmean", "tensor", alpha=0.6)
    codes, scale, _ = recipe.quantizer.quantize(w)
    assert torch.equal(recipe.quantizer.codes(w[:, 3:9], scale, None), codes[:, 3:9])
    # smaller than the maximum wants: it saturates
    assert recipe_of("int", bits=3).quantizer.codes(w * 9, torch.tensor(0.1), None).max() == 3


def test_the_guide_adds_a_quantizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The code of docs/qat.md as it stands there; then a language model in a folder."""
    guide = Path(__file__).parents[2] / "docs" / "qat.md"
    section = guide.read_text(encoding="utf-8").partition("\n## Add a quantizer\n")[2]
    blocks = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.setattr("bitnet.qat.recipe.WEIGHT_QUANTIZERS", names := dict(WEIGHT_QUANTIZERS))
    monkeypatch.setattr("bitnet.qat.quantizers.WEIGHT_QUANTIZERS", names)
    space: dict[str, Any] = {"__name__": "guide"}
    exec("\n".join(blocks), space)
    assert space["losses"][-1] < 0.9 * space["losses"][0]

    recipe = Recipe(weights="sign_median", granularity="group", group_size=16)
    w = random(5, 32)
    codes, scale, _ = recipe.quantizer.quantize(w)
    sorted_magnitudes = w.abs().unflatten(1, (2, 16)).sort(-1).values
    assert torch.equal(scale, sorted_magnitudes[..., 7])  # the lower of the middle two
    assert torch.equal(codes, torch.where(w >= 0, 1, -1))
    config = ModelConfig(depth=1, linear="fp", vocab_size=300, max_seq_len=16)
    model = as_transformer(prepare(Transformer(config), recipe)).eval()
    tokens = torch.randint(300, (2, 9))
    expected = model(tokens)
    integer = as_transformer(convert(model))
    loaded = load_model(save_model(tmp_path / "model", integer, None, recipe)).eval()
    assert torch.equal(loaded(tokens), expected)
    assert read_config(tmp_path / "model").quant.quantizer.storage_bits == 1


def test_codes_and_scales_carry_no_gradient() -> None:
    w = random(4, 8).requires_grad_()
    for kind in KINDS:
        recipe = recipe_of(kind)
        step = step_of(w, recipe)
        step = None if step is None else step.requires_grad_()
        quantized = recipe.quantizer.fake_quantize(w, step)
        assert not quantized.codes.requires_grad
        assert not quantized.scale.requires_grad
        assert quantized.hat.requires_grad


def test_weight_errors_name_the_argument() -> None:
    w = random(4, 8)
    with pytest.raises(ValueError, match=r"weight: expected a non-empty \[N, K\], got \[4, 0\]"):
        recipe_of("int").quantizer.quantize(w[:, :0])
    for kind in KINDS:
        recipe = recipe_of(kind)
        step = torch.ones(0) if kind in LEARNED else None
        with pytest.raises(
            ValueError, match=r"weight: expected a non-empty \[N, K\], got \[0, 8\]"
        ):
            recipe.quantizer.quantize(w[:0], step)
    with pytest.raises(ValueError, match="weight: expected a non-empty"):
        recipe_of("absmean").quantizer.quantize(w[0])
    with pytest.raises(TypeError, match="weight: expected a floating-point tensor"):
        recipe_of("int").quantizer.quantize(w.long())
    with pytest.raises(ValueError, match="step: expected for the learned"):
        recipe_of("lsq").quantizer.quantize(w)
    with pytest.raises(ValueError, match="step: expected for the learned"):
        recipe_of("int").quantizer.quantize(w, torch.ones(4))
    with pytest.raises(ValueError, match=r"step: expected shape \[4\], got \[\]"):
        recipe_of("lsq").quantizer.quantize(w, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^Int has no learned scale"):
        recipe_of("int").quantizer.initial_step(w)
    with pytest.raises(ValueError, match="recipe: weights 'none' have no quantizer"):
        _ = recipe_of("none").quantizer
    with pytest.raises(ValueError, match=r"expected 'none', 'int', .* the nearest is 'absmean' "):
        recipe_of("absmeen")


def test_lists_may_be_tuples_in_python() -> None:
    recipe = Recipe(weights="int", modules=("linear", "embedding"), skip=("head",))  # type: ignore[arg-type]
    assert (recipe.modules, recipe.skip) == (["linear", "embedding"], ["head"])
