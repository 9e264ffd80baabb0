"""train.py stopped: killed, by a signal, by a damaged checkpoint, a full disk, another process."""

import fcntl
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.config import load_config
from bitnet.export.folder import load
from bitnet.schema import UserError
from bitnet.training import checkpoint, optim
from tests.helpers.training_script import TRAIN, Run, exact, kill_at, read_metrics, spawn, train

KILLED_INSIDE_A_SAVE = """
import os, runpy, signal, sys
import bitnet.durable as durable
calls, fsync = 0, durable.fsync
def deadly(path):
    global calls
    calls += 1
    if calls == int(os.environ["FSYNCS"]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(path)
durable.fsync = deadly
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_again_and_again_is_bit_identical(
    run: Run, config_file: Path, tmp_path: Path, kills: int
) -> None:
    n_steps = 8 * kills + 5
    args = [str(config_file), "model.n_layers=6", "optim.optimizer=muon", f"train.steps={n_steps}"]
    expected = run(*args[1:], f"run.dir={tmp_path / 'whole'}")

    args.append(f"run.dir={tmp_path / 'killed'}")
    metrics = tmp_path / "killed" / "tiny" / "metrics.jsonl"
    generator = random.Random(1)
    moments = sorted(generator.sample(range(2, n_steps - 5), kills))
    for i, step in enumerate(moments):
        kill_at(spawn(args), metrics, step, generator.random() * 0.05)
        if i == kills // 2:  # one more, among the files of a checkpoint, before it has its name
            inside = spawn(args, KILLED_INSIDE_A_SAVE, FSYNCS="5")
            inside.communicate(timeout=120)
            assert inside.returncode == -signal.SIGKILL
            names = [p.name for p in (tmp_path / "killed/tiny/checkpoints").iterdir()]
            assert any(name.startswith(".tmp-step_") for name in names), names
    final = spawn(args)
    assert final.wait(120) == 0, final.communicate()
    final.communicate()
    found = read_metrics(tmp_path / "killed" / "tiny")
    steps = [row["step"] for row in found if "loss" in row]
    assert steps == list(range(1, n_steps + 1))
    assert exact(found) == exact(expected)
    whole, _ = load(tmp_path / "whole/tiny/model")
    killed, _ = load(tmp_path / "killed/tiny/model")
    for (name, a), b in zip(whole.state_dict().items(), killed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


NEVER_DONE = ["train.steps=100000", "checkpoint.every=99999", "eval.every=99999"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_resume(
    config_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = spawn([str(config_file), f"run.dir={tmp_path}", *NEVER_DONE])
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while not (metrics.exists() and '{"step": 3,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert not (tmp_path / "tiny" / "model").exists()  # what make quickstart would pack
    step = int(re.search(r"stopped at step (\d+) and saved; resume with", out)[1])  # type: ignore[index]
    assert shlex.join([str(TRAIN), str(config_file)]) in out
    saved = checkpoint.load_newest(tmp_path / "tiny" / "checkpoints")
    assert saved is not None
    assert saved.step == step == read_metrics(tmp_path / "tiny")[-1]["step"]


def test_a_closed_terminal_saves_and_ends(config_file: Path, tmp_path: Path) -> None:
    """Nothing can be printed any more, and shells send a second SIGHUP; a checkpoint is saved."""
    ours, terminal = os.openpty()
    errors = tmp_path / "errors.txt"

    def in_a_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where nohup runs the tests, it is ignored
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), str(config_file), f"run.dir={tmp_path}", *NEVER_DONE],
            stdin=terminal,
            stdout=terminal,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=in_a_terminal,
        )
    os.close(terminal)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while not (metrics.exists() and '{"step": 3,' in metrics.read_text()):
        assert process.poll() is None, errors.read_text()
        os.read(ours, 10_000)
    os.close(ours)
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129, errors.read_text()
    assert "rror" not in errors.read_text()
    saved = checkpoint.load_newest(tmp_path / "tiny" / "checkpoints")
    assert saved is not None
    assert saved.step == read_metrics(tmp_path / "tiny")[-1]["step"]


def test_nohup_trains_on(config_file: Path, tmp_path: Path) -> None:
    """SIGHUP that is ignored when the process starts stays ignored."""
    process = spawn(
        [str(config_file), f"run.dir={tmp_path}"],
        before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while not (metrics.exists() and '{"step": 3,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "done: the model is in" in out


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run("run.name=whole")
    run()
    newest = tmp_path / "tiny" / "checkpoints" / "step_00000040" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    capsys.readouterr()
    assert exact(run()) == exact(expected)
    out = capsys.readouterr().out
    assert "step_00000040: damaged: model.safetensors" in out
    assert "resumed at step 35" in out


def test_steps_that_are_not_finite(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisoned gradients at steps 4, 5 and from 20 on: skipped, counted, and in the end an error
    that keeps the last good checkpoint."""
    clip = optim.clip_gradients
    calls = 0

    def poisoned(parameters: Any, max_norm: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        parameters = list(parameters)
        if calls in (4, 5) or calls >= 20:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, max_norm)

    monkeypatch.setattr("bitnet.training.step.clip_gradients", poisoned)
    with pytest.raises(
        UserError, match=r"4 steps in a row were not finite.*good checkpoint is kept"
    ):
        run("train.max_bad_steps=4")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "tiny") if "loss" in row}
    assert max(rows) == 23
    assert [rows[step]["skipped"] for step in (3, 4, 5, 6, 19, 20, 23)] == [0, 1, 2, 2, 2, 3, 6]
    assert rows[4]["grad_norm"] is None
    saved = checkpoint.load_newest(tmp_path / "tiny" / "checkpoints")
    assert saved is not None
    assert saved.step == 14
    assert all(tensor.isfinite().all() for tensor in saved.tensors["model"].values())


def test_a_streak_of_bad_steps_never_replaces_a_good_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = optim.clip_gradients
    calls = 0

    def poisoned(parameters: Any, max_norm: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return clip(parameters, max_norm) * (float("nan") if calls > 15 else 1)

    monkeypatch.setattr("bitnet.training.step.clip_gradients", poisoned)
    with pytest.raises(UserError, match="10 steps in a row"):
        run("checkpoint.every=3", "eval.every=100")
    kept = sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert kept == ["step_00000012", "step_00000015"]
    monkeypatch.setattr("bitnet.training.step.clip_gradients", clip)
    rows = run("checkpoint.every=3", "eval.every=100", "optim.lr=1e-3")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))


def test_data_prepared_anew_from_other_text_is_refused(run: Run, tmp_path: Path) -> None:
    text, data = tmp_path / "text.txt", f"data.path={tmp_path / 'data'}"
    text.write_text("one two three four five\n\n" * 2000)
    options = (f"data.sources={text}", data, "data.vocab_size=300", "train.steps=2")
    run(*options)
    run(*options)
    shutil.rmtree(tmp_path / "data")
    text.write_text("six seven eight nine ten\n\n" * 2000)
    with pytest.raises(UserError, match="was prepared anew since this run began"):
        run(*options)


def test_two_processes_in_one_folder(config_file: Path, tmp_path: Path) -> None:
    config = load_config([config_file], [f"run.dir={tmp_path}", "train.steps=1"]).resolve()
    with train.locked(config.run_dir):
        process = spawn([str(config_file), f"run.dir={tmp_path}"])
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another process is training in this folder" in err


def test_a_full_disk(config_file: Path, tmp_path: Path) -> None:
    """A file-size limit stands for the disk: the checkpoint does not fit, the error is one line,
    and the run folder holds no half of it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    process = spawn([str(config_file), f"run.dir={tmp_path}"], before=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    *_, error = err.splitlines()
    assert re.fullmatch(r"error: .*model.safetensors: (File too large|No space .*)", error), error
    assert "Traceback" not in err
    assert list((tmp_path / "tiny" / "checkpoints").iterdir()) == []
