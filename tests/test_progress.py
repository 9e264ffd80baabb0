"""Progress where there is no terminal: a line now and then, on a stream of its own."""

import io
import re
import time

import pytest
from rich.console import Console

from bitnet import progress
from bitnet.progress import Reports


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
