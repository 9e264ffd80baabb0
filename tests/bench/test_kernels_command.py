"""bitnet bench kernels: figures that are kept and resumed, estimates that stay apart."""

import dataclasses
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bitnet.cli import bench_kernels as cli_bench
from bitnet_kernels.bench import contenders as contending
from bitnet_kernels.bench import estimate, machine, report, rows, run, timing
from bitnet_kernels.bench.rows import Row
from bitnet_kernels.cpu import native
from bitnet_kernels.dispatch import FORMULATIONS
from tests.helpers.kernel_bench import wrong_by_one

Bitnet = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bitnet(bitnet: Bitnet) -> Bitnet:
    """Runs ``bitnet bench ...``; returns exit code, stdout and stderr."""
    return partial(bitnet, "bench")


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of one call, and a small cache, so that a whole run takes a second."""
    monkeypatch.setattr(timing.CpuBackend, "target", 1e-6)
    monkeypatch.setattr(machine, "_cpu_cache", lambda: 10_000)


# torch in bf16 and fp32; auto, the reference and, where the native library is, both families: two
# dtypes and the product
NATIVE = native.library() is not None
ROWS = 2 + 3 * (4 if NATIVE else 2) + NATIVE  # the read, at few tokens
TINY = ("kernels", "--shape", "40x70", "--m", "2", "--no-estimate", "--device", "cpu")


@pytest.mark.usefixtures("quick_clock")
def test_a_run_is_kept_and_resumed(bitnet: Bitnet, tmp_path: Path) -> None:
    out = tmp_path / "kernels_here.csv"
    code, said, err = bitnet(*TINY, "--m", "5", "--cache", "cold", "--out", out)
    assert code == 0, err
    assert "40x70 M=5 cold" in said
    first = rows.read(out)
    assert {one.m for one in first} == {2, 5}
    assert {one.source for one in first} == {"measured"}
    assert len(first) == 2 * ROWS - NATIVE  # 5 tokens are too many for a read
    assert all(one.median_us and one.p10_us <= one.median_us <= one.p90_us for one in first)  # type: ignore[operator]
    assert {one.exact for one in first if one.contender == "bitnet"} == {"yes"}
    assert f"--out {out}" in first[0].command
    stamp = out.stat().st_mtime_ns
    code, said, _ = bitnet(*TINY, "--m", "5", "--cache", "cold", "--out", out)
    assert (code, out.stat().st_mtime_ns) == (0, stamp)  # nothing left to do
    bitnet(*TINY, "--out", out)  # M = 2 with a hot cache is new
    assert rows.read(out)[: len(first)] == first
    assert len(rows.read(out)) == len(first) + ROWS
    rows.write(out, [dataclasses.replace(one, code="older") for one in first])
    bitnet(*TINY, "--cache", "cold", "--out", out)
    assert {one.m for one in rows.read(out) if one.code == "older"} == {5}  # the others anew


@pytest.mark.usefixtures("quick_clock")
def test_an_interrupted_run_keeps_what_it_measured(
    bitnet: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kernels_here.csv"
    measure = run.Bench.measure
    turns = itertools.count()

    def interrupted(self: run.Bench, group: run.Group) -> list[Row]:
        if next(turns) == 1:
            raise KeyboardInterrupt
        return measure(self, group)

    monkeypatch.setattr(run.Bench, "measure", interrupted)
    code, said, _ = bitnet(*TINY, "--out", out)
    assert code == 130
    assert "the same command goes on" in said
    assert {one.cache for one in rows.read(out)} == {"cold"}
    assert bitnet(*TINY, "--out", out)[0] == 0
    assert {one.cache for one in rows.read(out)} == {"cold", "hot"}


@pytest.mark.usefixtures("quick_clock")
def test_an_inexact_op_ends_the_command(
    bitnet: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kernels_here.csv"
    monkeypatch.setattr(contending, "ternary_linear", wrong_by_one("ternary_linear"))
    code, _, err = bitnet(*TINY, "--out", out)
    assert code == 1
    assert "error: not exact, so not timed: bitnet auto linear bf16 at N x K = 40x70, M = 2" in err
    assert not out.exists()


MISTAKES = [
    (["--shape", "4096"], "--shape: '4096' is not NxK"),
    (["--shape", "0x64"], "--shape: '0x64'"),
    (["--model", "llama-8b"], "did you mean llama3-8b?"),
    (["--kernel", "popcnt"], "did you mean popcount?"),
    (["--dtype", "f16"], "--dtype: 'f16' is none of bf16, fp16, fp32; did you mean fp16?"),
    (["--cache", "warm"], "--cache: 'warm' is none of cold, hot"),
    (["--arch", "sm_91"], "did you mean sm_90?"),
    (["--all", "--quick"], "--all and --quick exclude each other"),
    (["--device", "tpu"], "--device: 'tpu' cannot be used here"),
    (["--device", "meta"], "--device: 'meta'"),
    (["--out", "{root}/bad.csv"], "bad.csv: line 1: is not a header"),
    (["--out", "/proc/none/x.csv", "--shape", "9x9", "--m", "1"], "/proc/none"),
]


@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[" ".join(m[0])[:30] for m in MISTAKES])
def test_mistakes_are_one_line(
    bitnet: Bitnet, tmp_path: Path, args: list[str], message: str
) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    options = [arg.format(root=tmp_path) for arg in args]
    code, _, err = bitnet("kernels", "--no-estimate", *options)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line


# estimates


def stub_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in place of that of the compiled kernels: sad 5 us, the others 3."""
    monkeypatch.setattr(
        estimate, "estimate_us", lambda name, config, sm, m, n, k: 5.0 if name == "sad" else 3.0
    )


@pytest.mark.usefixtures("quick_clock")
def test_estimates_stay_apart(
    bitnet: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows, in files, and in tables, of which none may show an estimate beside a measurement."""
    stub_estimates(monkeypatch)
    out = tmp_path / "kernels_here.csv"
    args = ("kernels", "--shape", "40x70", "--m", "2", "--cache", "cold", "--device", "cpu")
    code, said, err = bitnet(*args, "--out", out, "--arch", "sm_90", "--arch", "sm_80")
    assert code == 0, err
    assert "nothing was run" in said
    assert {one.source for one in rows.read(out)} == {"measured"}
    guesses = rows.read(tmp_path / cli_bench.ESTIMATES)
    assert {one.source for one in guesses} == {"estimate"}
    assert {one.device for one in guesses} == {"H100 (sm_90)", "A100 80GB (sm_80)"}
    assert {one.formulation for one in guesses} == {"bf16", *FORMULATIONS}
    everything = report.load(tmp_path)
    text = report.details(everything)
    parts = text.split("\n\n**")
    assert len(parts) == 3
    measured, first, second = parts
    assert "measured" in measured
    assert "estimate" not in measured
    for part in (first, second):
        assert "estimate" in part.splitlines()[0]
        assert "nothing was run" in part.splitlines()[0]
        assert "measured" not in part
        assert re.search(r"\| addsub \| \d+\.\d\d popcount \|", part)  # 3 us, sad 5


def test_no_triton_is_one_line(
    bitnet: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "triton_installed", lambda: False)
    monkeypatch.setattr(cli_bench, "_measure", lambda *args: None)
    code, said, _ = bitnet(*TINY[:5], "--device", "cpu", "--out", tmp_path / "kernels_x.csv")
    assert code == 0
    assert (
        said.splitlines().count("no GPU estimates: they need Triton, which is not installed") == 1
    )
    assert not (tmp_path / cli_bench.ESTIMATES).exists()


def test_measured_columns_need_no_triton(tmp_path: Path) -> None:
    out = tmp_path / "kernels_here.csv"
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from bitnet_kernels.bench import machine, timing\n"
        "timing.CpuBackend.target = 1e-6\n"
        "machine._cpu_cache = lambda: 10_000\n"
        "from bitnet.cli.main import main\nmain()"
    )
    args = ["bench", *TINY, "--out", str(out), "--cache", "hot"]
    child = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert len(rows.read(out)) == ROWS
