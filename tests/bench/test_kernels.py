"""The benchmark of the kernels: what is timed, that it is right, and how long it takes."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import statistics
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.config import load_config
from bitnet_kernels import ternary_matmul
from bitnet_kernels.bench import contenders as contending
from bitnet_kernels.bench import machine, run, shapes, timing, verify
from bitnet_kernels.cpu import native
from tests.helpers.kernel_bench import wrong_by_one

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "shapes": ((70, 130),),
    "tokens": (3,),
    "kernels": ("auto", "reference"),
    "dtypes": ("bf16",),
}
HERE = machine.Machine(CPU, "Test CPU", 1000, None, None, None, "", 1)


class FakeClock:
    """A backend whose runs take what a list says, in seconds a call, on no clock at all."""

    target = 1.0

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self.order: list[Any] = []

    def seconds(self, run: Callable[[], None]) -> float:
        run()
        return self._seconds()

    def record(self, call: timing.CALL, copies: int, calls: int) -> timing.Recorded:
        last: list[Tensor] = []

        def replay() -> None:
            for i in range(calls):
                last[:] = [call(i % copies)]

        return timing.Recorded(replay, lambda: last[0], calls)


# what is timed


@pytest.mark.parametrize("name", ["125m", "350m", "700m"])
def test_our_models_are_those_of_the_configs(name: str) -> None:
    config = load_config([str(ROOT / "configs" / f"{name}.toml")], ["model.vocab_size=32768"])
    separate = config.resolve().model.matrices()
    fused = shapes.MODELS[name].matrices()
    d = separate["self_attn.q_proj"][1]
    qkv = sum(separate[f"self_attn.{part}_proj"][0] for part in "qkv")
    assert fused["qkv"] == (qkv, d)
    assert fused["o"] == separate["self_attn.o_proj"]
    assert fused["gate+up"] == (2 * separate["mlp.gate_proj"][0], d)
    assert fused["down"] == separate["mlp.down_proj"]


def test_published_models_and_goals() -> None:
    # Llama 3 8B and 70B, BitNet 2B4T: fused shapes worked out by hand from their config.json
    assert shapes.MODELS["llama3-8b"].matrices() == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate+up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert shapes.MODELS["llama3-70b"].matrices()["qkv"] == (10240, 8192)
    assert shapes.MODELS["bitnet-2b4t"].matrices()["qkv"] == (3840, 2560)
    everything = shapes.shapes_of(list(shapes.MODELS))
    assert len(everything) == len(set(everything))
    assert set(shapes.GOALS) <= set(everything)
    sizes = [n * k for n, k in everything]
    assert sizes == sorted(sizes)
    assert shapes.TOKENS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    assert shapes.GOALS[8192, 28672][1] == (5.5, 7.5)
    assert shapes.GOALS[2560, 6912][4096] == (1.2, 1.7)
    assert shapes.users(4096, 14336) == "llama3-8b down"


def test_contenders_of_a_gpu_are_every_formulation() -> None:
    asked = (contending.choices(), ("bf16",), run.WHATS)
    cuda = torch.device("cuda")
    names = {(one.formulation, one.what) for one in contending.contenders(cuda, *asked, 1)}
    for kernel in ("sad", "popcount", "dp4a", "gemm", "unpacked", "auto", "reference"):
        assert {(kernel, "linear"), (kernel, "matmul")} <= names
    many = {one.formulation for one in contending.contenders(cuda, *asked, 512)}
    assert {"gemm", "unpacked", "auto", "bf16"} <= many
    assert not many & {"sad", "popcount", "dp4a"}
    only = contending.contenders(cuda, ("addsub",), ("bf16",), ("linear",), 1)
    assert [one.formulation for one in only] == ["bf16", "sad", "popcount"]
    # without 16 bits there would be no ratio
    assert contending.contenders(CPU, (), ("fp32",), run.WHATS, 1)[-1].formulation == "bf16"
    on_cpu = contending.contenders(CPU, *asked, 1)
    families = set() if native.library() is None else {"addsub", "dot", "sum"}
    assert {one.formulation for one in on_cpu} == {"bf16", "auto", "reference"} | families


def test_bytes_moved_by_hand() -> None:
    found = contending.contenders(CPU, ("reference",), ("bf16",), run.WHATS, 3)
    by = {(one.who, one.what): one.bytes_moved(3, 70, 130) for one in found}
    # 130 columns are padded to 192: 48 bytes per row
    assert by["torch", "linear"] == 2 * (70 * 130 + 3 * 130 + 3 * 70)
    assert by["bitnet", "linear"] == 70 * 48 + 2 * (3 * 130 + 3 * 70)
    assert by["bitnet", "matmul"] == 70 * 48 + 3 * 130 + 4 * 3 * 70


@pytest.mark.skipif(native.library() is None, reason="needs the native library")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_read_adds_every_word_up(threads: int) -> None:
    problem = contending.make_problem(71, 3 * 64, 1, CPU)
    words = struct.unpack(f"<{problem.packed.nbytes // 8}Q", problem.packed.numpy().tobytes())
    expected = sum(words) % 2**64
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        total = int(contending.READ.build(problem, 2)(1))
    finally:
        torch.set_num_threads(before)
    assert total % 2**64 == expected
    assert contending.READ.bytes_moved(1, 71, 3 * 64) == problem.packed.nbytes


@pytest.mark.skipif(native.library() is None, reason="needs the native library")
def test_a_share_of_a_read_by_a_fake_clock() -> None:
    """torch's matmul takes 8 s a call, the product 3 s, the read 2 s."""
    takes = {torch.bfloat16: 8.0, torch.int32: 3.0, torch.int64: 2.0}
    last: list[torch.dtype] = []

    class Clock(FakeClock):
        def record(self, call: timing.CALL, copies: int, calls: int) -> timing.Recorded:
            def noted(i: int) -> Tensor:
                y = call(i)
                last.append(y.dtype)
                return y

            return super().record(noted, copies, 1)

    choice = run.Selection(**SMALL | {"kernels": ("dot",)}, caches=("hot",), whats=("matmul",))
    (group,) = run.groups(choice, CPU)
    assert [one.formulation for one in group.contenders] == ["bf16", "dot", "sum"]
    bench = run.Bench(HERE, choice, Clock(lambda: takes[last[-1]]))
    base, dot, read = bench.measure(group)
    assert base.roofline_share is None
    assert (dot.roofline_share, read.roofline_share) == (pytest.approx(2 / 3), 1)


def test_packages_that_are_not_there_are_said() -> None:
    cuda = torch.device("cuda")
    lines = contending.missing(contending.choices(), cuda)
    expected = [name for name in ("gemlite", "torchao") if importlib.util.find_spec(name) is None]
    assert [line.split()[0] for line in lines] == expected
    assert all("\n" not in line for line in lines)
    assert contending.missing(("auto",), cuda) == []


# nothing is timed that is not right


def problem(n: int = 70, k: int = 130, m: int = 3) -> contending.Problem:
    return contending.make_problem(n, k, m, CPU)


@pytest.mark.parametrize("budget", [2**31, 1])
def test_the_oracle_knows_right_from_wrong(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """In full, and by a sample of rows and a random combination of all of them."""
    monkeypatch.setattr(verify, "_BUDGET", budget)
    monkeypatch.setattr(verify, "_CHUNK", 300)  # several pieces
    p = problem()
    acc = torch.tensor(
        [[sum(int(a) * int(b) for a, b in zip(x, w, strict=True)) for w in p.codes] for x in p.x_q],
        dtype=torch.int32,
    )
    verify.check_accumulators(acc, p.x_q, p, "right")
    for at in [(0, 0), (2, 69), (1, 37), (2, 33)]:
        wrong = acc.clone()
        wrong[at] += 1
        with pytest.raises(
            verify.Inexact, match="sad: wrong accumulators at N x K = 70x130, M = 3"
        ):
            verify.check_accumulators(wrong, p.x_q, p, "sad")
    with pytest.raises(verify.Inexact, match="int64"):
        verify.check_accumulators(acc.long(), p.x_q, p, "sad")
    other = ternary_matmul(p.x_q, p.packed.flip(0))
    with pytest.raises(verify.Inexact, match="wrong accumulators"):
        verify.check_accumulators(other, p.x_q, p, "sad")


@pytest.mark.parametrize("at", ["ternary_matmul", "ternary_linear"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_wrong_op_is_refused_and_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, at: str, calls: int
) -> None:
    """Wrong at once, on another copy of the weights, or only when it is replayed."""
    monkeypatch.setattr(contending, at, wrong_by_one(at, calls))
    timed: list[str] = []
    monkeypatch.setattr(run, "interleave", lambda *args: timed.append("timed"))
    choice = run.Selection(**SMALL, caches=("cold",))
    bench = run.Bench(HERE, choice, FakeClock(lambda: 1.0))
    (group,) = run.groups(choice, CPU)
    what = at.removeprefix("ternary_")
    with pytest.raises(verify.Inexact, match=f"bitnet auto {what}.* 1 of 210 outputs are wrong"):
        bench.measure(group)
    assert timed == []


def test_a_wrong_reference_is_found_by_the_fp64_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.reference.ternary_matmul
    monkeypatch.setattr(
        verify.reference, "ternary_matmul", lambda x_q, packed: right(x_q, packed) + 1
    )
    with pytest.raises(verify.Inexact, match="reference: wrong accumulators"):
        verify.Judge(problem()).expected("matmul", "int8")


def test_tolerances_of_16_bit_matmuls() -> None:
    p = problem()
    judge = verify.Judge(p)
    (bf16,) = contending.baselines(CPU, ("bf16",))
    y = bf16.build(p, 1)(0)
    assert re.fullmatch(r"rel [1-9]\.\de-03", judge.check(bf16, y))  # bf16 rounds to 2^-9
    for wrong in (y * 1.1, y.flip(0), torch.full_like(y, math.nan)):
        with pytest.raises(verify.Inexact, match="relative error"):
            judge.check(bf16, wrong)


def test_another_projects_failure_is_a_row_that_says_why() -> None:
    def build(problem: contending.Problem, copies: int) -> timing.CALL:
        raise AssertionError("needs a GPU of theirs\nand more")

    p = problem()
    other = contending.Contender("theirs", "other", "x", "linear", "bf16", 2, 0.01, build)
    mine = contending.contenders(CPU, ("auto",), ("bf16",), ("linear",), p.m)
    said: list[str] = []
    choice = run.Selection(**SMALL)
    bench = run.Bench(HERE, choice, FakeClock(lambda: 1.0), say=said.append)
    group = run.Group(70, 130, 3, "hot", [*mine, other])
    found = bench.measure(group)
    (left_out,) = [one for one in found if one.contender == "theirs"]
    assert left_out.skipped == "needs a GPU of theirs"
    assert left_out.median_us is None
    assert said == ["theirs x linear bf16 is left out: needs a GPU of theirs"]
    assert bench.done(group, found)
    wrong = dataclasses.replace(other, build=lambda p, copies: lambda i: torch.zeros(p.m, p.n))
    found = bench.measure(group._replace(contenders=[*mine, wrong]))
    assert any("relative error" in one.skipped for one in found)


# timing


def test_quantiles_are_those_of_the_standard_library() -> None:
    values = [torch.rand(1).item() for _ in range(23)]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    assert timing.quantile(values, 0.1) == pytest.approx(tenths[0], rel=1e-12)
    assert timing.quantile(values, 0.5) == statistics.median(values)
    assert timing.quantile(values, 0.9) == pytest.approx(tenths[8], rel=1e-12)
    assert timing.quantile([3.0], 0.9) == 3.0


def test_copies_exceed_the_cache() -> None:
    l2 = 50 * 2**20
    for weight_bytes in (1, 1000, 14_680_064, l2, 2 * l2, 4 * l2, 100 * l2):
        copies = timing.copies_needed(weight_bytes, l2, "cold")
        assert copies >= 2
        assert copies * weight_bytes > 2 * l2
        assert (copies - 1) * weight_bytes <= 4 * l2 or copies == 2
        assert timing.copies_needed(weight_bytes, l2, "hot") == 1
    assert timing.copies_needed(14_680_064, l2, "cold") == 15  # 4 * 50 MiB / 14.7 MB, and one more


def test_contenders_take_turns() -> None:
    order: list[str] = []
    replays = {
        name: timing.Recorded(lambda name=name: order.append(name), lambda: torch.empty(0), calls)  # type: ignore[misc]
        for name, calls in (("a", 1), ("b", 2), ("c", 4))
    }
    ticks = itertools.count(1)
    clock = FakeClock(lambda: float(next(ticks)))
    seconds = timing.interleave(replays, clock, 4, "cold")
    assert "".join(order) == "abcbcacababc"
    assert seconds == {
        "a": [1, 6, 8, 10],
        "b": [2 / 2, 4 / 2, 9 / 2, 11 / 2],
        "c": [0.75, 1.25, 1.75, 3],
    }
    order.clear()
    timing.interleave(replays, clock, 1, "hot")  # each is warmed by a run that is not timed
    assert "".join(order) == "aabbcc"


def test_a_replay_is_long_enough_for_its_clock() -> None:
    called: list[int] = []

    def call(i: int) -> Tensor:
        called.append(i)
        return torch.tensor(i)

    class Clock(FakeClock):
        def seconds(self, run: Callable[[], None]) -> float:
            before = len(called)
            run()
            return 0.013 * (len(called) - before)

    recorded = timing.record(call, 5, Clock(float))
    assert recorded.calls == round(1.0 / 0.013)
    assert timing.record(call, 5, FakeClock(lambda: 99.0)).calls == 1


def test_a_cpu_replay_goes_on_with_the_rotation() -> None:
    called: list[int] = []

    def call(i: int) -> Tensor:
        called.append(i)
        return torch.tensor(i)

    backend = timing.CpuBackend()
    recorded = backend.record(call, 3, 4)
    assert backend.seconds(recorded.run) > 0
    recorded.run()
    assert called == [0, 1, 2, 0, 1, 2, 0, 1]
    assert recorded.output().item() == 1


def test_figures_of_a_group_by_a_fake_clock() -> None:
    """The bf16 matmul takes 8 s a call, all of ours 2 s; then what follows from it, by hand."""
    now = {"seconds": 2.0}

    class Clock(FakeClock):
        def record(self, call: timing.CALL, copies: int, calls: int) -> timing.Recorded:
            made = super().record(call, copies, 1)

            def replay() -> None:
                made.run()
                now["seconds"] = (
                    8.0 if made.output().dtype == torch.bfloat16 and slow(made) else 2.0
                )

            return made._replace(run=replay)

    def slow(made: timing.Recorded) -> bool:
        return not torch.equal(made.output(), expected)

    choice = run.Selection(**(SMALL | {"kernels": ("auto",)}), caches=("cold",))
    machine_ = HERE._replace(bandwidth=1e4, ops_16bit=1e9, ops_int8=27300.0)
    bench = run.Bench(machine_, choice, Clock(lambda: now["seconds"]))
    (group,) = run.groups(choice, CPU)
    p = problem()
    expected = verify.Judge(p).expected("linear", "bf16")
    found = {(one.formulation, one.what): one for one in bench.measure(group)}
    base, linear, matmul = found["bf16", "linear"], found["auto", "linear"], found["auto", "matmul"]
    assert (base.median_us, linear.median_us, matmul.median_us) == (8e6, 2e6, 2e6)
    assert (base.ratio_to_16bit, linear.ratio_to_16bit) == (1.0, 4.0)
    assert linear.gb_s == (70 * 48 + 2 * (3 * 130 + 3 * 70)) / 2 / 1e9
    assert linear.roofline_share == pytest.approx(2 * 3 * 70 * 130 / 27300 / 2)  # by its arithmetic
    assert base.roofline_share == pytest.approx(2 * (70 * 130 + 3 * 200) / 1e4 / 8)  # by its bytes
    assert (linear.exact, matmul.exact) == ("yes", "yes")
    assert (linear.replays, linear.calls, linear.threads) == (20, 1, 1)
    assert linear.dtype == "bf16"
    assert matmul.dtype == "int8"


def test_energy_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(machine.time, "perf_counter", lambda: 0.1 * next(ticks))
    runs: list[int] = []

    class Counter:
        def millijoules(self) -> int:
            return 1000 + 30 * len(runs)

        def milliwatts(self) -> int:
            return 400_000

    joules = machine.joules_a_run(Counter(), lambda: runs.append(1), lambda: None)  # type: ignore[arg-type]
    assert joules == pytest.approx(0.03)
    assert len(runs) >= 4

    class NoCounter(Counter):
        def millijoules(self) -> int:
            raise RuntimeError("not supported")

    ticks = itertools.count()
    joules = machine.joules_a_run(NoCounter(), lambda: None, lambda: None)  # type: ignore[arg-type]
    assert joules == pytest.approx(400 * 0.1, rel=0.3)  # a run a tenth of a second at 400 W


def test_figures_name_the_commit() -> None:
    """That of the checkout; "" where there is none."""
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    head = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert machine.commit().removesuffix("-dirty") == head.stdout.strip()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu avx2 fma", "AMD EPYC (AVX2)"),
        ("fpu avx2 avx512f avx512_vnni", "AMD EPYC (AVX-512 VNNI)"),
        ("avx512f amx_int8 avx512_bf16 avx2", "AMD EPYC (AMX)"),
        ("fpu sse2", "AMD EPYC"),
    ],
)
def test_cpus_with_one_model_name_are_told_apart(flags: str, name: str) -> None:
    cpuinfo = f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n\n" * 2
    assert machine.cpu_name(cpuinfo) == f"{name}, {os.cpu_count()} CPUs"


def test_a_cpu_that_linux_does_not_name_has_no_name() -> None:
    assert machine.cpu_name("CPU implementer\t: 0x41\nFeatures\t: asimd\n") == ""
