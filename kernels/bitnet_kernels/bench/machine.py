"""The machine that gave a figure: the device and its limits, versions, sources."""

import hashlib
import importlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitnet_kernels.dispatch import cache_file

_PACKAGE = Path(__file__).parent.parent
_OPS_PER_CLOCK = {
    (8, 0): (2048, 4096),
    (8, 9): (1024, 2048),
    (9, 0): (4096, 8192),
    (10, 0): (8192, 16384),
}
"""Dense (16-bit, int8) tensor-core operations per clock and SM, from NVIDIA's architecture white
papers; a multiply-add counts as two. GeForce cards of (8, 9) have half the 16-bit rate."""

_INSTRUCTION_SETS = {
    "amx_int8": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
"""Linux's name of a CPU feature and ours, widest first."""


class Machine(NamedTuple):
    """The device that is timed. Unknown limits, such as a CPU's, are None."""

    device: torch.device
    name: str
    cache_bytes: int
    """The L2 of a GPU, the last level of a CPU."""
    bandwidth: float | None
    """Memory bandwidth in bytes per second, at the highest clock."""
    ops_16bit: float | None
    """Tensor-core operations per second, at the highest clock."""
    ops_int8: float | None
    driver: str
    threads: int | None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        kind = "" if self.device.type == "cuda" else f"{self.device.type}-"
        return kind + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def describe(device: torch.device) -> Machine:
    """The machine that a device belongs to."""
    if device.type != "cuda":
        return Machine(
            device, _cpu_name(), _cpu_cache(), None, None, None, "", torch.get_num_threads()
        )
    gpu = torch.cuda.get_device_properties(device)
    per_clock = _OPS_PER_CLOCK.get((gpu.major, gpu.minor))
    # clocks in kHz, two transfers per clock, bus width in bits
    clocks = gpu.multi_processor_count * gpu.clock_rate * 1e3
    bandwidth = 2 * gpu.memory_clock_rate * 1e3 * gpu.memory_bus_width / 8
    return Machine(
        device,
        gpu.name,
        gpu.L2_cache_size,
        bandwidth or None,
        per_clock and per_clock[0] * clocks,
        per_clock and per_clock[1] * clocks,
        _driver(),
        None,
    )


def _cpu_name() -> str:
    """Model, widest instruction set, number of CPUs. Virtual machines give CPUs of several
    generations the same model name. The instruction set tells them apart, and decides what the
    kernels can do."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    return cpu_name(text) or f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


def cpu_name(cpuinfo: str) -> str:
    """The name of a CPU from the text of Linux's /proc/cpuinfo; "" if that names no model."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.M)
    if not found:
        return ""
    have = set(flags[1].split()) if flags else set()
    widest = next((f" ({name})" for flag, name in _INSTRUCTION_SETS.items() if flag in have), "")
    return f"{found[1].strip()}{widest}, {os.cpu_count()} CPUs"


def _cpu_cache() -> int:
    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)K", path.read_text(encoding="utf-8").strip()):
            sizes.append(int(match[1]) * 2**10)
    return max(sizes)


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def package_version(name: str) -> str:
    """The version of an installed package, or ""."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def code_hash(name: str) -> str:
    """Hash (12 hex digits) of all sources and tables of the package outside this benchmark, and of
    the table tuned for the device ``name``."""
    digest = hashlib.sha256()
    for path in sorted((*_PACKAGE.rglob("*.py"), *_PACKAGE.glob("tables/*.json"))):
        if "bench" not in path.relative_to(_PACKAGE).parts:
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    if cache_file(name).exists():
        digest.update(cache_file(name).read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The checkout's commit, with ``-dirty`` if the working tree differs from it; "" if the package
    is not part of a checkout."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", *args], cwd=_PACKAGE, capture_output=True, encoding="utf-8", check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    if not git("ls-files", "--error-unmatch", "packing.py"):  # another project's checkout, or none
        return ""
    return git("describe", "--always", "--dirty", "--abbrev=7", "--exclude", "*")


class Meter:
    """Energy and clock of one GPU, from NVML (``pip install nvidia-ml-py``)."""

    def __init__(self, device: torch.device) -> None:
        self._nvml = importlib.import_module("pynvml")  # ImportError where it is not installed
        self._nvml.nvmlInit()
        # by UUID: CUDA_VISIBLE_DEVICES renumbers CUDA's devices but not NVML's
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._handle: Any = self._nvml.nvmlDeviceGetHandleByUUID(uuid)

    def clock_mhz(self) -> int:
        """The current clock of the SMs."""
        return self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)

    def millijoules(self) -> int:
        """Energy of the board since the driver was loaded; raises NVMLError before Volta."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def milliwatts(self) -> int:
        """Power of the board, averaged by the driver over some tenths of a second."""
        return self._nvml.nvmlDeviceGetPowerUsage(self._handle)


def find_meter(device: torch.device) -> tuple[Meter | None, str]:
    """The GPU's meter, or None and why there is none."""
    if device.type != "cuda":
        return None, ""
    try:
        return Meter(device), ""
    except Exception as error:  # NVML's errors are classes of a package that may be absent
        return None, f"no energy figures: {error} (pip install nvidia-ml-py brings NVML)"


def joules_a_run(
    meter: Meter, run: Callable[[], None], finish: Callable[[], None], at_least: float = 0.5
) -> float:
    """Joules per ``run``, averaged over as many runs as fill ``at_least`` seconds.

    They come from the board's energy counter, or if it has none from its mean power. The counter
    is updated every few tens of milliseconds, hence the half second.
    """
    powers: list[int] = []
    try:
        before = meter.millijoules()
    except Exception:  # not supported: NVMLError, of a package that is not imported here
        before = None
    start, runs = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < at_least or runs == 0:
        run()
        finish()
        runs += 1
        if before is None:
            powers.append(meter.milliwatts())
    if before is not None:
        return (meter.millijoules() - before) / 1e3 / runs
    return sum(powers) / len(powers) / 1e3 * elapsed / runs
