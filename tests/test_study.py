"""The studies of docs/results: what they search, which runs they choose, what they draw."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(RESULTS)
    import overlap

    return overlap


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(RESULTS)
    import scaling

    return scaling


def noise(dice: random.Random, characters: int) -> str:
    return "".join(dice.choice("abcdefghij klmnop.é") for _ in range(characters))


def test_the_search_finds_planted_runs_and_nothing_else(overlap: Any) -> None:
    """Runs of 200 to 900 characters at any place, across edges of blocks; 150 are too few."""
    dice = random.Random(0)
    held = [overlap.normalized(noise(dice, n)) for n in (5000, 150, 3001, 4000)]
    train = [overlap.normalized(noise(dice, 7000)) for _ in range(6)]
    planted = [(0, 2, 311, 200), (2, 4, 1777, 650), (0, 5, 3900, 900), (3, 1, 57, 150)]
    for document, at, start, length in planted:
        text = held[document][start : start + length]
        train[at] = f"{train[at][:1234]}#{text}#{train[at][1234:]}"
    report = overlap.search(train, held)
    found = {(f.held_out, f.train, f.start, f.length) for f in report.shared}
    # blanks at the ends of a run are where neighbours may agree, too: the marks prevent it
    assert found == set(planted[:3])
    assert report.affected() == [0, 2]
    assert report.same_documents == []
    assert (report.train_documents, report.held_out_documents) == (6, 4)


def test_the_search_finds_a_document_in_other_case_and_lines(overlap: Any) -> None:
    dice = random.Random(1)
    held = [noise(dice, 90), noise(dice, 600)]
    report = overlap.search([held[0].upper().replace(" ", "\n\n")], held)
    assert (report.same_documents, report.shared) == ([0], [])


def test_a_text_that_repeats_itself_is_searched_too(overlap: Any) -> None:
    report = overlap.search(["ab " * 400], ["ab " * 200, "xy " * 200])
    assert report.affected() == [0]
    assert max(found.length for found in report.shared) == len("ab " * 200) - 1


def row(
    scaling: Any, arm: str, size: str, per_weight: float, lr: float, loss: float, seed: int = 0
) -> dict[str, str]:
    tokens = str(scaling.tokens_for(size, per_weight))
    values = {"arm": arm, "size": size, "tokens": tokens, "lr": lr, "seed": seed, "commit": "x"}
    values |= {"loss": repr(loss), "bits_per_byte": repr(loss)}
    return {key: str(value) for key, value in values.items()}


def test_a_sweep_ends_where_a_quarter_half_and_twice_the_best_rate_are_worse(scaling: Any) -> None:
    """Losses with a minimum at 0.01, from a start at 0.04, which is better than its half."""
    losses = {0.08: 3.3, 0.04: 3.0, 0.02: 3.1, 0.01: 2.9, 0.005: 3.2, 0.0025: 3.4}
    found: dict[float, float] = {}
    asked = []
    while (lr := scaling.next_rate(found, 0.04)) is not None:
        asked.append(lr)
        found[lr] = losses[lr]
    assert asked == [0.04, 0.02, 0.01, 0.005, 0.0025]
    assert scaling.next_rate({0.04: 3.0, 0.02: 3.1, 0.01: 3.1}, 0.04) == 0.08  # now twice
    assert scaling.best_of(found, 0.04) == 0.01


def test_a_cell_is_swept_from_the_best_rate_of_the_one_below(scaling: Any) -> None:
    """0.1M weights and 20 tokens each come first, then 0.4M and 5, then 0.1M and 80."""
    small, middle = scaling.tokens_for("0.1M", 20), scaling.tokens_for("0.4M", 5)

    def asked(size: str, tokens: int) -> set[tuple[str, float, int]]:
        wanted = scaling.jobs(of)
        return {(j.arm, j.lr, j.seed) for j in wanted if (j.size, j.tokens) == (size, tokens)}

    of: list[dict[str, str]] = []
    assert asked("0.1M", small) == {("fp", 0.04, 0), ("ternary", 0.04, 0)}
    rates = (0.005, 0.01, 0.02, 0.04)
    of += [row(scaling, "fp", "0.1M", 20, lr, abs(lr - 0.02)) for lr in rates]
    seeds = {("fp", 0.02, seed) for seed in range(3)}
    assert asked("0.1M", small) == {("ternary", 0.04, 0)} | seeds
    assert asked("0.4M", middle) == {("ternary", 0.04, 0), ("fp", 0.02, 0)}
    of.append(row(scaling, "fp", "0.4M", 5, 0.02, 3.0))
    assert asked("0.4M", middle) == {("ternary", 0.04, 0), ("fp", 0.01, 0)}
    of += [row(scaling, "fp", "0.4M", 5, lr, 2.9 + (lr < 0.01)) for lr in (0.01, 0.005, 0.0025)]
    assert {("fp", 0.01, 1), ("fp", 0.01, 2)} < asked("0.4M", middle)
    assert ("fp", 0.01, 0) in asked("0.1M", scaling.tokens_for("0.1M", 80))


def test_a_run_has_whole_steps_and_the_tokens_of_its_size(scaling: Any) -> None:
    words = scaling.job("fp", "1.2M", 5.0, 0.01, 2).words()
    steps = next(int(word.partition("=")[2]) for word in words if word.startswith("train.steps"))
    assert steps * 2048 == scaling.tokens_for("1.2M", 5.0)
    assert 0 <= steps * 2048 - 5 * 1_179_648 < 2048
    assert {"model.depth=3", "model.linear=fp", "optim.muon_lr=0.01", "run.seed=2"} < set(words)


def test_the_plan_knows_the_batch_of_the_study(scaling: Any) -> None:
    from bitnet.plan import STUDY_BATCH

    assert scaling.BATCH == STUDY_BATCH


def test_the_sizes_are_those_of_the_configs(scaling: Any) -> None:
    import study

    from bitnet.config import load_config

    for size, weights in study.WEIGHTS.items():
        options = [*study.SHAPE[size], "model.vocab_size=1024", "model.max_seq_len=256"]
        config = load_config([study.ROOT / study.CONFIG], options).model.resolve()
        assert config.num_parameters()["matrices"] == weights


def test_models_of_equal_bytes_differ_by_two_percent_at_most(
    scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes worked out from the shapes of a layer: attention, gate, up and down."""
    monkeypatch.syspath_prepend(RESULTS)
    import equal_bytes

    def total(d: int, kv: int, ff: int, bits: float, scales: int) -> float:
        matrices = 2 * (2 * d * d + 2 * d * kv + 3 * d * ff)
        return matrices * bits / 8 + 2 * 1024 * d + 4 * scales

    assert "model.d_model=104" in equal_bytes.INT4
    ternary = total(128, 64, 384, 1.6, 14)
    int4 = total(104, 26, 296, 4, 2 * (3 * 104 + 2 * 26 + 2 * 296))
    assert abs(int4 / ternary - 1) < 0.02
    assert abs(total(64, 64, 192, 16, 0) / ternary - 1) < 0.02


def test_a_difference_within_the_spread_of_seeds_is_called_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(RESULTS)
    import ablations

    assert ablations.reading([-0.02, 0.01, 0.03], 0.005) == "smaller than the spread of seeds"
    assert ablations.reading([0.01, 0.012, 0.013], 0.02) == "smaller than the spread of seeds"
    assert ablations.reading([0.03, 0.04, 0.05], 0.02) == "worse"
    assert ablations.reading([-0.05, -0.04, -0.03], 0.02) == "better"
    assert ablations.reading([-0.05, -0.04], 0.02) == "too few seeds"


def test_stochastic_rounding_keeps_the_mean_and_bf16_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neighbours of 1.001 in bf16 are 1 and 1 + 2^-7."""
    import torch

    monkeypatch.syspath_prepend(RESULTS)
    import bf16_latents

    generator = torch.Generator().manual_seed(0)
    value = torch.full((100_001,), 1.001, dtype=torch.float32, device="cpu")
    for sign in (1, -1):
        found = bf16_latents.rounded(sign * value, generator)
        assert set(found.unique().tolist()) == {sign * 1.0, sign * (1 + 2**-7)}
        assert abs(float(found.double().mean()) - sign * 1.001) < 1e-4
    exact = value.bfloat16().float()
    assert torch.equal(bf16_latents.rounded(exact, generator), exact)


def made_up(scaling: Any, gap: Any) -> list[dict[str, str]]:
    """Rows of both arms, in which ternary loses what ``gap(weights, tokens per weight, seed)``
    says; 0.02 is the best rate."""
    found = []
    for size, per_weight in (("0.1M", 20), ("0.1M", 80), ("0.4M", 5), ("0.4M", 20), ("1.2M", 5)):
        for arm in scaling.ARMS:
            for lr in (0.005, 0.01, 0.02, 0.04):
                for seed in range(3) if lr == 0.02 else range(1):
                    loss = 3.0 + 0.1 * seed + (lr != 0.02)
                    if arm == "ternary":
                        loss += gap(scaling.WEIGHTS[size], per_weight, seed)
                    found.append(row(scaling, arm, size, per_weight, lr, loss, seed))
    return found


def test_a_fit_finds_the_powers_that_were_put_in(scaling: Any) -> None:
    def gap(weights: int, per_weight: float, _: int) -> float:
        return float(0.1 * (weights / 393_216) ** -0.5 * (per_weight / 20) ** 0.25)

    points = scaling.cells(made_up(scaling, gap))
    assert all(cell.measured for cell in points)
    gaps = [cell.gaps() for cell in points]
    found = scaling.fit(points, gaps)
    wanted = [math.log(0.1), -0.5 * math.log(2), 0.25 * math.log(2)]
    assert found["coefficients"] == pytest.approx(wanted, abs=2e-3)
    assert found["deviation"] < 2e-4  # tokens come in whole steps, so 5.01 per weight
    assert scaling.fit(points[:4], gaps[:4]) is None  # four cells: too few
    assert scaling.fit([points[0]] * 6, [gaps[0]] * 6) is None  # six in one place


def test_a_fit_is_the_least_squares_of_values_and_not_of_logarithms(scaling: Any) -> None:
    """Gaps near 0 and below have no logarithm. Nudging a coefficient either way adds error."""
    points = scaling.cells(made_up(scaling, lambda n, d, seed: 0.1))
    gaps = [[0.11, 0.12, 0.10], [0.13], [0.012, -0.001, 0.02], [0.02], [-0.004]]
    means = np.array([sum(g) / len(g) for g in gaps])
    found = scaling.fit(points, gaps)
    x, best = scaling.design(points), np.array(found["coefficients"])

    def error(c: Any) -> float:
        return float(((np.exp(x @ c) - means) ** 2).sum())

    for i in range(3):
        for nudge in (-1e-2, 1e-2):
            assert error(best + nudge * np.eye(3)[i]) > error(best)
    assert found["deviation"] ** 2 >= error(best) / 2 * 0.999


def test_a_fit_is_as_unsure_as_its_seeds(scaling: Any) -> None:
    """Equal gaps of 0.1, with seeds at -e, 0, +e: their spread is e, that of the mean of three
    e / sqrt 3, and the covariance that of least squares on exp(x c), e^2 / 3 / 0.1^2 (X'X)^-1."""
    points = scaling.cells(made_up(scaling, lambda n, d, seed: 0.1 + 0.01 * (seed - 1)))
    found = scaling.fit(points, [cell.gaps() for cell in points])
    assert found["deviation"] == pytest.approx(0.01 / math.sqrt(3))
    assert found["t"] == 4.303  # five cells, three coefficients
    at = [(math.log2(one.weights / 393_216), math.log2(one.per_weight / 20)) for one in points]
    x = np.array([(1, *place) for place in at])
    wanted = np.linalg.inv(x.T @ x) * 1e-4 / 3 / 0.1**2
    assert np.array(found["covariance"]) == pytest.approx(wanted)


def test_intervals_hold_as_often_as_they_say(scaling: Any) -> None:
    """500 studies whose cells scatter around a value: a new cell lies in 95% of the intervals that
    `bitnet plan` would name, 475; the standard deviation of that count is 5."""
    from bitnet.plan import Fit

    dice = np.random.default_rng(0)
    points = scaling.cells(made_up(scaling, lambda n, d, seed: 0.1))
    hits = 0
    for _ in range(500):
        seeds = [[float(value)] * 3 for value in 2 + 0.02 * dice.normal(size=len(points))]
        found = Fit(**scaling.fit(points, seeds), at=scaling.AT)
        value, half = found.predict(786_432, 15 * 786_432)
        hits += abs(2 + 0.02 * dice.normal() - value) <= half
    assert abs(hits - 475) < 22


def test_the_published_fits_are_those_of_the_papers(scaling: Any) -> None:
    """TriLM's abstract and table: 10% at 99M parameters and 8% at 3.9B."""
    for weights, percent in ((99e6, 10), (3.9e9, 8)):
        ternary, full = scaling.trilm(weights)
        assert round(100 * (ternary / full - 1)) == percent


def test_a_cell_has_the_best_rate_that_was_tried_there(scaling: Any) -> None:
    """The baseline is better at half the rate, with one seed so far."""
    rows = [
        row(scaling, arm, "0.1M", 80.0, 0.04, 2.9, seed) for arm in scaling.ARMS for seed in (0, 1)
    ]
    (found,) = scaling.cells(rows)
    assert (found.fp, found.ternary, found.tuned) == ([2.9, 2.9], [2.9, 2.9], False)
    rows.append(row(scaling, "fp", "0.1M", 80.0, 0.02, 2.8))
    (found,) = scaling.cells(rows)
    assert (found.fp, found.ternary) == ([2.8], [2.9])


def test_a_cell_whose_sweep_is_not_complete_is_marked(scaling: Any) -> None:
    rows = made_up(scaling, lambda n, d, seed: 0.1)
    assert all(cell.tuned for cell in scaling.cells(rows))
    short = ("0.4M", str(scaling.tokens_for("0.4M", 20)), "ternary", "0.01")
    without = [r for r in rows if (r["size"], r["tokens"], r["arm"], r["lr"]) != short]
    assert [cell.tuned for cell in scaling.cells(without)] == [True, True, True, False, True]
    assert "| 0.4M, not tuned | 20 |" in scaling.table(without)
    assert "| 0.4M | 5 |" in scaling.table(without)
    assert len(scaling.summary(without)["cells"]) == 4


def test_a_short_run_tells_nothing_of_ternary(scaling: Any) -> None:
    rows = made_up(scaling, lambda n, d, seed: 0.1)
    rows += [row(scaling, arm, "0.1M", 5.0, 0.02, 4.0) for arm in scaling.ARMS]
    short = [cell for cell in scaling.cells(rows) if not cell.measured]
    assert [(cell.size, round(cell.per_weight), cell.tuned) for cell in short] == [
        ("0.1M", 5, True)
    ]
    assert "| 0.1M, too short | 5 |" in scaling.table(rows)
    assert len(scaling.summary(rows)["cells"]) == 5


def test_the_package_carries_the_fits_of_the_rows(scaling: Any) -> None:
    found = scaling.summary(scaling.read(scaling.CSV))
    stored = json.loads(scaling.FIT.read_text(encoding="utf-8"))
    assert (stored["cells"], stored["at"]) == (found["cells"], list(found["at"]))
    for name in ("gap", "bits_per_byte"):
        if found[name] is None:
            assert stored[name] is None
            continue
        assert stored[name].keys() == found[name].keys()
        for key, value in stored[name].items():
            assert np.array(value) == pytest.approx(np.array(found[name][key]), rel=1e-4, abs=1e-6)
