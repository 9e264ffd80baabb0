"""``bitnet chat`` on a pipe and on a pseudo-terminal."""

import io
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.data.chat_template import ChatTemplate
from bitnet.export.folder import load, save_model

Bitnet = Callable[..., tuple[int, str, str]]


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_each_line_of_a_pipe_is_answered(
    bitnet: Bitnet, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("chat", folders / "model", "--max-new-tokens", "5", "--temperature", "0")
    say(monkeypatch, "def f1\n\n   \nx\n")
    code, out, err = bitnet(*args)
    assert (code, err) == (0, "")
    say(monkeypatch, "def f1\n/stats\n/reset\ndef f1\n//x \\\ny")
    code, again, err = bitnet(*args)
    assert code == 0
    assert "tokens read, 0 of them known from before" in err
    say(monkeypatch, "def f1\n")
    _, alone, _ = bitnet(*args)
    assert again.startswith(alone * 2)
    assert out.startswith(alone)


def test_commands(bitnet: Bitnet, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("chat", folders / "model", "--max-new-tokens", "3")
    say(monkeypatch, "/help\n/set\n/set top_k 7\n/set max_new_tokens 2\n/quit\nnever read\n")
    code, out, err = bitnet(*args)
    assert (code, out) == (0, "")
    assert "/retry" in err
    assert "temperature 0.7, top_k 50, top_p 0.95, seed 0, max_new_tokens 3" in err
    assert "top_k 7, top_p 0.95, seed 0, max_new_tokens 2" in err
    for line, error in {
        "/rest": "/rest: no such command; did you mean /reset?",
        "/retry": "there is no message to answer yet",
        "/set temprature 1": "/set temprature: no such setting; did you mean temperature?",
        "/set top_k x": "/set top_k: invalid literal for int() with base 10: 'x'",
        "/set top_p 2": "top_p must be above 0 and at most 1 (off), got 2.0",
        "/set top_k": "/set: expected a key and a value, such as /set temperature 0.2",
        "/system be brief": "/system: the model has no chat template, so no place for it",
    }.items():
        say(monkeypatch, f"{line}\n")
        assert bitnet(*args) == (2, "", f"error: {error}\n")
    say(monkeypatch, "x\n")
    code, _, err = bitnet(*args, "--system", "be brief")
    assert (code, err.endswith("has no chat template, so no place for it\n")) == (2, True)


def test_a_template_has_a_system_message(
    bitnet: Bitnet, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(folders / "model")
    tokenizer.chat_template = ChatTemplate("{{ raise_exception(messages[0].content) }}")
    folder = save_model(tmp_path / "model", model, tokenizer)
    say(monkeypatch, "x\n")
    code, _, err = bitnet("chat", folder, "--system", "be brief")
    assert (code, err) == (2, "error: chat template: be brief\n")
    say(monkeypatch, "/system be bright\nx\n")
    assert bitnet("chat", folder)[2].endswith("error: chat template: be bright\n")


SLOWLY = """
import sys, time
from bitnet.engine.engine import Engine

generate = Engine.generate

def slowly(self, prompts, count, params, on_text):
    seconds = [60] if count == 9 else []
    def wait(index, text):
        on_text(index, text)
        time.sleep(seconds.pop() if seconds else 0)
    return generate(self, prompts, count, params, on_text=wait)

Engine.generate = slowly
from bitnet.cli.main import main
main()
"""


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            # A test run in the background starts with SIGINT ignored, and so would this program.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(sys.executable, [sys.executable, "-c", SLOWLY, *words])
        self.said = ""

    def until(self, words: str, seconds: float = 300) -> str:
        """What is shown up to these words, which are taken out."""
        end = time.monotonic() + seconds
        while words not in self.said:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} was not shown, but {self.said!r}"
            try:
                self.said += os.read(self.master, 4096).decode(errors="replace")
            except OSError as error:
                raise AssertionError(f"it ended before {words!r}: {self.said!r}") from error
        shown, _, self.said = self.said.partition(words)
        return shown

    def type(self, text: str) -> None:
        """Type, once the program waits: Python misses a Ctrl-C between its prompt and its wait."""
        state = Path(f"/proc/{self.pid}/stat")
        time.sleep(0 if state.exists() else 1)
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        os.write(self.master, text.encode())

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of forkpty:DeprecationWarning")
def test_ctrl_c_ends_an_answer_and_not_the_program(folders: Path) -> None:
    options = ("--max-new-tokens", "9", "--temperature", "0")
    terminal = Terminal("chat", str(folders / "model"), *options)
    assert "it continues the text that you begin" in terminal.until("> ")
    terminal.type("\x03")
    terminal.until("(Ctrl-D or /quit leaves)")
    terminal.until("> ")
    terminal.type("def f1\n")
    terminal.until("def f1")  # what was typed
    time.sleep(1)  # the answer has begun, and waits a minute after its first text
    terminal.type("\x03")
    terminal.until("(stopped)")
    terminal.until("> ")
    terminal.type("/set max_new_tokens 3\n")
    terminal.until("max_new_tokens 3\r\n")
    terminal.until("> ")
    terminal.type("x\n/stats\n")
    terminal.until("tokens read, ")
    known = terminal.until(" of them known from before")
    assert int(known) > 0  # the stopped answer is still in the cache
    terminal.until("> ")
    terminal.type("/nonsense\n")
    terminal.until("error: /nonsense: no such command")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.code() == 0
