"""Speed by a clock that the test moves, peaks by their datasheets, memory by what was allocated."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitnet.schema import UserError
from bitnet.training import throughput
from bitnet.training.throughput import (
    CoreWatch,
    Throughput,
    datasheet_peak,
    mfu,
    peak_flops,
    peak_memory,
    reset_peak_memory,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Machine:
    """A CPU on which a step takes a second of which the run has a core for ``share``; a forward
    pass takes ``seconds[threads]``. Reads as three clocks of one time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threads: int = 2) -> None:
        self.wall = self.cpu = 0.0
        self.share, self.threads, self.measured = 0.99, threads, 0
        self.seconds = {threads: 0.2, 1: 0.3}
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))
        # the load average of a run that has just ended, which is not to matter
        monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
        self.watch = CoreWatch(lambda: self.wall, lambda: self.cpu)

    def forward(self) -> None:
        self.measured += 1
        self.wall += self.seconds[self.threads]

    def run(self, steps: int) -> list[str]:
        hints = []
        for _ in range(steps):
            self.wall += 10  # between steps: evaluations, checkpoints
            self.watch.begin()
            self.wall += 1
            self.cpu += self.share
            hints.append(self.watch.end(self.forward))
        return [hint for hint in hints if hint]


def test_an_idle_machine_is_neither_told_nor_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.seconds = {2: 9.0, 1: 0.1}
    assert machine.run(500) == []
    assert machine.measured == 0


def test_a_busy_machine_is_measured_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.share, machine.seconds = 0.4, {2: 0.9, 1: 0.3}
    assert machine.run(3) == []  # the first step warms up
    (hint,) = machine.run(1)
    assert "had a core for 40% of its last steps" in hint
    assert "900 ms with 2 threads, 300 ms with one, so train.threads=1" in hint
    assert "3.0 times as fast" in hint
    assert machine.threads == 2
    begin, machine.measured = machine.wall, 0
    assert machine.run(2000) == []
    spent = machine.wall - begin - 2000 * 11
    assert machine.measured > 0
    assert 0 < spent < 0.02 * 2000


def test_a_machine_that_gets_busy_later_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    assert machine.run(100) == []
    machine.share, machine.seconds = 0.5, {2: 0.9, 1: 0.3}
    assert len(machine.run(7)) == 1
    machine.seconds = {2: 3.0, 1: 0.3}  # much worse: 10 times instead of 3
    assert len(machine.run(1000)) == 1


def test_no_gain_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.share, machine.seconds = 0.4, {2: 0.35, 1: 0.3}
    assert machine.run(100) == []
    assert machine.measured > 0


def test_one_thread_has_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, threads=1)
    machine.share = 0.3
    assert machine.run(100) == []
    assert machine.measured == 0


def test_threads_come_back_where_the_forward_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, threads=4)
    machine.share = 0.4
    machine.seconds = {4: 0.2}  # one thread: KeyError
    with pytest.raises(KeyError):
        machine.run(4)
    assert machine.threads == 4


def test_throughput_leaves_pauses_out() -> None:
    clock = Clock()
    meter = Throughput(clock=clock)
    assert meter.tokens_per_second == 0
    clock.now += 2
    meter.step(1000)
    assert meter.tokens_per_second == 500
    clock.now += 1
    with meter.pause():
        clock.now += 50
    clock.now += 1
    meter.step(3000)
    assert meter.tokens_per_second == 1000
    with contextlib.suppress(UserError), meter.pause():
        clock.now += 7
        raise UserError("an evaluation that fails")
    clock.now += 4
    meter.step(4000)
    assert meter.tokens_per_second == 1000


def test_the_wait_for_data_is_a_share_of_the_steps() -> None:
    clock = Clock()
    meter = Throughput(window=2, clock=clock)
    assert meter.data_wait == 0
    for seconds, waited in ((60, 50.0), (1, 0.5), (3, 0.25)):
        clock.now += seconds
        meter.step(100, waited)
        with meter.pause():
            clock.now += 9
    assert meter.data_wait == pytest.approx(0.75 / 4)


def test_throughput_forgets_beyond_its_window() -> None:
    clock = Clock()
    meter = Throughput(window=2, clock=clock)
    for seconds in (60, 1, 3):  # the first step compiles
        clock.now += seconds
        meter.step(100)
    assert meter.tokens_per_second == 50


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_datasheet_peak(name: str, peak: float | None) -> None:
    assert datasheet_peak(name) == peak


def test_peak_of_a_known_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peak, source = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert (peak, source) == (989e12, "datasheet, NVIDIA H200, dense bf16")


def test_peak_of_a_cpu_is_measured() -> None:
    before = torch.get_rng_state()
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e14
    assert source == "measured, 1024x1024 matmul, float32"
    assert torch.equal(before, torch.get_rng_state())


def test_mfu() -> None:
    assert mfu(6e9, 50_000, 312e12) == pytest.approx(0.961538, abs=1e-6)


def test_peak_memory_is_the_most_of_this_process() -> None:
    """A child, with only a stub of torch, sees what it touched and not what this process, which
    holds torch, did (Linux carries ru_maxrss over an exec)."""
    script = (
        "import importlib.util, sys, types\n"
        "torch = sys.modules['torch'] = types.ModuleType('torch')\n"
        "torch.device = torch.dtype = object\n"
        f"spec = importlib.util.spec_from_file_location('t', {throughput.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "cpu = types.SimpleNamespace(type='cpu')\n"
        "before = module.peak_memory(cpu)\n"
        "block = b'x' * (before + (32 << 20))\n"
        "during = module.peak_memory(cpu)\n"
        "del block\n"
        "print(before, during, module.peak_memory(cpu))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    before, during, after = map(int, child.stdout.split())
    assert 4 << 20 < before < peak_memory(torch.device("cpu")) / 3
    expected = pytest.approx(2 * before + (32 << 20), rel=0.2)
    assert during == expected
    assert after == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs clear_refs, which only Linux has")
def test_a_peak_can_be_forgotten() -> None:
    cpu, size = torch.device("cpu"), 1 << 28
    assert reset_peak_memory(cpu)  # another test may have held more
    block = torch.ones(size, dtype=torch.uint8)  # touched, in a separate mapping
    high = peak_memory(cpu)
    del block
    assert peak_memory(cpu) == pytest.approx(high, rel=0.01)  # threads count in batches
    assert reset_peak_memory(cpu)
    low = peak_memory(cpu)
    assert high - low == pytest.approx(size, rel=0.2)
    block = torch.ones(size // 2, dtype=torch.uint8)
    assert peak_memory(cpu) - low == pytest.approx(size // 2, rel=0.2)
    del block


def test_a_system_that_keeps_the_peak_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: str, **options: str) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert not reset_peak_memory(torch.device("cpu"))
