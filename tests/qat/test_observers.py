"""bitnet/qat/observers.py against numpy: ranges, freezing, what is not finite, state."""

import copy
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.qat.activations import static_codes, static_range
from bitnet.qat.observers import MeanSquaredError, Observer, make_observer
from bitnet.qat.recipe import ObserverKind, Recipe

KINDS = list(get_args(ObserverKind))
BAD = [math.nan, math.inf, -math.inf]


def observer_of(kind: str, **options: Any) -> Observer:
    return make_observer(Recipe(weights="int", activations="static", observer=kind, **options))


def batches(n: int = 5, seed: int = 0) -> list[Tensor]:
    """Batches of odd shapes, off centre, each wider than the last."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 7, 11 + i, generator=generator) * (1 + i) + 0.5 for i in range(n)]


def shown(observer: Observer, *xs: Tensor) -> Observer:
    for x in xs:
        observer.observe(x)
    return observer


def ends(observer: Observer) -> tuple[float, float]:
    low, high = observer.range()
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == ()
    return low.item(), high.item()


def averaged(ranges: list[tuple[float, float]], momentum: float) -> tuple[float, float]:
    low, high = ranges[0]
    for new_low, new_high in ranges[1:]:
        low = momentum * low + (1 - momentum) * new_low
        high = momentum * high + (1 - momentum) * new_high
    return low, high


def test_minmax_is_the_range_of_all_values() -> None:
    xs = batches()
    everything = np.concatenate([x.numpy().ravel() for x in xs])
    assert ends(shown(observer_of("minmax"), *xs)) == (everything.min(), everything.max())
    # the first batch sets the range: 0 is no value seen
    assert ends(shown(observer_of("minmax"), torch.tensor([3.0, 4.0]))) == (3, 4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_moving_average_is_the_recurrence(momentum: float) -> None:
    xs = batches()
    ranges = [(x.double().min().item(), x.double().max().item()) for x in xs]
    observer = shown(observer_of("moving_average", observer_momentum=momentum), *xs)
    assert ends(observer) == pytest.approx(averaged(ranges, momentum), rel=1e-6)


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.99, 100.0])
def test_percentile_is_numpys_quantile(percentile: float) -> None:
    xs = [*batches(3), torch.tensor([7.0]), torch.arange(201.0)]
    tail = (100 - percentile) / 200
    ranges = []
    for x in xs:
        low = np.quantile(x.numpy(), tail, method="lower")
        high = np.quantile(x.numpy(), 1 - tail, method="higher")
        assert ((x.numpy() >= low) & (x.numpy() <= high)).mean() * 100 >= percentile - 1e-9
        ranges.append((float(low), float(high)))
        one = shown(observer_of("percentile", percentile=percentile), x)
        assert ends(one) == ranges[-1]
    both = observer_of("percentile", percentile=percentile, observer_momentum=0.8)
    assert ends(shown(both, *xs)) == pytest.approx(averaged(ranges, 0.8), rel=1e-6)


def test_percentile_leaves_outliers_out_of_many_values() -> None:
    x = torch.linspace(-1, 1, 100_000)
    x[::25_000] = 1000.0
    low, high = ends(shown(observer_of("percentile"), x))
    assert (low, high) == pytest.approx((-1, 1), abs=1e-3)


def numpy_error(x: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> float:
    """Sum of squared errors of quantization with a range, in float64."""
    half = 2 ** (bits - 1)
    if symmetric:
        scale, zero, lowest = max(-low, high) / (half - 1), 0, 1 - half
    else:
        scale, lowest = (high - low) / (2 * half - 1), -half
        zero = round(-low / scale) - half
    codes = np.clip(np.rint(x / scale) + zero, lowest, half - 1)
    return float(np.square(x - (codes - zero) * scale).sum())


def clipped(x: np.ndarray, clip: float) -> tuple[float, float]:
    return max(-clip, min(x.min(), 0.0)), min(clip, max(x.max(), 0.0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "positive", "negative"])
def test_mse_is_the_best_clip(kind: str, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(40, 100, generator=generator) * 3
    if kind == "outliers":
        x[0, :2] = torch.tensor([-60.0, 80.0])
    elif kind != "gaussian":
        x = x.abs() * (1 if kind == "positive" else -1)
    observer = observer_of("mse", activation_bits=bits, activation_symmetric=symmetric)
    low, high = ends(shown(observer, x))
    values = x.double().numpy()
    found = numpy_error(values, low, high, bits, symmetric)
    best = min(
        numpy_error(values, *clipped(values, clip), bits, symmetric)
        for clip in np.abs(values).max() * np.arange(0.04, 1.0001, 0.005)
    )
    assert found <= best * 1.05  # the candidates are 6% apart
    whole = numpy_error(values, *clipped(values, math.inf), bits, symmetric)
    assert found <= whole * (1 + 1e-6)
    if bits == 4:
        assert found < 0.9 * whole
    if kind == "positive":
        assert low == 0
    if kind == "negative":
        assert high == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_sums_over_batches_of_any_order(symmetric: bool) -> None:
    """The range is about the best for all batches at once, though none is kept, and though the
    candidates move when a batch is wider than those before."""
    xs = [torch.zeros(5), *batches(4), torch.full((3,), 1e-3)]
    values = torch.cat([x.flatten() for x in xs]).double().numpy()
    best = min(
        numpy_error(values, *clipped(values, clip), 4, symmetric)
        for clip in np.abs(values).max() * np.arange(0.04, 1.0001, 0.005)
    )
    for order in (xs, xs[::-1], [*xs[3:], *xs[:3]]):
        observer = observer_of("mse", activation_bits=4, activation_symmetric=symmetric)
        low, high = ends(shown(observer, *order))
        assert numpy_error(values, low, high, 4, symmetric) <= best * 1.06


def test_mse_errors_are_those_of_the_codes() -> None:
    """A later batch within the range adds to every candidate exactly what its codes miss."""
    x, y = batches(2)[1], batches(1)[0]
    observer = MeanSquaredError(6, True)
    for batch in (x, y):
        observer.observe(batch)
    assert y.abs().max() < x.abs().max()
    for i in range(observer.N_CANDIDATES):
        clip = torch.tensor(2.0 ** ((observer.top.item() - i) / observer.PER_OCTAVE))
        expected = 0.0
        for batch in (x, y):
            scale, _ = static_range(torch.tensor(0.0), clip.clamp(max=x.abs().max()), 6, True)
            hat = static_codes(batch, scale, None, 6) * scale
            expected += (batch - hat).double().square().sum().item()
        assert observer.errors[i].item() == pytest.approx(expected, rel=1e-4)


def test_mse_candidates_move_up_with_the_error_of_rounding() -> None:
    observer = MeanSquaredError(8, True)
    x = batches(1)[0]
    observer.observe(x)
    top, errors = observer.top.item(), observer.errors.clone()
    observer.observe(4 * x.abs().amax().reshape(1))  # two octaves up; the highest code hits it
    assert observer.top.item() == top + 2 * observer.PER_OCTAVE
    assert observer.errors[0].item() == pytest.approx(16 * errors[0].item(), rel=1e-6)
    assert observer.errors[12].item() >= 4 * errors[0].item() * (1 - 1e-6)
    assert (observer.errors[24:] >= errors[:-24]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_are_not_seen(kind: str) -> None:
    observer = shown(observer_of(kind), torch.zeros(0, 4))
    assert ends(observer) == (0, 0)
    assert (observer.n_seen.item(), observer.bad.item()) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
def test_a_batch_that_is_not_finite_is_left_out(kind: str, bad: float) -> None:
    x, y, z = batches(3)
    worse = y.clone()
    worse[1, 2, 3] = bad
    expected = shown(observer_of(kind), x, z)
    observer = shown(observer_of(kind), worse)
    assert ends(observer) == (0, 0)
    assert (observer.n_seen.item(), observer.bad.item()) == (0, 1)
    shown(observer, x, worse, z)
    assert (observer.n_seen.item(), observer.bad.item()) == (2, 2)
    for name, value in expected.state_dict().items():
        if name != "bad":
            assert torch.equal(observer.state_dict()[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_observers_do_not_move(kind: str) -> None:
    x, y, z = batches(3)
    observer = shown(observer_of(kind), x)
    before = copy.deepcopy(observer.state_dict())

    def unmoved() -> bool:
        return all(torch.equal(before[k], v) for k, v in observer.state_dict().items())

    observer.frozen = True
    shown(observer, y)
    assert unmoved()
    observer.frozen = False
    shown(observer, z)
    assert not unmoved()
    assert ends(observer) == ends(shown(observer_of(kind), x, z))


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip(kind: str) -> None:
    *first, last = batches(4)
    observer = shown(observer_of(kind), *first)
    again = observer_of(kind)
    again.load_state_dict(observer.state_dict())
    assert ends(again) == ends(observer)
    assert ends(shown(again, last)) == ends(shown(observer, last))
    assert {"low", "high", "n_seen", "bad"} <= observer.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_not_rounded_by_a_cast(kind: str) -> None:
    observer = shown(observer_of(kind), *batches(2))
    before = copy.deepcopy(observer.state_dict())
    for cast in (observer.to(torch.bfloat16), observer.half(), observer.double()):
        for name, value in cast.state_dict().items():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])
    assert observer.to("meta").low.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_constant_batches_are_represented(kind: str) -> None:
    for value in (0.0, 2.5, -2.5, 1e30, 1e-30):
        observer = shown(observer_of(kind), torch.full((4, 5), value), torch.full((3,), value))
        scale, _ = static_range(*observer.range(), 8, True)
        assert scale.isfinite()
        hat = static_codes(torch.tensor(value), scale, None, 8) * scale
        assert hat.item() == pytest.approx(value, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_observed_in_fp32(kind: str, dtype: torch.dtype) -> None:
    xs = [x.to(dtype) for x in batches(2)]
    assert ends(shown(observer_of(kind), *xs)) == ends(
        shown(observer_of(kind), *[x.float() for x in xs])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_observing_reads_no_value_back(kind: str) -> None:
    """On the meta device there is no value to read: whatever waited for one would fail."""
    observer = observer_of(kind).to("meta")
    observer.observe(torch.empty(3, 5, device="meta"))
    observer.observe(torch.empty(3, 5, device="meta"))


def test_inputs_keep_their_graph_and_take_none() -> None:
    x = torch.ones(3, requires_grad=True) * 2
    for kind in KINDS:
        observer = shown(observer_of(kind), x)
        assert not observer.low.requires_grad
    x.sum().backward()
