"""metrics.jsonl cut at every byte, and three kinds of screens."""

import io
import json
import math
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from bitnet.schema import UserError
from bitnet.training.metrics import Console, LogConfig, MetricsFile, RunLog
from tests.helpers.fake_wandb import FakeWandb


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- metrics.jsonl


def test_rows_come_back_bit_for_bit(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "third": 1 / 3, "sample": "déjà\u2028\n☃"},
        {"step": 2, "tokens": 2**53 + 1, "nested": {"a": [1.5, {"b": -0.0}]}},
    ]
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    for number, row in enumerate(rows, 1):
        file.append(row)
        assert rows_of(file.path) == rows[:number]  # there at once, without a close
    assert str(rows_of(file.path)[1]["nested"]["a"][1]["b"]) == "-0.0"
    file.sync()


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 3, "loss": math.nan, "deep": [{"x": math.inf}, -math.inf, 1.0]})
    assert rows_of(file.path) == [{"step": 3, "loss": None, "deep": [{"x": None}, None, 1.0]}]


@pytest.mark.parametrize("checkpoint", [-1, 0, 2, 5])
def test_killed_at_any_byte_no_step_is_lost_or_doubled(
    tmp_path: Path, checkpoint: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that a kill after the checkpoint's sync can leave, continued from there, becomes
    the file of a run that was never killed."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # 250 of them take seconds
    rows = [{"step": 0, "val_bpb": 8.0}]  # the first evaluation, before any step
    for step in range(1, 6):
        rows.append({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            rows.append({"step": step, "val_bpb": 1 / step, "sample": "é" * step})
    whole = MetricsFile(tmp_path / "whole.jsonl")
    for row in rows:
        whole.append(row)
    data = whole.path.read_bytes()
    later = [row for row in rows if row["step"] > checkpoint]
    synced = len(b"".join(data.splitlines(keepends=True)[: len(rows) - len(later)]))
    for cut in range(synced, len(data) + 1):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(data[:cut])
        file = MetricsFile(path)
        file.rewind(checkpoint)
        for row in later:
            file.append(row)
        assert path.read_bytes() == data


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.sync()  # nothing yet
    file.append({"step": 1})
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    file.sync()
    assert synced == [file.path.stat().st_ino]


def test_rewind_of_nothing(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").rewind(7)
    assert list(tmp_path.iterdir()) == []


def test_append_after_rewind_after_append(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step})
    file.rewind(2)
    file.append({"step": 3, "again": True})
    assert rows_of(file.path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize("damage", [b"\x00\x00", b"{}", b'{"step": "1"}', b"[1]", b"{'step': 1}"])
def test_damage(tmp_path: Path, damage: bytes) -> None:
    """Before lines to be kept it is an error that names the line; after them it goes."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a JSON object with a step"):
        MetricsFile(path).rewind(2)
    MetricsFile(path).rewind(1)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_rewind_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"):
            MetricsFile(path).rewind(1)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_disk_that_fills_within_a_line(tmp_path: Path) -> None:
    """The operating system takes 5 bytes of the line and refuses the rest."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl: File too large"):
            file.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.path.read_bytes() == b'{"step": 1}\n{"ste'
    file.rewind(1)
    file.append({"step": 2})
    assert rows_of(file.path) == [{"step": 1}, {"step": 2}]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"metrics\.jsonl: (File exists|Not a directory)"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl").append({"step": 1})


def test_a_line_without_a_step_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="step"):
        MetricsFile(tmp_path / "metrics.jsonl").append({"loss": 1.0})


# --- console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


ROW = {"loss": 3.14159, "val_bpb": 2.25, "tokens_per_second": 12345.6, "lr": 1.5e-3, "other": 1}


def test_plain_lines_where_there_is_no_terminal() -> None:
    out, clock = io.StringIO(), Clock()
    with Console(5000, start_step=1000, file=out, clock=clock) as console:
        console.progress(1000, {"loss": 4.0})
        clock.now = 100.0  # 1,000 steps in 100 s, 3,000 to go
        console.progress(2000, ROW)
        clock.now = 400.0
        console.progress(5000, {"loss": math.nan})
        console.warn("mind [the] gap")
    assert out.getvalue().splitlines() == [
        "step 1000/5000  loss 4.0000  ETA ?",
        "step 2000/5000  loss 3.1416  ETA 5m00s  val 2.250 bpb  12,346 tok/s  lr 1.50e-03",
        "step 5000/5000  loss nan  ETA 0m00s  val 2.250 bpb",
        "warning: mind [the] gap",
    ]


def test_a_long_wait_for_data_is_shown() -> None:
    out = io.StringIO()
    console = Console(3, file=out)
    for step, wait in enumerate((0.0, 0.009, 0.25), 1):
        console.progress(step, {"tokens_per_second": 100.0, "data_wait": wait})
    endings = [line.partition("100 tok/s")[2] for line in out.getvalue().splitlines()]
    assert endings == ["", "", ", 25% of the time waiting for data"]


def test_plain_lines_come_every_so_often() -> None:
    out = io.StringIO()
    console = Console(7, file=out, every=3)
    for step in range(1, 8):
        console.progress(step, {"loss": 1.0})
        console.progress(step, {"loss": 1.0, "val_bpb": 2.0})  # an evaluation of the same step
    assert re.findall(r"step (\d)/7", out.getvalue()) == ["3", "6", "7"]


def test_long_lines_are_not_broken_in_a_pipe() -> None:
    out = io.StringIO()
    Console(1, file=out).print("word " * 100)
    assert out.getvalue().count("\n") == 1


def test_hours() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(1001, file=out, clock=clock)
    clock.now = 100.0
    console.progress(1, {})
    assert "ETA 27h46m" in out.getvalue()


def test_live_line(terminal: Terminal) -> None:
    with Console(10, file=terminal) as console:
        for step in range(1, 11):
            console.progress(step, ROW)
        console.print("a sample")
    out = terminal.getvalue()
    assert "step 10/10" in out
    assert "a sample" in out
    assert out.count("\n") < 5  # one line, written over and over
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("columns", [1, 10, 40, 75, 200])
def test_live_line_fits(terminal: Terminal, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with Console(1000, file=terminal) as console:
        console.progress(123, ROW)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    lines = re.split("[\r\n]", plain)
    assert max(map(len, lines)) <= columns
    assert ("loss 3.1416" in plain) == (columns >= 40)
    assert ("lr 1.50e-03" in plain) == (columns >= 100)


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color(terminal: Terminal, no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with Console(1000, file=terminal) as console:
        console.warn("careful")
    assert ("\x1b[33m" in terminal.getvalue()) != no_color


def test_dumb_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Console(1000, file=terminal) as console:
        console.progress(1, ROW)
    assert terminal.getvalue().startswith("step 1/1000  loss 3.1416")
    assert "\x1b" not in terminal.getvalue()


def test_quiet(terminal: Terminal) -> None:
    with Console(10, quiet=True, file=terminal) as console:
        console.progress(1, ROW)
        console.print("text")
    assert terminal.getvalue() == ""


def test_a_sample_cannot_write_to_the_terminal() -> None:
    out = io.StringIO()
    Console(1, file=out).print("\x1b[2Jgone\x07 \x9b1m\x00 [bold]kept[/bold] :smile:\n\tdéf")
    assert out.getvalue() == "�[2Jgone� �1m� [bold]kept[/bold] :smile:\n        déf\n"


def test_a_stream_that_cannot_say_it() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(1, file=out).print("snow ☃ \ud800")
    out.flush()
    assert out.buffer.getvalue() == b"snow ? ?\n"  # type: ignore[attr-defined]


# -- All of it -----------------------------------------------------------------------------------


def test_the_log_of_a_run(
    wandb: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(LogConfig(every=2), tmp_path, None, 4) as log:
        log.row({"step": 1, "loss": 3.0}, record=True)  # before wandb is started
        log.track("tiny", {"a": 1})
        log.row({"step": 2, "loss": 2.0}, record=False)
        log.row({"step": 3, "loss": 1.0}, record=True)
        log.row({"step": 4, "val_bpb": 0.5}, record=True)
        log.sync()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 3.0},
        {"step": 3, "loss": 1.0},
        {"step": 4, "val_bpb": 0.5},
    ]
    assert wandb.run.logged == [({"train/loss": 1.0}, 3), ({"val/bpb": 0.5}, 4)]
    assert set(wandb.calls[0]["config"]) == {"a", "commit"}
    assert wandb.run.exit_code == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 2/4", "step 4/4"]
    assert "loss 1.0000" in shown[1], "an evaluation is shown beside the last step's numbers"

    RunLog(LogConfig(), tmp_path, 3, 4)  # resumed from a checkpoint of step 3
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines[:2]


def test_a_run_that_fails_has_failed_in_wandb_too(wandb: FakeWandb, tmp_path: Path) -> None:
    def fail() -> None:
        with RunLog(LogConfig(), tmp_path, None, 4) as log:
            log.track("tiny", {})
            raise UserError("bad steps")

    with pytest.raises(UserError, match="bad steps"):
        fail()
    assert wandb.run.exit_code == 1
