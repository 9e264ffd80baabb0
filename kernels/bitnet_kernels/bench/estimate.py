"""What GPUs that are not here would take at least, from the compiled instructions: an estimate.

A kernel's time is the longer of moving its bytes once and of issuing its main loop's instructions
(:func:`bitnet_kernels.sass.estimate_us`); the 16-bit matmul's the longer of its bytes and of its
multiply-adds at the tensor cores' full rate, which no library reaches. So both are lower bounds,
launches cost nothing, and the ratio says what a formulation could give, never what was seen.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from bitnet_kernels.bench.contenders import few_enough
from bitnet_kernels.bench.rows import Row
from bitnet_kernels.dispatch import FORMULATIONS
from bitnet_kernels.sass import ARCHS, Arch, estimate_us

_MACS_16BIT = {"sm_80": 1024, "sm_89": 256, "sm_90": 2048, "sm_100": 4096}
"""Dense multiply-adds a clock and SM with fp32 accumulation; NVIDIA's data sheets."""


class Unavailable(RuntimeError):
    """No estimates can be made here; says in a line why."""


def device_name(arch: str) -> str:
    """``"H100 (sm_90)"``: how rows and tables name a GPU that was not there."""
    return f"{ARCHS[arch].gpu} ({arch})"


def sixteen_bit_us(arch: Arch, macs: int, m: int, n: int, k: int) -> float:
    """Microseconds that a 16-bit ``[M, K] x [N, K]`` takes at least; ``macs`` a clock and SM."""
    memory = 2 * (n * k + m * k + m * n) / (arch.memory_tb_s * 1e12)
    arithmetic = m * n * k / (macs * arch.n_sms * arch.clock_ghz * 1e9)
    return max(memory, arithmetic) * 1e6


def _specs() -> list[Any]:
    if find_spec("triton") is None:
        raise Unavailable("no GPU estimates: they need Triton, which is not installed")
    from bitnet_kernels.gpu.catalog import catalog

    return [spec for spec in catalog() if spec.weights]


def _fitting(specs: Sequence[Any], name: str, m: int) -> Any:
    """The spec of a formulation (the first word of a spec's name) for M = ``m``: made for as many
    tokens or the next more, else for the most."""
    named = [spec for spec in specs if spec.name.split()[0] == name]
    enough = [spec for spec in named if spec.tokens >= m]
    if enough:
        return min(enough, key=lambda spec: spec.tokens)
    return max(named, key=lambda spec: spec.tokens, default=None)


def estimates(
    archs: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    kernels: Sequence[str],
    common: dict[str, Any],
) -> Iterator[Row]:
    """A row for each GPU, shape, M and kernel of ours, and for the 16-bit matmul; N x K in shapes.

    Arguments:
        common: what rows share: versions, commit, date, command.
    Raises:
        Unavailable: there is no Triton, or it interprets.
    """
    specs = _specs()
    for name in archs:
        arch = ARCHS[name]
        for n, k in shapes:
            for m in tokens:
                base = sixteen_bit_us(arch, _MACS_16BIT[name], m, n, k)
                subject = {"device": device_name(name), "what": "matmul", "cache": "cold"}
                shape = {"m": m, "n": n, "k": k, "source": "estimate", "exact": ""}
                given: dict[str, Any] = subject | shape | common
                yield Row(
                    contender="torch",
                    family="16-bit",
                    formulation="bf16",
                    dtype="bf16",
                    estimate_us=base,
                    estimate_ratio=1.0,
                    **given,
                )
                for kernel, family in FORMULATIONS.items():
                    spec = _fitting(specs, kernel, m)
                    asked = kernel in kernels or family in kernels
                    if spec is None or not asked or not few_enough(kernel, m):
                        continue
                    try:
                        time = estimate_us(spec, arch.sm, m, n, k)
                        if kernel == "unpacked":  # 2 bits read and a byte written, before
                            time += 1.25 * n * k / (arch.memory_tb_s * 1e6)
                    except ValueError as error:  # an interpreting Triton compiles nothing
                        raise Unavailable(f"no GPU estimates: {error}") from error
                    yield Row(
                        contender="bitnet",
                        family=family,
                        formulation=kernel,
                        dtype="int8",
                        estimate_us=time,
                        estimate_ratio=base / time,
                        **given,
                    )
