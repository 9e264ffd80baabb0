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


def rows(scaling: Any, arm: str, losses: dict[float, float]) -> list[dict[str, str]]:
    tokens = str(scaling.tokens_for("0.1M", 5))
    common = {"arm": arm, "size": "0.1M", "tokens": tokens, "seed": "0"}
    return [common | {"lr": f"{lr:g}", "loss": str(loss)} for lr, loss in losses.items()]


def test_the_sweep_goes_on_past_an_end_that_is_best(scaling: Any) -> None:
    found = {0.01: 3.0, 0.02: 2.9, 0.04: 2.8}
    assert scaling.to_sweep(rows(scaling, "ternary", found), "ternary") == [0.08]
    found[0.08] = 3.1
    done = rows(scaling, "ternary", found)
    assert scaling.to_sweep(done, "ternary") == []
    wanted = scaling.jobs(done)
    assert {job.lr for job in wanted if job.arm == "ternary" and job.size != "0.4M"} == {0.04}
    assert {job.lr for job in wanted if job.arm == "ternary"} == {0.02, 0.04, 0.08}
    assert {job.lr for job in wanted if job.arm == "fp"} == {0.005, 0.01, 0.02}


def test_a_run_has_whole_steps_and_the_tokens_of_its_size(scaling: Any) -> None:
    words = scaling.job("fp", "1.2M", 5.0, 0.01, 2).words()
    steps = next(int(word.partition("=")[2]) for word in words if word.startswith("train.steps"))
    assert steps * 2048 == scaling.tokens_for("1.2M", 5.0)
    assert 0 <= steps * 2048 - 5 * 1_179_648 < 2048
    assert {"model.depth=3", "model.linear=fp", "optim.muon_lr=0.01", "run.seed=2"} < set(words)


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

    assert "model.d_model=104" in equal_bytes.SHAPES["int4"]
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
    says."""
    found = []
    for size, per_weight in (("0.1M", 5), ("0.1M", 20), ("0.4M", 5), ("0.4M", 20), ("1.2M", 5)):
        for arm, rates in (("fp", (0.005, 0.01, 0.02)), ("ternary", (0.01, 0.02, 0.04))):
            swept = (size, per_weight) == scaling.FIRST
            for lr in rates if swept else rates[1:2]:
                for seed in range(3) if lr == rates[1] else range(1):
                    loss = 3.0 + 0.1 * seed + (lr != rates[1])
                    if arm == "ternary":
                        loss += gap(scaling.WEIGHTS[size], per_weight, seed)
                    row = {"arm": arm, "size": size, "lr": f"{lr:g}", "seed": str(seed)}
                    row |= {"loss": repr(loss), "bits_per_byte": repr(loss), "commit": "abc"}
                    row["tokens"] = str(scaling.tokens_for(size, per_weight))
                    found.append(row)
    return found


def test_a_fit_finds_the_line_that_was_put_in(scaling: Any) -> None:
    def gap(weights: int, per_weight: float, _: int) -> float:
        return float(0.1 - 0.02 * math.log2(weights / 393_216) + 0.03 * math.log2(per_weight / 5))

    points = scaling.cells(made_up(scaling, gap))
    found = scaling.fit(points)
    assert found["coefficients"] == pytest.approx([0.1, -0.02, 0.03], abs=2e-4)
    assert found["misfit"] < 2e-4  # tokens come in whole steps, so 5.01 per weight
    assert found["seed_spread"] < 1e-9
    assert scaling.fit(points[:4]) == {}  # four cells: too few
    assert scaling.fit([points[0]] * 6) == {}  # six in one place


def test_the_intervals_of_a_fit_are_those_of_least_squares(scaling: Any) -> None:
    """Seeds at -e, 0, +e: their spread is e, and the covariance that of the textbook,
    (e / sqrt 3)^2 (X'X)^-1."""
    rows = made_up(scaling, lambda n, d, seed: 0.1 + 0.01 * (seed - 1))
    found = scaling.fit(scaling.cells(rows))
    assert found["seed_spread"] == pytest.approx(0.01)
    points = [(n, d) for n, d in ((106_496, 5), (106_496, 20), (393_216, 5), (393_216, 20))]
    points.append((1_179_648, 5))
    x = np.array([[1, math.log2(n / 393_216), math.log2(d / 5)] for n, d in points])
    variances = np.diag(np.linalg.inv(x.T @ x)) * 0.01**2 / 3
    for (low, high), variance in zip(found["intervals"], variances, strict=True):
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)


def test_the_published_fits_are_those_of_the_papers(scaling: Any) -> None:
    """TriLM's abstract and table: 10% at 99M parameters and 8% at 3.9B."""
    for weights, percent in ((99e6, 10), (3.9e9, 8)):
        ternary, full = scaling.trilm(weights)
        assert round(100 * (ternary / full - 1)) == percent


def test_a_size_at_which_another_rate_is_better_is_not_carried(scaling: Any) -> None:
    def row(arm: str, size: str, lr: str, loss: str) -> dict[str, str]:
        tokens = str(scaling.tokens_for(size, 5.0))
        shown = {"arm": arm, "size": size, "lr": lr, "loss": loss, "tokens": tokens}
        return {**shown, "seed": "0", "commit": "x"}

    swept = [row(arm, "0.1M", lr, "4") for arm in scaling.ARMS for lr in ("0.01", "0.02", "0.04")]
    swept += [row(arm, "0.1M", "0.08", "3.9") for arm in scaling.ARMS]
    chosen = [row(arm, "0.4M", "0.08", "3.5") for arm in scaling.ARMS]
    rows = [*swept, *chosen, row("ternary", "0.4M", "0.16", "3.6")]
    assert [cell["weights"] for cell in scaling.summary(rows)["cells"]] == [106496, 393216]
    rows.append(row("fp", "0.4M", "0.04", "3.4"))
    assert scaling.badly_tuned(rows) == {"0.4M"}
    assert [cell["weights"] for cell in scaling.summary(rows)["cells"]] == [106496]
    assert "| 0.4M, badly tuned | 5 |" in scaling.table(rows)


def test_the_package_carries_the_cells_of_the_rows(scaling: Any) -> None:
    found = scaling.summary(scaling.read(scaling.CSV))
    stored = json.loads(scaling.FIT.read_text(encoding="utf-8"))
    assert stored["cells"] == found["cells"]
    assert stored["fit"].keys() == found["fit"].keys()
    for key, value in stored["fit"].items():
        assert np.array(value) == pytest.approx(np.array(found["fit"][key]), rel=1e-4, abs=1e-6)
