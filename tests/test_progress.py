"""Progress where there is no terminal: a line now and then, on a separate stream."""

import io
import re
import time

import pytest
from rich.console import Console

from bitnet import progress
from bitnet.progress import Reports, reporting
from bitnet.training.metrics import Console as TrainingConsole


def test_a_pipe_gets_lines_while_the_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with Reports() as bars:
        task = bars.add_task("gptq [4 bits]", total=8)
        bars.update(task, completed=2)
        err = ""
        until = time.monotonic() + 30
        while not err and time.monotonic() < until:
            time.sleep(0.01)
            err += capsys.readouterr().err
    assert re.match(r"gptq \[4 bits\], 25% after \d+ s\n", err)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr() == ("", "")  # nothing after the end


def test_a_task_that_is_reset_is_reported_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What keeps its own lines coming is not reported beside them."""
    monkeypatch.setattr(progress, "EVERY", 5.0)
    now = [0.0]
    with Reports(get_time=lambda: now[0]) as bars:
        task = bars.add_task("step 1", total=None)
        for _ in range(4):
            now[0] += 4.9
            bars.reset(task)
        time.sleep(0.7)  # the reporter looks every third of a second
        assert capsys.readouterr().err == ""
        now[0] += 5.1
        time.sleep(0.7)
        assert capsys.readouterr().err == "step 1 after 5 s\n"


def waited(capsys: pytest.CaptureFixture[str], words: str) -> str:
    err, until = "", time.monotonic() + 30
    while words not in err and time.monotonic() < until:
        time.sleep(0.01)
        err += capsys.readouterr().err
    return err


def test_a_training_run_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.03)
    with TrainingConsole(10, file=io.StringIO()) as console:
        for what in ("step 1, which compiles", "step 2: evaluation"):
            console.doing(what)
            assert re.search(rf"^{what} after \d+ s$", waited(capsys, what), re.M)
        console.print("a line")
    with TrainingConsole(10, file=io.StringIO(), quiet=True) as console:
        time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_commands_that_work_on_one_thing_report_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.03)
    with reporting("compressing"):
        assert "compressing after 0 s\n" in waited(capsys, "compressing")


def test_short_work_and_finished_tasks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Reports() as bars:
        bars.add_task("reading", total=None)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_bars() -> None:
    file = io.StringIO()
    with Reports(console=Console(file=file, force_terminal=True, width=80)) as bars:
        bars.add_task("reading", total=3)
        assert bars._reporter is None
    assert "reading" in file.getvalue()
