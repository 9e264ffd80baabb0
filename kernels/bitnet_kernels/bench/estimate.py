"""Estimate the time on GPUs that are not present, by the static model of
:mod:`bitnet_kernels.sass.estimate` and the configurations that ``dispatch`` chooses.

The ratio is an upper bound for a formulation, never a measurement.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from bitnet_kernels.available import triton_installed
from bitnet_kernels.bench.contenders import few_enough
from bitnet_kernels.bench.rows import Row
from bitnet_kernels.dispatch import FORMULATIONS, choose
from bitnet_kernels.sass import ARCHS, estimate_us, sixteen_bit_us


class Unavailable(RuntimeError):
    """No estimates can be made here; the message is one line with the reason."""


def device_name(arch: str) -> str:
    """``"H100 (sm_90)"``: the name of an estimated GPU in rows and tables."""
    return f"{ARCHS[arch].gpu} ({arch})"


def estimates(
    archs: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    kernels: Sequence[str],
    common: dict[str, Any],
) -> Iterator[Row]:
    """Yield a row per GPU, shape (N, K), M and kernel, and one for the 16-bit matmul.

    Arguments:
        common: columns that all rows share: versions, commit, date, command.
    Raises:
        Unavailable: Triton is missing, or interprets kernels.
    """
    if not triton_installed():
        raise Unavailable("no GPU estimates: they need Triton, which is not installed")
    for name in archs:
        arch = ARCHS[name]
        for n, k in shapes:
            for m in tokens:
                base = sixteen_bit_us(arch.sm, m, n, k)
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
                    asked = kernel in kernels or family in kernels
                    if not asked or not few_enough(kernel, m):
                        continue
                    _, config = choose(kernel, m, n, k, True, arch.sm, "")
                    try:
                        time = estimate_us(kernel, config, arch.sm, m, n, k)
                    except ValueError as error:  # Triton as interpreter compiles nothing
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
