"""Compile a kernel for a GPU that need not be present: PTX, SASS and the resources that ptxas
reserved.

Triton's wheel carries ptxas, nvdisasm and cuobjdump, so any Linux machine can do this. Results stay
in Triton's cache (TRITON_CACHE_DIR) and, as text, for the life of the process.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from bitnet_kernels.available import triton_installed

if TYPE_CHECKING:
    from bitnet_kernels.gpu.common import Spec


class Compiled(NamedTuple):
    """The compiled form of a spec: its listings, and the resources of one thread or program.

    ``registers`` and ``spill_bytes`` are per thread, ``shared_bytes`` per program.
    """

    sass: str
    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_spec(spec: "Spec", sm: int) -> Compiled:
    """Compile for compute capability ``sm`` (90: sm_90a), which takes about a second.

    Raises:
        ValueError: Triton is not installed, or it interprets kernels instead of compiling them.
    """
    if not triton_installed():
        raise ValueError("inspecting kernels needs Triton, which is not installed")
    from triton.runtime import JITFunction

    if not isinstance(spec.kernel, JITFunction):
        raise ValueError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    types, constants = tuple(spec.types.items()), tuple(spec.constants.items())
    return _compile(
        spec.kernel, types, constants, spec.num_warps, spec.num_stages, spec.aligned, sm
    )


@cache
def _compile(
    kernel: Any,
    types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    num_warps: int,
    num_stages: int,
    aligned: tuple[str, ...],
    sm: int,
) -> Compiled:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: dict(types).get(name, "i32") for name in names}
    signature |= {name: "constexpr" for name, _ in constants}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    target = GPUTarget("cuda", sm, 32)
    with _as_if_here(target):
        made = triton.compile(
            ASTSource(kernel, signature, dict(constants), attributes),
            target=target,
            options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False},
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        sass=sass,
        ptx=made.asm["ptx"],
        registers=figures["REG"],
        spill_bytes=figures["STACK"] + figures["LOCAL"],  # Triton itself puts nothing there
        shared_bytes=made.metadata.shared,
    )


_DRIVER = Lock()


@contextmanager
def _as_if_here(target: Any) -> Iterator[None]:
    """Stand in for Triton's driver, for one compilation at a time. Kernels query their target while
    they are compiled (``tl.target_info``), and the driver would answer for the GPU present here, if
    any. No kernel may be launched meanwhile."""
    from triton.runtime import driver

    with _DRIVER:
        before = driver._active
        driver.set_active(SimpleNamespace(get_current_target=lambda: target))
        try:
            yield
        finally:
            driver.set_active(before)


def _output(*command: str) -> str:
    """stdout of a tool; nvdisasm warns on stderr that sm_80 files have an older format."""
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
