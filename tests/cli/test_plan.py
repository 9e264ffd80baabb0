"""``bitnet plan`` with speeds that are given, so that only the command runs."""

import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.config import load_config
from bitnet.plan import Cell, Fit, Study
from bitnet.presets import presets

Bitnet = Callable[..., tuple[int, str, str]]
SMALL = ("data.vocab_size=1024", "data.path=no-such-data")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 tokens per second at depth 1, less for larger ones by FLOPs; a study of one cell."""

    def speed(config: object, _: float) -> float:
        return 5000.0

    monkeypatch.setattr("bitnet.cli.plan.measured_speed", speed)
    zero = [[0.0] * 3] * 3
    study = Study(
        [Cell(393_216, 27.0, 3, 0.05, 0.04, 0.06, 0.005)],
        Fit([math.log(0.07), 0.0, 0.0], zero, 0.005, 2.0, (393_216, 20)),
        Fit([math.log(2.1), 0.0, 0.0], zero, 0.02, 2.0, (393_216, 20)),
    )
    monkeypatch.setattr("bitnet.cli.plan.load_study", lambda: study)


def test_it_proposes_a_run_with_its_command_and_what_is_known(bitnet: Bitnet) -> None:
    code, out, err = bitnet("plan", "--hours", "1", *SMALL)
    assert code == 0, err
    assert out.startswith("depth 2: ")
    assert (
        f"bitnet train quickstart {' '.join(SMALL)} model.depth=2 model.n_layers=0 "
        "optim.muon_lr=0.005 train.steps=" in out
    )
    assert "would end at 2.10 bits per byte (2.06 to 2.14)" in out
    assert "+0.070 nats per token from full precision (+0.060 to +0.080)" in out
    assert (
        "393.2k weights in matrices, 27 tokens per weight, +0.050 nats per token from full "
        "precision (+0.040 to +0.060, 3 seeds). It was best at optim.muon_lr=0.005, with" in out
    )


def test_a_rate_that_was_given_stays_and_is_compared(bitnet: Bitnet) -> None:
    code, out, err = bitnet("plan", "--hours", "1", *SMALL, "optim.muon_lr=0.02")
    assert code == 0, err
    assert out.count("optim.muon_lr=0.02") == 1
    assert "It was best at optim.muon_lr=0.005 (this run has 0.02), with" in out


def test_it_says_nothing_of_runs_that_are_far_from_the_study(bitnet: Bitnet) -> None:
    code, out, err = bitnet("plan", "--hours", "200", "quickstart", *SMALL)
    assert code == 0, err
    assert "The study covers 393.2k weights in matrices at 27 tokens per weight. This run" in out
    assert "too far to say what ternary costs or which optim.muon_lr is best." in out
    assert "muon_lr=" not in out
    assert "(at the FLOP/s of depth 4)" in out


def test_the_command_has_the_tokens_of_the_plan_alone(bitnet: Bitnet) -> None:
    for word in ("train.tokens=5000000", "train.steps=7"):
        code, out, err = bitnet("plan", "--hours", "1", *SMALL, word)
        assert code == 0, err
        assert word not in out
        assert out.count("train.steps=") == 1


def test_tokens_of_a_config_do_not_contradict_the_command(bitnet: Bitnet, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[train]\ntokens = 5_000_000\n", encoding="utf-8")
    code, out, err = bitnet("plan", "--hours", "1", "quickstart", str(file), *SMALL)
    assert code == 0, err
    words = shlex.split(out.split("bitnet train ")[1].splitlines()[0])
    run = load_config([presets()["quickstart"], file], [w for w in words if "=" in w]).resolve()
    assert f"train.steps={run.train.steps}" in words


def test_too_little_time_is_one_line(bitnet: Bitnet) -> None:
    code, out, err = bitnet("plan", "--hours", "0.01", "--tokens", "999999999", *SMALL)
    assert (code, out) == (2, "")
    assert "--hours 0.01: is too short; 999,999,999 tokens at depth 1 take" in err


@pytest.mark.parametrize(
    "word", ["model.linear=fp", "optim.optimizer=adamw", "train.batch_tokens=16384"]
)
def test_it_predicts_only_what_the_study_trained(bitnet: Bitnet, word: str) -> None:
    code, out, err = bitnet("plan", "--hours", "1", *SMALL, word)
    assert code == 0, err
    assert out.startswith("depth 2: ")
    key, value = word.split("=")
    assert f'{key} = "{value}"' in out or f"{key} = {value}:" in out
    assert "no loss is predicted" in out
    assert "would end at" not in out
    assert "muon_lr" not in out


def test_without_fits_it_tells_what_was_measured(
    bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study([Cell(393_216, 27.0, 1, 0.05, 0.05, 0.05, 0.005)], None, None)
    monkeypatch.setattr("bitnet.cli.plan.load_study", lambda: study)
    code, out, err = bitnet("plan", "--hours", "1", *SMALL)
    assert code == 0, err
    assert "has too few tuned runs to predict how such a run would end. Nearest run" in out
    assert "+0.050 nats per token from full precision (one seed)." in out
