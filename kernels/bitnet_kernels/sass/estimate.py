"""A static model of the time of a matmul on a GPU that is not present. Its results are estimates,
and labeled as such everywhere. The cost of a kernel's instructions comes from its machine code;
rates and bandwidths come from data sheets. Waits and the balance of work are only roughly known."""

import math

from bitnet_kernels.dispatch import TileConfig, shared_limit
from bitnet_kernels.sass.model import ARCHS, inspect

LAUNCH_US, _SPLIT_US, _LATENCY_US = 2.0, 1.5, 0.7
"""Microseconds: of any kernel in a CUDA graph; of clearing a scratch buffer and meeting in it; of
memory latency, once per block of K that a program reads in turn. Round figures, not measured."""
_MACS_16BIT = {80: 1024, 89: 256, 90: 2048, 100: 4096}
"""Dense multiply-adds per clock and SM with fp32 accumulation; NVIDIA's data sheets."""


def sixteen_bit_us(sm: int, m: int, n: int, k: int) -> float:
    """Microseconds of a 16-bit ``[M, K] x [N, K]``: a launch, plus the longer of moving its bytes
    and of its multiply-adds at the tensor cores' full rate, which no library quite reaches."""
    arch = ARCHS[f"sm_{sm}"]
    memory = 2 * (n * k + m * k + m * n) / (arch.memory_tb_s * 1e6)
    arithmetic = m * n * k / (_MACS_16BIT[sm] * arch.n_sms * arch.clock_ghz * 1e3)
    return LAUNCH_US + max(memory, arithmetic)


def estimate_us(formulation: str, config: TileConfig, sm: int, m: int, n: int, k: int) -> float:
    """Microseconds that a formulation takes for ``[M, K] x [N, K]``, by the static model.

    The sum of the launches and the longest of three times: moving the bytes once (weights, int8
    activations, 16-bit outputs), running the main loop's instructions on the SMs that have work
    (padded columns included), and waiting for memory once per block of K. Infinite if the kernel
    spills registers.

    Raises:
        ValueError: see :func:`bitnet_kernels.sass.compile.compile_spec`.
    """
    from bitnet_kernels.gpu import gemm, gemv, popcount

    whole = config._replace(split_k=1)
    if formulation == "popcount":
        spec = popcount.spec(whole)
    else:
        module = {"sad": gemv, "dp4a": gemv, "gemm": gemm, "unpacked": gemm}[formulation]
        spec = module.spec(formulation, whole)
    report, arch = inspect(spec, sm), ARCHS[f"sm_{sm}"]
    assert report.weights_per_clock is not None
    if report.spill_bytes:
        return float("inf")
    tiles = math.ceil(m / config.block_m) * math.ceil(n / config.block_n)
    programs = tiles * config.split_k
    per_sm = math.ceil(programs / arch.n_sms)
    resident = min(65536 // (report.registers * 32 * config.num_warps), 32, 64 // config.num_warps)
    if report.shared_bytes:
        resident = min(resident, max(1, shared_limit(sm) // report.shared_bytes))
    steps = math.ceil(math.ceil(k / config.block_k) / config.split_k)
    done = config.block_n * config.block_k * steps  # weights per program, padding included
    arithmetic = per_sm * done / (report.weights_per_clock * arch.clock_ghz * 1e3)
    bytes_per_weight = 1.0 if formulation == "unpacked" else 0.25
    traffic = n * k * bytes_per_weight + m * k + 2 * m * n
    if formulation == "unpacked":
        traffic += 1.25 * n * k
    memory = traffic / (arch.memory_tb_s * 1e6)
    in_flight = 1 if config.num_stages == 1 else config.num_stages - 1
    waves = math.ceil(per_sm / max(resident, 1))
    latency = waves * math.ceil(steps / in_flight) * _LATENCY_US
    launches = 2 if formulation in ("popcount", "unpacked") else 1  # one changes the layout
    extra = _SPLIT_US if config.split_k > 1 else 0.0
    return launches * LAUNCH_US + max(memory, arithmetic, latency) + extra
