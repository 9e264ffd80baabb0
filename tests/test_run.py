"""The folder of a run: what may change on resume, its lock, and the signals that stop it.

tests/training/test_train*.py save, kill and resume whole runs.
"""

import math
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bitnet.config import load_config, to_dict
from bitnet.run import FIXED, FREE, Run, allowed_changes, locked, stop_signals
from bitnet.schema import UserError
from bitnet.training.distributed import World


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        (("qat.start=0.5",), True),
        (("qat.weight_warmup=0.5",), True),
        (("qat.activation_warmup=0.5",), True),
        (("qat.freeze_observers=0.5", "quant.activations=static"), True),
        ((), False),
    ],
)
def test_a_schedule_in_shares_of_the_run_fixes_its_length(
    options: tuple[str, ...], fixed: bool, tmp_path: Path
) -> None:
    """More steps would move the switch, and turn quantized steps into full precision again."""
    base = ("model.depth=2", "model.linear=fp", "quant.weights=int", *options)
    old, more, fewer = (
        to_dict(load_config([], [*base, f"train.steps={steps}"]).resolve())
        for steps in (100, 200, 50)
    )
    assert allowed_changes(old, old, tmp_path) == []
    for new in (more, fewer):
        if fixed:
            with pytest.raises(UserError, match=r"^train.steps = \d+: .*qat.start"):
                allowed_changes(old, new, tmp_path)
        else:
            assert "train.steps: 100" in "; ".join(allowed_changes(old, new, tmp_path))


def test_runs_from_before_these_sections_existed_go_on(tmp_path: Path) -> None:
    config = load_config([], ["model.depth=2"]).resolve()
    new = to_dict(config)
    old = {section: keys for section, keys in new.items() if section not in ("quant", "qat")}
    old["train"] = {key: value for key, value in new["train"].items() if key != "init_from"}
    assert allowed_changes(old, new, tmp_path) == []


def test_what_is_fixed_and_what_is_free(tmp_path: Path) -> None:
    old = to_dict(load_config([], ["model.depth=2"]).resolve())
    for key in ("model.qk_norm=true", "data.seq_len=64", "optim.beta1=0.8", "run.seed=3"):
        new = to_dict(load_config([], ["model.depth=2", key]).resolve())
        with pytest.raises(UserError, match=f"another config: .*{key.partition('=')[0]}: "):
            allowed_changes(old, new, tmp_path)
    free = ("data.threads=3", "optim.lr=0.001", "train.steps=7", "log.every=3")
    new = to_dict(load_config([], ["model.depth=2", *free]).resolve())
    changes = allowed_changes(old, new, tmp_path)
    assert {change.partition(":")[0] for change in changes} >= {
        key.partition("=")[0] for key in free
    }


def test_the_names_are_keys_of_a_config() -> None:
    config = to_dict(load_config([], []))
    for name in (*FIXED, *FREE):
        section, _, key = name.partition(".")
        assert not key or key in config[section], name


def test_a_loss_after_a_bad_step_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved then, so the next lower loss than the saved one must be."""
    config = load_config([], ["model.depth=2", "checkpoint.every=100"]).resolve()
    nothing = cast(Any, None)
    run = Run(config, nothing, nothing, nothing, None, "", "", World(torch.device("cpu")))
    saved: list[float | None] = []
    monkeypatch.setattr(run, "save", lambda log, val_loss: saved.append(val_loss))
    for finite, val_loss in ((True, 3.0), (False, 2.5), (True, math.nan), (True, 2.7)):
        run.count(finite)
        run.save_if_due(nothing, val_loss)
    assert saved == [3.0, 2.7]


def test_a_checkpoint_that_failed_in_the_background_ends_the_run_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config([], ["model.depth=2", "checkpoint.every=100"]).resolve()
    nothing = cast(Any, None)
    run = Run(config, nothing, nothing, nothing, None, "", "", World(torch.device("cpu")))

    def fail() -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run.saver, "check", fail)
    run.count(finite=False)  # a step that would not save
    with pytest.raises(OSError, match="No space left"):
        run.save_if_due(nothing, None)


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with (
        locked(folder),
        pytest.raises(UserError, match="another process is training"),
        locked(folder),
    ):
        pass
    with locked(folder):
        pass


def test_signals_are_noted_and_handlers_restored() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        with stop_signals() as stop:
            assert not stop
            signal.raise_signal(number)
            assert stop == [number]
        assert signal.getsignal(number) == before[number]
