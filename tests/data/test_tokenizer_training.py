"""The trainer's own process: its model is the trainer's, and it ends with its parent."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from bitnet import progress
from bitnet.data import tokenizer_training
from bitnet.data.tokenizer_training import train_model

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, str | int | bool] = {
    "model_type": "bpe",
    "vocab_size": 300,
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "num_threads": 1,
    "minloglevel": 2,
}
SLOW = """
import os, time
class SentencePieceTrainer:
    def train(sentence_iterator, model_writer, **options):
        n_bytes = sum(len(sentence) for sentence in sentence_iterator)
        with open(os.environ["BEGUN"] + "-", "w") as file:
            file.write(f"{os.getpid()} {n_bytes}")
        os.rename(os.environ["BEGUN"] + "-", os.environ["BEGUN"])
        time.sleep(float(os.environ.get("SECONDS_TO_TRAIN", 100)))
"""
"""A trainer that says that it has begun, and takes its time."""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The child's sentencepiece is SLOW; the file that it writes."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sentencepiece.py").write_text(SLOW, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("BEGUN", str(tmp_path / "begun"))
    return tmp_path / "begun"


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2][1] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("n", [0, 1, 200])
def test_the_model_is_what_the_trainer_gives_in_this_process(n: int) -> None:
    rows = ["", "é😀\u0301", "a\nb\r\n\tc  d", "x" * 70_000][: n or 1]
    texts = [*rows, *(f" word{i}\n  line {i * i}" for i in range(n))]
    model = BytesIO()

    def here() -> bytes:
        options: dict[str, Any] = OPTIONS
        SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
        return model.getvalue()

    if n == 200:
        assert train_model(iter(texts), OPTIONS) == here()
        return
    said = []
    for train in (here, lambda: train_model(iter(texts), OPTIONS)):
        with pytest.raises(RuntimeError) as caught:
            train()
        said.append(str(caught.value))
    assert said[0] == said[1] != ""


def test_what_the_sentences_raise_comes_through() -> None:
    def sentences() -> Iterator[str]:
        yield "a"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_model(sentences(), OPTIONS)


def test_a_trainer_that_is_killed_is_an_error(slow: Path) -> None:
    def kill() -> None:
        wait_for(slow.exists)
        os.kill(int(slow.read_text(encoding="utf-8").split()[0]), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RuntimeError, match=r"ended early \(signal 9\)"):
        train_model(["abc"], OPTIONS)
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_prepare_and_leaves_nothing(
    number: signal.Signals,
    slow: Path,
    bitnet: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Progress is reported while the trainer works; then the signal ends it at once."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"def f{i}():\n    return {i}" for i in range(2000)), "utf-8")
    monkeypatch.setattr(progress, "EVERY", 0.05)
    sent: list[float] = []

    def interrupt() -> None:
        wait_for(slow.exists)
        time.sleep(0.12)
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        code, out, err = bitnet("prepare", text, "--path", tmp_path / "set")
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    assert (code, out) == (128 + number, "")
    assert time.monotonic() - sent[0] < 5  # at once, and not after 100 s
    assert "\ntraining tokenizer after 0 s\n" in f"\n{err}"
    assert "Traceback" not in err
    pid, n_bytes = map(int, slow.read_text(encoding="utf-8").split())
    assert n_bytes > 1000
    assert is_gone(pid)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"text.txt", "fake", "begun", ".set.lock"}


@pytest.mark.parametrize("feeding", [False, True], ids=["training", "reading"])
def test_the_trainer_ends_with_a_parent_that_is_killed(feeding: bool, slow: Path) -> None:
    code = (
        "import time\nfrom bitnet.data.tokenizer_training import train_model\n"
        "def sentences():\n    yield 'abc'\n"
        f"    print(flush=True)\n    time.sleep({100 * feeding})\n"
        "train_model(sentences(), {})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    (child,) = map(int, children.read_text(encoding="utf-8").split())
    if not feeding:
        wait_for(slow.exists)
    parent.kill()
    parent.communicate()
    wait_for(lambda: is_gone(child))


def test_a_trainer_whose_parent_is_gone_says_nothing() -> None:
    """The parent is killed when the trainer is about to answer: nobody reads, and nothing is
    printed on the terminal that both had."""
    program = [sys.executable, "-P", str(tokenizer_training.__file__)]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        for frame in (b'{"vocab_size": 100000}', b"too few words"):  # it answers with an error
            child.stdin.write(struct.pack("<q", len(frame)) + frame)
        child.stdin.write(struct.pack("<q", -1))
        child.stdin.flush()
        said = child.stderr.read().decode()
        assert child.wait(timeout=60) == 2
    assert "Traceback" not in said
    assert "Broken pipe" not in said


@pytest.mark.slow
def test_ctrl_c_ends_the_real_trainer(tmp_path: Path) -> None:
    """40 MB of words that hardly ever repeat, which take the trainer minutes."""
    file = tmp_path / "text.txt"
    letters = np.frombuffer(b"etaoinshrdlucmfw  ", dtype=np.uint8)
    text = np.random.default_rng(0).choice(letters, 40_000_000)
    text[99_998::100_000] = text[99_999::100_000] = ord("\n")
    file.write_bytes(text.tobytes())
    command = [sys.executable, "-m", "bitnet", "prepare", str(file), "--vocab-size", "30000"]
    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = subprocess.Popen(
            [*command, "--path", str(tmp_path / "set")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    wait_for(lambda: bool(children.read_text(encoding="utf-8").split()), 300)
    (child,) = map(int, children.read_text(encoding="utf-8").split())
    time.sleep(5)
    assert not is_gone(child)
    begun = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, err = run.communicate()
    assert (run.returncode, b"Traceback" in err) == (130, False)
    assert time.monotonic() - begun < 5
    assert is_gone(child)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", ".set.lock"}
