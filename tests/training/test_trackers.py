"""Trackers that fail in every call, real ones without a network, a terminal or an account."""

import math
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnet.schema import UserError
from bitnet.training.metrics import LogConfig, RunLog
from bitnet.training.trackers import TensorBoard, Wandb, panels
from tests.helpers.fake_wandb import FakeWandb

Start = Callable[..., tuple[Wandb, list[str]]]
ROW = {
    "step": 20,
    "tokens": 640,
    "loss": 2.5,
    "lr": 1e-3,
    "mfu": 0.4,
    "lambda_w": 1.0,
    "ternary/zeros": 0.3,
    "ternary/layers": {"layers.0.up": {"zeros": 0.25, "flip_rate": 0.01}},
}


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def start(mode: Any = "offline") -> tuple[Wandb, list[str]]:
        warnings: list[str] = []
        settings = {"a": {"b": 1}}
        return Wandb(mode, "bitnet", tmp_path, "tiny", settings, warnings.append), warnings

    return start


def test_panels_by_section() -> None:
    assert panels(ROW) == {
        "train/tokens": 640,
        "train/loss": 2.5,
        "optim/lr": 1e-3,
        "speed/mfu": 0.4,
        "train/lambda_w": 1.0,
        "ternary/zeros": 0.3,
        "zeros/layers.0.up": 0.25,
        "flip_rate/layers.0.up": 0.01,
    }
    row = {"step": 20, "val_loss": 3.0, "val_bpb": 1.1, "val_bpb/code": 0.9, "sample": "def"}
    assert panels(row) == {"val/loss": 3.0, "val/bpb": 1.1, "val/bpb/code": 0.9}


# -- wandb ---------------------------------------------------------------------------------------


def test_wandb(wandb: FakeWandb, start: Start, tmp_path: Path) -> None:
    tracker, warnings = start()
    tracker.log({"step": 3, "loss": 1.0}, step=3)
    tracker.log({"step": 3, "val_bpb": 1.0, "sample": "<b>def"}, step=3)
    tracker.finish(1)
    tracker.finish()
    tracker.log({"step": 4, "loss": 1.0}, step=4)  # after the end: nothing, quietly
    assert wandb.run.logged == [
        ({"train/loss": 1.0}, 3),
        ({"val/bpb": 1.0, "sample": "<pre>&lt;b&gt;def</pre>"}, 3),
    ]
    assert wandb.run.exit_code == 1
    assert warnings == []
    (call,) = wandb.calls
    assert call["settings"]["mode"] == "offline"
    assert call["settings"]["finish_timeout"] > 0
    assert call["dir"] == str(tmp_path)
    assert call["config"] == {"a": {"b": 1}}


def test_a_resumed_run_keeps_its_id(wandb: FakeWandb, start: Start) -> None:
    start()
    start()
    first, second = (call["id"] for call in wandb.calls)
    assert first == second
    assert re.fullmatch("[0-9a-f]{8}", first)


def test_a_resumed_run_goes_on_online(
    wandb: FakeWandb, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    start("online")
    start("online")
    assert [call["resume"] for call in wandb.calls] == ["allow", "allow"]
    assert wandb.calls[0]["id"] == wandb.calls[1]["id"]


def test_an_id_that_is_no_file_is_one_warning(
    wandb: FakeWandb, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()
    os.mkfifo(tmp_path / "wandb" / "id")
    _, warnings = start()
    assert "not a regular file" in warnings[0]


def test_online_without_a_key_is_offline_and_says_so(wandb: FakeWandb, start: Start) -> None:
    _, warnings = start("online")
    assert wandb.calls[0]["settings"]["mode"] == "offline"
    assert len(warnings) == 1
    assert "no API key" in warnings[0]


def test_online_with_a_key(
    wandb: FakeWandb, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    start("online")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    start("online")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password k\n")
    start("online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
    start("online")
    (tmp_path / "netrc").write_text("machine machine nonsense\n")
    start("online")
    modes = [call["settings"]["mode"] for call in wandb.calls]
    assert modes == ["online", "online", "offline", "online", "offline"]


def test_a_start_that_fails_is_one_warning(wandb: FakeWandb, start: Start) -> None:
    wandb.error = ValueError("cannot reach\nthe server")
    tracker, warnings = start()
    tracker.log({"step": 1, "loss": 1.0}, step=1)
    tracker.finish()
    assert warnings == ["wandb: start failed (cannot reach); it is off, metrics.jsonl goes on"]


def test_a_log_that_fails_is_one_warning(wandb: FakeWandb, start: Start) -> None:
    tracker, warnings = start()
    for step in range(3):
        tracker.log({"step": step, "bad": 1.0}, step)
    tracker.finish()
    assert warnings == ["wandb: log failed (server says no); it is off, metrics.jsonl goes on"]
    assert wandb.run.logged == []


def test_wandb_that_is_missing(
    wandb: FakeWandb, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it raises
    _, warnings = start()
    assert len(warnings) == 1


def test_a_disabled_run_does_not_import_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with RunLog(LogConfig(wandb="disabled"), tmp_path, None, 1) as log:
        log.track("tiny", {})
        log.row({"step": 1, "loss": 1.0}, record=True)
    assert "wandb" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


REAL = """
import sys
from pathlib import Path
from bitnet.training.trackers import Wandb
tracker = Wandb(sys.argv[2], "bitnet", Path(sys.argv[1]), "tiny", {"a": 1}, print)
tracker.log({"step": 1, "loss": 1.0, "ternary/layers": {"x": {"zeros": 0.3}}}, 1)
tracker.log({"step": 1, "val_bpb": 1.0, "sample": "<b>"}, 1)
tracker.finish()
"""


def real_wandb(folder: Path, mode: str, terminal: bool = False, **environment: str) -> str:
    """What the real wandb says in a process of its own, with a terminal that nobody types at."""
    command = [sys.executable, "-c", REAL, str(folder), mode]
    env = os.environ | environment
    if not terminal:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=True,
            env=env,
        ).stdout
    ours, theirs = pty.openpty()
    try:
        child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        assert child.wait(timeout=120) == 0
        os.write(theirs, b"end")
        return os.read(ours, 100_000).decode().removesuffix("end").replace("\r\n", "\n")
    finally:
        os.close(ours)
        os.close(theirs)


def test_real_wandb_without_an_account(tmp_path: Path) -> None:
    """Twice over one folder: quiet, quick to end, one id; on a terminal it does not ask."""
    assert real_wandb(tmp_path, "offline") == ""
    said = real_wandb(tmp_path, "online", terminal=True)
    assert said.startswith("wandb: no API key")
    assert said.count("\n") == 1
    run_id = (tmp_path / "wandb" / "id").read_text()
    files = list(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(files) in (1, 2)  # folders are named by the second
    logged = b"".join(file.read_bytes() for file in files)
    for name in (b"train/loss", b"zeros/x", b"val/bpb", b"sample"):
        assert name in logged


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_real_wandb_online_without_a_network_is_one_warning(tmp_path: Path, terminal: bool) -> None:
    begin = time.monotonic()
    said = real_wandb(
        *(tmp_path, "online", terminal),
        WANDB_API_KEY="0123456789" * 4,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_MODE="online",
    )
    *_, last = said.splitlines()  # wandb itself says before where it found the key
    assert re.fullmatch(r"wandb: start failed \(.*\); it is off, metrics.jsonl goes on", last)
    assert said.count("\n") == 2
    assert time.monotonic() - begin < 100


# -- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_that_is_missing_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = LogConfig(tensorboard=True, wandb="disabled")
    with (
        pytest.raises(UserError, match=r"log\.tensorboard = true .*bitnet-train\[tensorboard\]"),
        RunLog(config, tmp_path, None, 1) as log,
    ):
        log.track("tiny", {})


def test_tensorboard_holds_the_panels_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader: the steps of a killed process are not there twice."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warnings: list[str] = []
    for first, loss in ((0, 3.0), (2, 1.0)):  # killed after step 3, resumed from that of step 1
        board = TensorBoard(tmp_path, {"model": {"depth": 3}}, first, warnings.append)
        for step in range(max(first, 1), 4):
            board.log(ROW | {"step": step, "loss": loss}, step)
        board.log({"step": 3, "val_bpb": math.nan, "sample": "# def\n<b>"}, 3)
        board.finish()
        board.finish()
    assert warnings == []
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 3.0), (2, 1.0), (3, 1.0)]
    assert events.Scalars("zeros/layers.0.up")[0].value == 0.25
    assert math.isnan(events.Scalars("val/bpb")[-1].value)
    (sample,) = events.Tensors("sample/text_summary")[-1].tensor_proto.string_val
    assert sample.decode() == "    # def\n    <b>"
    config = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert '"depth": 3' in config


def test_a_tensorboard_that_fails_is_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    warnings: list[str] = []
    (tmp_path / "file").touch()
    board = TensorBoard(tmp_path / "file" / "folder", {}, 0, warnings.append)
    board.log({"step": 1, "loss": 1.0}, 1)
    board.finish()
    assert len(warnings) == 1
    assert warnings[0].startswith("tensorboard: start failed (")
