"""The studies of docs/results: what they search, which runs they choose, what they draw."""

import random
from pathlib import Path
from typing import Any

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
    tokens = str(scaling.tokens_for("0.4M", 5))
    common = {"arm": arm, "size": "0.4M", "tokens": tokens, "seed": "0"}
    return [common | {"lr": f"{lr:g}", "loss": str(loss)} for lr, loss in losses.items()]


def test_the_sweep_goes_on_past_an_end_that_is_best(scaling: Any) -> None:
    found = {0.01: 3.0, 0.02: 2.9, 0.04: 2.8}
    assert scaling.to_sweep(rows(scaling, "ternary", found), "ternary") == [0.08]
    found[0.08] = 3.1
    done = rows(scaling, "ternary", found)
    assert scaling.to_sweep(done, "ternary") == []
    wanted = scaling.jobs(done)
    assert {job.lr for job in wanted if job.arm == "ternary"} == {0.04}
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
