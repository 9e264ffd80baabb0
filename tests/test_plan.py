"""Plans for speeds and cells that are made up, so that each figure is known by hand."""

from math import log
from types import SimpleNamespace

import pytest

from bitnet.plan import (
    Cell,
    Fit,
    all_depths,
    at_depth,
    load_study,
    measured_speed,
    nearest,
    propose,
)
from bitnet.presets import presets
from bitnet.schema import UserError

N = 393_216  # depth 2, by hand: 2 layers of 2 (128 x 128) + 2 (64 x 128) + 3 (384 x 128)
SMALL = ("data.vocab_size=1024", "train.batch_tokens=2048", "data.path=no-such-data")
PATHS = [presets()["quickstart"]]  # which sets its layers by itself


def cell(weights: int, per_weight: float) -> Cell:
    return Cell(weights, per_weight, 3, 0.05, 0.04, 0.06, 0.01)


@pytest.mark.parametrize(
    ("weights", "per_weight", "covered"),
    [(N, 5, True), (N, 9.9, True), (N, 10.1, False), (1.9 * N, 2.6, True), (2.1 * N, 5, False),
     (N, 2.4, False)],
)  # fmt: skip
def test_a_study_speaks_for_runs_up_to_a_doubling_beyond_it(
    weights: float, per_weight: float, covered: bool
) -> None:
    assert (nearest([cell(N, 5.0)], weights, weights * per_weight) is not None) == covered


def test_a_study_speaks_for_the_range_between_its_cells() -> None:
    """Cells in two corners: the range is that of sizes and that of tokens per weight."""
    cells = [cell(N, 80.0), cell(8 * N, 5.0)]
    assert nearest(cells, 3 * N, 60 * N) == cells[1]
    assert nearest(cells, 8 * N, 8 * 80 * N) == cells[0]  # three doublings away, not four
    assert nearest(cells, 17 * N, 17 * 20 * N) is None
    assert nearest(cells, 3 * N, 3 * 161 * N) is None


def test_the_nearest_of_two_cells_speaks() -> None:
    cells = [cell(N, 5.0), cell(N, 20.0)]
    assert nearest(cells, N, 9 * N) == cells[0]
    assert nearest(cells, N, 11 * N) == cells[1]


def test_a_depth_wants_twenty_tokens_per_parameter() -> None:
    config = at_depth(PATHS, SMALL, 2)
    model = config.model
    assert model.n_layers == 2
    assert at_depth(PATHS, (*SMALL, "model.n_layers=5"), 2).model.n_layers == 5
    assert model.num_parameters()["matrices"] == N
    total = N + 1024 * 128 + 2 * (3 * 128 + 384) + 128  # embedding, and norms as in sub_norm
    assert config.train.steps == -(-20 * total // 2048)
    assert config.train.tokens == 2048 * config.train.steps


def test_the_largest_depth_that_fits_is_proposed() -> None:
    configs = all_depths(PATHS, SMALL)
    wants = [config.train.steps * config.train.batch_tokens for config in configs]
    hours = wants[2] / 1000 / 3600 / 0.9  # what depth 3 takes at 1,000 tokens per second
    plan = propose(configs, [1000.0] * 4, hours * 1.001)
    assert plan.config.model.depth == 3
    assert plan.measured
    assert plan.hours == pytest.approx(hours)
    assert propose(configs, [1000.0] * 4, hours * 0.999).config.model.depth == 2


def test_depths_beyond_the_measured_ones_have_the_same_flops() -> None:
    configs = all_depths(PATHS, SMALL)
    plan = propose(configs, [1e9, 1e9], 0.05)
    cost = [c.model.flops_per_token(c.data.seq_len) for c in (configs[1], plan.config)]
    assert plan.config.model.depth > 2
    assert not plan.measured
    assert plan.tokens_per_second == pytest.approx(1e9 * cost[0] / cost[1])


def test_given_tokens_set_the_size() -> None:
    configs = all_depths(PATHS, SMALL)
    tokens = configs[2].train.tokens + 5000
    plan = propose(configs, [1e5] * 4, 100.0, tokens)
    assert plan.config.model.depth == 3
    assert plan.config.train.tokens == tokens
    assert plan.config.train.steps == -(-tokens // 2048)


def test_too_short_a_time_is_refused_with_what_it_would_take() -> None:
    configs = all_depths(PATHS, SMALL)
    with pytest.raises(UserError, match=r"--hours 0\.001: is too short; .* at depth 1 take"):
        propose(configs, [1000.0] * 4, 0.001)


def test_a_speed_is_the_median_step_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: steps of 9, 1 and 5 seconds."""
    keys = ("data.seq_len=32", "train.batch_tokens=128", "train.micro_batch=2")
    config = at_depth(PATHS, (*SMALL, *keys), 1)
    ticks = iter((0, 0, 9, 9, 10, 10, 15, 15))
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("bitnet.plan.time", clock)
    assert measured_speed(config, 0.0) == 128 / 5  # of 1 and 5 the upper median


def test_a_fit_predicts_by_doublings() -> None:
    """0.1 at the middle, half per doubling of the weights, 1.5 times per doubling of the tokens per
    weight. The interval by hand: at the middle the constant's variance counts alone; two doublings
    of the tokens and one of the weights away, 0.0009 + 0.0016 of it, times the value squared."""
    covariance = [[0.0009, 0, 0], [0, 0.0016, 0], [0, 0, 0]]
    fit = Fit([log(0.1), log(0.5), log(1.5)], covariance, 0.12, 2.0, (N, 20))
    middle = 2 * (0.12**2 + 0.1**2 * 0.0009) ** 0.5
    assert fit.predict(N, 20 * N) == pytest.approx((0.1, middle))
    away = 0.1 * 0.5 * 1.5  # 2 N weights on 80 N tokens: 40 per weight
    assert fit.predict(2 * N, 80 * N) == pytest.approx(
        (away, 2 * (0.12**2 + away**2 * 0.0025) ** 0.5)
    )


def test_the_package_carries_what_the_study_found() -> None:
    study = load_study()
    assert study.cells
    for one in study.cells:
        assert one.low <= one.gap <= one.high
        tokens = one.weights * one.tokens_per_weight
        assert nearest(study.cells, one.weights, tokens) == one
        fits = [fit for fit in (study.gap, study.bits_per_byte) if fit]
        for value, half in (fit.predict(one.weights, tokens) for fit in fits):
            assert 0 < half < value + 1
