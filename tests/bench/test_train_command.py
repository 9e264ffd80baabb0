"""The command bitnet bench train, with a shell script that speaks the workers' protocol."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.bench import train as bench_train
from bitnet.bench.worker import Worker
from bitnet.cli import bench_train as cli_bench_train
from bitnet.config import load_config
from tests.helpers.train_bench import Bitnet, bitnet, read, tiny, variants

__all__ = ["bitnet", "tiny"]  # fixtures
Put = Callable[[str], Path]
SPEAK = "while read line; do echo $4 >> $log; echo '[0.25, 0.5, 3.5, 1000, null, null]'; done"


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts a shell script in the workers' place; returns the file that it may write to. ``$4`` is
    the variant."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def put(script: str) -> Path:
        path, log = tmp_path / "worker.sh", tmp_path / "log"
        path.write_text(f"#!/bin/sh\nlog={log}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return log

    return put


def test_the_peak_is_the_best_of_several(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One before each of the first turns; a busy machine lowers all but one."""
    log, out = worker(SPEAK), tmp_path / "train.csv"
    tries: list[int] = []

    def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
        assert (device.type, dtype) == ("cpu", torch.float32)
        tries.append(len(log.read_text().split()) if log.exists() else 0)
        return (9e9 if len(tries) == 3 else 1e9 * len(tries)), "measured"

    monkeypatch.setattr(cli_bench_train, "peak_flops", peak)
    options = ("--config", tiny, "--variant", "fp", "--steps", 6, "--warmup", 1, "--out", out)
    assert bitnet(*options)[0] == 0
    assert tries == [0, 1, 2, 3, 4]
    assert float(read(out)[0]["peak_flops"]) == 9e9


def test_paths_are_no_markup(bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put) -> None:
    worker(SPEAK)
    config = tmp_path / "a[" / "b].toml"  # "[/b]" closes a tag that nobody opened
    config.parent.mkdir()
    config.write_text(tiny.read_text())
    out = tmp_path / "[/red].csv"
    code, said, _ = bitnet("--config", config, "--out", out, *variants("fp"))
    assert code == 0
    assert f"figures: {out}" in said
    assert f"**{config}**" in said


def test_variants_take_turns_and_rows_are_replaced(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put
) -> None:
    log, out = worker(SPEAK), tmp_path / "train.csv"
    three = variants("fp", "naive", "ours")
    options = ("--config", tiny, "--out", out, "--warmup", 2)
    assert bitnet(*options, *three, "--steps", 3)[0] == 0
    rounds = "fp naive ours ours naive fp fp naive ours"
    assert log.read_text().split() == f"fp fp naive naive ours ours {rounds}".split()
    assert not list((tmp_path / "temporary").iterdir())
    first = read(out)
    worker(SPEAK.replace("0.25", "0.125"))
    assert bitnet(*options, "--variant", "naive", "--steps", 3)[0] == 0
    assert [float(row["step_ms"]) for row in read(out)] == [250, 125, 250]
    assert [row for row in read(out) if row["variant"] != "naive"] == [first[0], first[2]]
    assert bitnet(*options, "--variant", "naive", "--steps", 2)[0] == 0
    assert [row["steps"] for row in read(out)] == ["3", "3", "3", "2"]  # no long one is replaced
    assert bitnet(*options, "--variant", "fp", "--tokens", 24, "optim.beta1=0.8")[0] == 0
    last = read(out)[-1]  # another thing, so another row
    assert (len(read(out)), last["model"]) == (5, f"{tiny} optim.beta1=0.8")
    assert (last["tokens"], last["micro_batches"]) == ("24", "6")


def test_a_quick_run_writes_nothing_unless_told_where(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "docs/results"
    results.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    worker(SPEAK)
    options = ("--config", tiny, "--variant", "fp")
    code, said, _ = bitnet(*options, "--quick")
    assert code == 0
    assert "| fp | 250.0 (" in said
    assert said.splitlines()[-1] == "nothing is written; --out FILE keeps the figures"
    assert not list(results.iterdir())
    assert bitnet(*options, "--quick", "--out", "x.csv")[0] == 0
    assert len(read(tmp_path / "x.csv")) == 1
    assert bitnet(*options, "--steps", 1, "--warmup", 1)[0] == 0
    assert [path.name[:6] for path in results.iterdir()] == ["train_"]


def test_a_cpu_is_asked_for_minutes(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put
) -> None:
    """15m in three eager variants, in steps that take seconds; a config's steps are its own."""
    worker(SPEAK)
    out = tmp_path / "train.csv"
    code, said, _ = bitnet("--out", out)
    assert code == 0
    line, plan = said.splitlines()[:2]
    assert line == "on a CPU fp, naive, ours are measured; --variant names others"
    assert plan == "15m: 3 variants x 7 steps of 4,096 tokens"
    for row in read(out):
        assert (row["model"], row["steps"], row["warmup"]) == ("15m", "5", "2")
        assert (row["tokens"], row["micro_batches"]) == ("2048", "2")
    one = ("--variant", "fp", "--steps", 1, "--warmup", 1, "--out", out)
    plans = {
        ("--config", tiny): f"{tiny}: 1 variant x 2 steps of 144 tokens",
        ("--size", "15m", "--tokens", 1024): "15m: 1 variant x 2 steps of 4,096 tokens",
        ("--size", "15m", "--micro-batches", 3): "15m: 1 variant x 2 steps of 6,144 tokens",
        ("data.seq_len=4096",): "15m: 1 variant x 2 steps of 8,192 tokens",
        ("train.batch_tokens=65536",): "15m: 1 variant x 2 steps of 65,536 tokens",
        ("--size", "15m", "--size", "60m"): "15m: 1 variant x 2 steps of 4,096 tokens\n"
        "60m: 1 variant x 2 steps of 4,096 tokens",
    }
    for asked, expected in plans.items():
        code, said, err = bitnet(*asked, *one)
        assert code == 0, err
        assert said.startswith(expected + "\n")


def test_what_a_worker_is_told(bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put) -> None:
    log = worker(f'cat "$5" >> $log; {SPEAK}')
    options = ("--quick", "--variant", "naive", "--tokens", 36, "--dtype", "bf16", "--seed", 7)
    code, _, err = bitnet("--config", tiny, *options, "--out", tmp_path / "x.csv")
    assert code == 0, err
    path = tmp_path / "told.toml"
    path.write_text(log.read_text().removesuffix("naive\n" * 4))
    told = load_config([path]).resolve()
    assert (told.model.linear, told.train.dtype, told.train.device) == ("ternary", "bf16", "cpu")
    assert (told.train.micro_batch, told.train.batch_tokens, told.run.seed) == (3, 36, 7)

    worker(SPEAK)
    named = ("--quick", "--variant", "fp", "--steps", 2, "--micro-batches", 5)
    assert bitnet("--config", tiny, *named, "--out", tmp_path / "y.csv")[0] == 0
    (row,) = read(tmp_path / "y.csv")
    assert (row["warmup"], row["steps"]) == ("1", "2")
    assert (row["tokens"], row["micro_batches"]) == ("12", "5")


@pytest.mark.parametrize(
    ("last", "how"), [("exit 3", "exit code 3"), ("kill -9 $$", "signal 9")], ids=["exit", "killed"]
)
def test_a_worker_that_dies_is_named(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put, last: str, how: str
) -> None:
    dying = "for i in 1 2 3 4 5 6; do echo line $i of the story >&2; done; read line; " + last
    worker(f"if [ $4 = naive ]; then {dying}; fi; {SPEAK}")
    out = tmp_path / "train.csv"
    three = variants("fp", "naive", "ours")
    code, _, err = bitnet("--config", tiny, *three, "--out", out)
    assert code == 1
    first, *story = err.splitlines()
    assert first == f"error: naive: its process ended ({how})"
    assert story[:5] == [f"  line {i} of the story" for i in range(2, 7)]
    assert ("out of memory?" in err) == (how == "signal 9")
    assert not out.exists()


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_a_signal_leaves_no_process_behind(
    bitnet: Bitnet,
    tiny: Path,
    tmp_path: Path,
    worker: Put,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    number: signal.Signals,
    expected: int,
) -> None:
    """Neither a worker nor what it started, as a compiler's helpers."""
    log = worker(
        "sleep 1000 & echo $! >> $log; read line; echo '[1, 1, 1, 1, null, null]'; read line"
    )
    begun: list[Worker] = []
    ask = Worker.ask
    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted(self: Worker, method: str) -> Any:
        begun.append(self)
        if len(begun) == 3:
            signal.raise_signal(number)
        return ask(self, method)

    monkeypatch.setattr(Worker, "ask", interrupted)
    options = ("--config", tiny, *variants("fp", "ours"), "--warmup", 1)
    code, said, err = bitnet(*options, "--out", tmp_path / "train.csv")
    assert (code, err) == (expected, "")
    stopped = [line for line in said.splitlines() if line.startswith("stopped")]
    assert stopped == (["stopped; nothing is written"] if number == signal.SIGINT else [])
    assert not list((tmp_path / "temporary").iterdir())
    assert {one.name for one in begun} == {"fp", "ours"}
    assert all(one.process.returncode == -signal.SIGKILL for one in begun)
    sleeping = [int(pid) for pid in log.read_text().split()]
    assert len(sleeping) == 2
    until = time.monotonic() + 10
    while any(alive(pid) for pid in sleeping) and time.monotonic() < until:
        time.sleep(0.01)  # who has adopted them has yet to take notice
    assert not any(alive(pid) for pid in sleeping)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits for its parent does not)."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


MISTAKES = [
    (["--variant", "our"], "--variant: 'our' is none of fp, naive, ours, ours-int8, torchao, fp-"),
    (["--variant", "our"], "-compiled; did you mean ours?"),
    (["--variant", "ours-compile"], "did you mean ours-compiled?"),
    (["--size", "16m"], "--size: '16m' is none of 15m, 60m, 350m, 1b; did you mean 15m?"),
    (["--size", "35m"], "did you mean 60m?"),
    (["--size", "0.9B"], "did you mean 1b?"),
    (["--size", "large"], "--size: 'large' is none of 15m, 60m, 350m, 1b"),
    (["--variant", "ours-int"], "did you mean ours-int8?"),
    (["--variant", "torcha0"], "did you mean torchao?"),
    (["--dtype", "fp16"], "--dtype: 'fp16' is none of auto, fp32, bf16; did you mean bf16?"),
    (["--tokens", "50"], "--tokens: 50 is not a multiple of data.seq_len = 12; the nearest that"),
    (["model.granularity=row"], "naive knows only model.granularity = tensor"),
    (["quant.weights=absmean"], "quant.weights = "),
    (["adapter.kind=lora"], "adapter.kind = "),
    (["optim.lrr=1"], "the nearest is optim.lr"),
    (["--config", "configs/nothing.toml"], "configs/nothing.toml: no such config file"),
    (["--out", "{root}/bad.csv"], "bad.csv: has other columns"),
    (["--out", "{root}/bad.csv/x.csv"], "--out: cannot write"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[" ".join(m[0])[:30] for m in MISTAKES])
def test_mistakes_are_one_line(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    options = [arg.format(root=tmp_path) for arg in args]
    code, said, err = bitnet("--config", tiny, *options)
    assert (code, said) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_without_torchao_a_line_says_so(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "find_spec", lambda name: None)
    worker(SPEAK)
    out = tmp_path / "train.csv"
    usual = variants(*bench_train.USUAL)
    code, said, _ = bitnet("--config", tiny, *usual, "--out", out, "--steps", 1, "--warmup", 1)
    assert code == 0
    assert "torchao-compiled is not measured: torchao is not installed" in said
    eager = ("fp", "naive", "ours")
    measured = [*eager, *(f"{name}-compiled" for name in eager), "ours-int8-compiled"]
    assert [row["variant"] for row in read(out)] == measured
    code, _, err = bitnet("--config", tiny, "--variant", "torchao")
    assert (code, err.splitlines()) == (
        2,
        ["error: --variant: torchao is not installed (pip install torchao)"],
    )


def test_stopping_says_what_was_saved(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(SPEAK)
    ask, turns = Worker.ask, list[str]()

    def interrupted(self: Worker, method: str) -> Any:
        turns.append(self.name)
        if len(turns) == 4:  # in the second model
            raise KeyboardInterrupt
        return ask(self, method)

    monkeypatch.setattr(Worker, "ask", interrupted)
    options = ("--variant", "fp", "--steps", 2, "--warmup", 1, "--config", tiny, "--size", "15m")
    out = tmp_path / "train.csv"
    code, said, _ = bitnet(*options, "--out", out)
    assert code == 130
    assert said.splitlines()[-1] == f"stopped; {tiny}: figures are in {out}"
    assert [row["model"] for row in read(out)] == [str(tiny)]
