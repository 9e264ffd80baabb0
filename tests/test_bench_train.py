"""bitnet bench train: real workers once, on a model of a few thousand weights; a shell script that
speaks their protocol where only the parent is in question."""

import dataclasses
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitnet import cli_bench_train
from bitnet.bench import train as bench_train
from bitnet.bench.rows import Figures, counted, percent
from bitnet.bench.rows import read as read_rows
from bitnet.bench.train import Reply, Stepper, build, variant_config
from bitnet.bench.train_rows import COLUMNS, as_text, figures, table
from bitnet.bench.worker import Worker
from bitnet.config import load_config
from bitnet.linear import BitLinear
from bitnet.model import Transformer
from bitnet.throughput import mfu
from bitnet_kernels.bench import machine

Bitnet = Callable[..., tuple[int, str, str]]
CONFIGS = Path(__file__).parents[1] / "configs"
TINY = """
[model]
depth = 1
d_model = 40
n_heads = 2
[data]
vocab_size = 261
seq_len = 12
[optim]
lr = 0.01
warmup_steps = 1
lr_schedule = "constant"
[train]
batch_tokens = 144
micro_batch = 4
steps = 100
"""


def read(path: Path) -> list[Figures]:
    return read_rows(path, COLUMNS)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def bitnet(bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch) -> Bitnet:
    """Runs ``bitnet bench train ...`` on the CPU, whose peak is not measured but 1 TFLOP/s; returns
    exit code, stdout and stderr."""
    monkeypatch.setattr(cli_bench_train, "peak_flops", lambda device, dtype: (1e12, "by hand"))
    return partial(bitnet, "bench", "train", "--device", "cpu", "--threads", "1")


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
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


SPEAK = "while read line; do echo $4 >> $log; echo '[0.25, 0.5, 3.5, 1000, null]'; done"


def expected_fp_losses(path: Path, steps: int) -> list[float]:
    """A training loop as anyone writes it, of the full-precision twin."""
    config = load_config([path], ["model.linear=fp"]).resolve()
    torch.manual_seed(0)
    model = Transformer(config.model)
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    tokens = torch.randint(261, (12, 13), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        losses.append(loss.item())
    return losses


def test_a_run_from_end_to_end(bitnet: Bitnet, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "train.csv"
    variants = ("fp", "ours")
    options = [word for name in variants for word in ("--variant", name)]
    code, said, err = bitnet("--config", tiny, *options, "--steps", 4, "--warmup", 1, "--out", out)
    assert code == 0, err
    assert tuple(out.read_text().splitlines()[0].split(",")) == COLUMNS
    rows = {row["variant"]: row for row in read(out)}
    assert tuple(rows) == variants
    for row in rows.values():
        assert row["variant"] in said
        assert (row["model"], row["base"], row["dtype"]) == (str(tiny), "fp", "fp32")
        assert (row["tokens"], row["micro_batches"], row["steps"]) == ("48", "3", "4")
        assert (row["threads"], row["seq_len"], row["warmup"]) == ("1", "12", "1")
        assert (row["torch"], row["compile_s"], row["joules_token"]) == (torch.__version__, "", "")
        assert 0 < float(row["step_ms_p25"]) <= float(row["step_ms"]) <= float(row["step_ms_p75"])
        assert float(row["speedup_min"]) <= float(row["speedup"]) <= float(row["speedup_max"])
        assert float(row["tokens_s"]) == pytest.approx(144e3 / float(row["step_ms"]), rel=1e-6)
        if sys.platform == "linux":
            assert 50e6 < int(row["peak_bytes"]) < 2e9
        # embedding 261 x 40; q, o 40 x 40; k, v 20 x 40; gate, up, down 128 x 40; norms
        assert int(row["parameters"]) == 10440 + 2 * 1600 + 1600 + 3 * 5120 + 3 * 40 + 128 + 40
        assert f"--out {out}" in row["command"]
    assert float(rows["fp"]["speedup"]) == 1
    loss = {name: float(row["loss"]) for name, row in rows.items()}
    for name in ("naive", "ours-int8"):
        stepper = Stepper(variant_config([tiny], ["train.device=cpu"], name), name)
        loss[name] = [stepper.step() for _ in range(5)][-1]
    # fp32 sums in another order, the updates' Adam ratios amplify them where gradients are small
    assert loss["fp"] == pytest.approx(expected_fp_losses(tiny, 5)[-1], rel=1e-4)
    # the same maths in floats: an activation on a rounding border may fall to the other side,
    # which is 1/127 of the token's largest in one of 40 summands
    assert loss["naive"] == pytest.approx(loss["ours"], abs=1e-3)
    assert loss["ours-int8"] == pytest.approx(loss["ours"], abs=0.05)
    assert abs(loss["fp"] - loss["ours"]) > 1e-2
    assert loss["ours-int8"] != loss["ours"]


def test_figures_by_hand(tiny: Path) -> None:
    names = ("fp", "ours", "fp-compiled", "ours-compiled")
    configs = {name: variant_config([tiny], ["train.dtype=fp32"], name) for name in names}
    seconds = {
        "fp": [9, 1.0, 2.0, 3.0],
        "ours": [9, 2.0, 1.0, 2.0],
        "fp-compiled": [40, 0.5, 0.5, 0.5],
        "ours-compiled": [50, 0.25, 0.5, 0.125],
    }
    peaks = {"fp": 100, "ours": 80, "fp-compiled": 200, "ours-compiled": None}
    replies = {
        name: [Reply(s, s + 1, 4.0 - i, peaks[name], 2 * s) for i, s in enumerate(times)]
        for name, times in seconds.items()
    }
    here, peak = machine.describe(torch.device("cpu")), (5e9, "by hand")
    fp, ours, fp_compiled, ours_compiled = figures("tiny", here, configs, replies, 1, peak)
    assert (fp.step_ms, fp.step_ms_p25, fp.step_ms_p75, fp.speedup) == (2000, 1500, 2500, 1)
    # ratios 1/2, 2/1, 3/2: paired, and so not the ratio 2/2 of the medians
    assert (ours.speedup, ours.speedup_min, ours.speedup_max, ours.base) == (1.5, 0.5, 2, "fp")
    assert (ours.memory_ratio, ours.compile_s, ours.loss) == (0.8, None, 1.0)
    assert (ours.tokens_s, ours.joules_token) == (72, 4 / 144)
    assert (ours_compiled.base, ours_compiled.speedup) == ("fp-compiled", 2)
    assert (ours_compiled.compile_s, fp_compiled.compile_s) == (51, 41)
    assert (ours_compiled.peak_bytes, ours_compiled.memory_ratio) == (None, None)
    flops = configs["fp"].model.flops_per_token(12)
    assert ours.mfu == pytest.approx(mfu(flops, 72, 5e9))
    assert (ours.peak_flops, ours.peak_flops_source) == peak
    alone = figures("tiny", here, {"ours": configs["ours"]}, {"ours": replies["ours"]}, 1, peak)
    assert (alone[0].base, alone[0].speedup) == ("ours", 1)

    row = as_text(ours) | {"device": "A CPU", "commit": "", "torch": "2.1", "date": "today"}
    places = {"1": "A CPU, 1 thread, fp32;", "4": "A CPU, 4 threads,", "": "A CPU, fp32"}
    for threads, said in places.items():
        title = table([row | {"threads": threads}]).splitlines()[0]
        assert said in title
        assert title.endswith("a step is 3 x 48 tokens; 3 steps; torch 2.1, today")
    shares = {"0.875": "| 87.5% |", "1": "| 100.0% |", "1.25": "| ~125.0% |"}
    for share, cell in shares.items():
        assert cell in table([row | {"mfu": share}])
    assert "| 80 B |" in table([row | {"memory_ratio": ""}])
    assert table([]) == "No figures yet."


def test_shares_above_all_of_it_are_marked() -> None:
    assert [percent(share) for share in (0.994, 1.0, 1.04)] == ["99%", "100%", "~104%"]
    assert [counted(n, "step") for n in (0, 1, 2, 4096)] == [
        *("0 steps", "1 step", "2 steps", "4,096 steps"),
    ]


def test_the_peak_is_the_best_of_several(
    bitnet: Bitnet,
    tiny: Path,
    tmp_path: Path,
    worker: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
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


def test_variants_take_turns_and_rows_are_replaced(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Callable[[str], Path]
) -> None:
    log, out = worker(SPEAK), tmp_path / "train.csv"
    three = [word for name in ("fp", "naive", "ours") for word in ("--variant", name)]
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
    bitnet: Bitnet,
    tiny: Path,
    tmp_path: Path,
    worker: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
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
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Callable[[str], Path]
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


def test_what_a_worker_is_told(
    bitnet: Bitnet, tiny: Path, tmp_path: Path, worker: Callable[[str], Path]
) -> None:
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
    bitnet: Bitnet,
    tiny: Path,
    tmp_path: Path,
    worker: Callable[[str], Path],
    last: str,
    how: str,
) -> None:
    dying = "for i in 1 2 3 4 5 6; do echo line $i of the story >&2; done; read line; " + last
    worker(f"if [ $4 = naive ]; then {dying}; fi; {SPEAK}")
    out = tmp_path / "train.csv"
    three = [word for name in ("fp", "naive", "ours") for word in ("--variant", name)]
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
    worker: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    number: signal.Signals,
    expected: int,
) -> None:
    """Neither a worker nor what it started, as a compiler's helpers."""
    log = worker("sleep 1000 & echo $! >> $log; read line; echo '[1, 1, 1, 1, null]'; read line")
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
    options = ("--config", tiny, "--variant", "fp", "--variant", "ours", "--warmup", 1)
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
    (["--variant", "our"], "--variant: 'our' is unknown; did you mean ours?"),
    (["--variant", "ours-compile"], "did you mean ours-compiled?"),
    (["--size", "16m"], "--size: '16m' is unknown; did you mean 15m?"),
    (["--size", "35m"], "did you mean 60m?"),
    (["--size", "0.9B"], "did you mean 1b?"),
    (["--size", "large"], "--size: 'large' is unknown; (valid: 15m, 60m, 350m, 1b)"),
    (["--variant", "ours-int"], "did you mean ours-int8?"),
    (["--variant", "torcha0"], "did you mean torchao?"),
    (["--dtype", "fp16"], "--dtype: 'fp16' is unknown; did you mean bf16?"),
    (["--tokens", "50"], "--tokens: 50 is not a multiple of data.seq_len = 12; the nearest that"),
    (["model.granularity=row"], "naive knows only model.granularity = tensor"),
    (["quant.weights=absmean"], "quant.weights = "),
    (["adapter.kind=lora"], "adapter.kind = "),
    (["optim.lrr=1"], "the nearest is optim.lr"),
    (["--config", "configs/nothing.toml"], "configs/nothing.toml: no such config file"),
    (["--out", "{root}/bad.csv"], "bad.csv: has other columns"),
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
    bitnet: Bitnet,
    tiny: Path,
    tmp_path: Path,
    worker: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_train, "find_spec", lambda name: None)
    worker(SPEAK)
    out = tmp_path / "train.csv"
    usual = [word for name in bench_train.USUAL for word in ("--variant", name)]
    code, said, _ = bitnet("--config", tiny, *usual, "--out", out, "--steps", 1, "--warmup", 1)
    assert code == 0
    assert "torchao-compiled is not measured: torchao is not installed" in said
    variants = ["fp", "naive", "ours", *(f"{n}-compiled" for n in ("fp", "naive", "ours"))]
    assert [row["variant"] for row in read(out)] == [*variants, "ours-int8-compiled"]
    code, _, err = bitnet("--config", tiny, "--variant", "torchao")
    assert (code, err.splitlines()) == (
        2,
        ["error: --variant: torchao is not installed (pip install torchao)"],
    )


def test_stopping_says_what_was_saved(
    bitnet: Bitnet,
    tiny: Path,
    tmp_path: Path,
    worker: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
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


def test_torchao_gets_the_matrices_of_the_layers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    stub = SimpleNamespace(
        quantize_=lambda model, recipe: called.append((model, recipe)), bitnet_training=lambda: "b"
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: stub)
    model = build(variant_config([tiny], [], "torchao"), "torchao")
    assert called == [(model.layers, "b")]
    assert type(model.layers[0].mlp.up_proj) is nn.Linear  # type: ignore[union-attr]


def test_all_variants_begin_with_the_same_weights(tiny: Path) -> None:
    names = ("fp", "naive", "ours")
    models = {name: build(variant_config([tiny], [], name), name) for name in names}
    states = [model.state_dict() for model in models.values()]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    matrices = [model.layers[0].mlp.up_proj for model in models.values()]  # type: ignore[union-attr]
    assert [type(m) for m in matrices] == [nn.Linear, bench_train.NaiveBitLinear, BitLinear]


@pytest.mark.parametrize("size", ["15m", "60m", "350m"])
def test_sizes_are_those_of_the_configs(size: str) -> None:
    named = load_config([CONFIGS / f"{size}.toml"]).resolve().model
    assert load_config([], bench_train.SIZES[size]).resolve().model == named


def test_1b_has_a_large_models_layers() -> None:
    model = load_config([], bench_train.SIZES["1b"]).resolve().model
    whole = dataclasses.replace(model, n_layers=32)
    assert (model.d_model, model.n_layers) == (2048, 8)
    assert 1e9 < whole.num_parameters()["total"] < 2e9


def test_a_naive_layer_multiplies_what_it_quantized() -> None:
    layer = bench_train.NaiveBitLinear(37, 5, bias=False)
    x = torch.randn(3, 37, requires_grad=True)
    gamma = float(layer.weight.detach().abs().mean())
    codes = (layer.weight.detach() / gamma).round().clamp(-1, 1)
    assert codes.unique().tolist() == [-1, 0, 1]
    scale = x.detach().abs().amax(1, keepdim=True) / 127
    x_hat = (x.detach() / scale).round() * scale
    y = layer(x)
    # K = 37 products of fp32, each off by a few 2^-24 of values near 1
    torch.testing.assert_close(y, x_hat @ (codes * gamma).t(), rtol=1e-5, atol=1e-5)
    dy = torch.randn(3, 5)
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(x.grad, dy @ (codes * gamma), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_variants(bitnet: Bitnet, tiny: Path, tmp_path: Path) -> None:
    """The compiler changes no loss: minutes, since each process compiles with an empty cache."""
    out, families = tmp_path / "train.csv", ("fp", "naive", "ours")
    names = [*families, *(f"{family}-compiled" for family in families)]
    options = [word for name in names for word in ("--variant", name)]
    code, _, err = bitnet("--config", tiny, *options, "--steps", 3, "--out", out)
    assert code == 0, err
    rows = {row["variant"]: row for row in read(out)}
    for family in families:
        compiled = rows[f"{family}-compiled"]
        assert float(compiled["loss"]) == pytest.approx(float(rows[family]["loss"]), abs=2e-3)
        assert float(compiled["compile_s"]) > float(compiled["step_ms"]) / 1e3
