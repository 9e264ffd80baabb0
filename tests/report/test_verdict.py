"""The words above the figures, from curves whose verdict is plain."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.report.runs import RunRecord, read_run
from bitnet.report.verdict import compare, headline, settling
from tests.helpers.run_folders import loss_rows, ternary_row, write_run

Record = Callable[..., RunRecord]
STEPS = range(20, 120, 20)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A run by its name, its last bits per byte and more overrides."""

    def record(name: str, best: float, *overrides: str, steps: range = STEPS) -> RunRecord:
        return read_run(write_run(tmp_path / name, loss_rows(steps, best), *overrides))

    return record


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (2.2, "a is worse than b by 0.200 bits per byte (10.0%)."),
        (1.9, "a is better than b by 0.100 bits per byte (5.0%)."),
        (2.01, "a is as good as b: they differ by 0.010 bits per byte (0.5%), no more than"),
        (1.99, "a is as good as b: they differ by 0.010 bits per byte (0.5%), no more than"),
    ],
)
def test_which_is_better_and_by_how_much(record: Record, ours: float, said: str) -> None:
    run, other = record("a", ours), record("b", 2.0)
    compared = compare(run, other)
    assert compared is not None
    assert (compared.ours, compared.theirs, compared.step) == (ours, 2.0, 100)
    assert compared.caveats == []
    assert headline(run, [compared]).startswith(said)


def test_a_run_in_progress_is_compared_where_the_other_was(record: Record) -> None:
    run = record("a", 2.0, steps=range(20, 80, 20))  # at step 60 it has 2.0
    compared = compare(run, record("b", 2.0))  # which had 2.8 there
    assert compared is not None
    assert (compared.step, compared.ours) == (60, 2.0)
    assert compared.theirs == pytest.approx(2.8)


def test_runs_of_other_batches_are_compared_after_as_many_tokens(record: Record) -> None:
    half = record("a", 2.0, "train.batch_tokens=128", "train.steps=50", steps=range(10, 60, 10))
    compared = compare(half, record("b", 2.5))
    assert compared is not None
    assert (compared.step, compared.theirs) == (50, 2.5)
    apart = compare(record("c", 2.0, steps=range(7, 77, 7)), record("d", 2.0))
    assert apart is not None
    assert apart.caveats == ["after 4,480 against 6,400 tokens"]


def test_other_text_is_a_caveat(record: Record) -> None:
    run = record("a", 2.0)
    other = compare(run, record("b", 2.0, "data.path=data/other"))
    part = compare(run, record("c", 2.0, "eval.max_tokens=77"))
    assert other is not None
    assert part is not None
    assert other.caveats == ["on different text"]
    assert part.caveats == ["on different parts of the validation text"]


def test_a_run_without_an_evaluation_is_not_compared(record: Record, tmp_path: Path) -> None:
    early = read_run(write_run(tmp_path / "early", [{"step": 1, "loss": 5.0}]))
    assert compare(early, record("b", 2.0)) is None
    assert headline(early, []) == "early has not been evaluated yet."
    assert headline(record("c", 2.0), []) == "c reached 2.000 bits per byte on validation text."


FALLING = [0.2 * 0.7**i for i in range(12)]
STILL = [0.3] * 12


@pytest.mark.parametrize(
    ("state", "flips", "zeros"),
    [
        ("settled", FALLING, STILL),
        ("settled", FALLING, [0.3, 0.32, 0.34, 0.36, 0.37, 0.38, 0.385, 0.39, 0.392, *[0.393] * 3]),
        ("settling", FALLING, [0.2 + 0.02 * i for i in range(12)]),
        ("settling", [0.2 - 0.01 * i for i in range(12)], STILL),
        ("moving", [0.2] * 12, STILL),
        ("moving", [0.01 * (i + 1) for i in range(12)], STILL),
        ("moving", [0.1] * 12, [0.3 + 0.05 * (i % 2) for i in range(12)]),
        ("frozen", [0.0009 * 0.7**i for i in range(12)], STILL),
        ("frozen", [0.0] * 12, STILL),
        ("unknown", FALLING[:4], STILL[:4]),
    ],
)
def test_whether_the_weights_have_settled(
    state: str, flips: list[float], zeros: list[float], tmp_path: Path
) -> None:
    rows = [ternary_row(5, zeros[0], None)]
    for number, (flip, share) in enumerate(zip(flips, zeros, strict=True), 2):
        rows.append(ternary_row(5 * number, share, flip))
    judged = settling(read_run(write_run(tmp_path / "one", rows)))
    assert judged is not None
    assert judged.state == state


def test_the_reason_names_the_numbers(tmp_path: Path) -> None:
    rows = [{"step": 1, "lr": 0.004}, ternary_row(5, 0.3, None)]
    rows += [ternary_row(5 * (i + 2), 0.3, flip) for i, flip in enumerate(FALLING)]
    judged = settling(read_run(write_run(tmp_path / "one", [*rows, {"step": 99, "lr": 0.001}])))
    assert judged is not None
    assert judged.reason == (
        "Of the codes, 0.56% change in 5 steps now (20.00% at the most) and 30.0% are zero, which "
        "moved by 0.0 points in the last quarter; the learning rate is at 25% of its peak"
    )


def test_full_precision_has_nothing_to_settle(record: Record) -> None:
    assert settling(record("a", 2.0)) is None
