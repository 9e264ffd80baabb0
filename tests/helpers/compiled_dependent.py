"""Compiles one form of every kernel for GPUs that are not present, and kernels that wait too late
for the kernels before them; prints JSON.

Not a test module: ``test_dependent_launch.py`` starts it in a separate process without
TRITON_INTERPRET. "kernels": names of all kernels of the package; "checked": names of the compiled
ones, all of which wait in time; "wrong": what :func:`waits.waits` finds in kernels that break the
rule; "options": what the compiler made of the launch options.
"""

import json
import pkgutil
import sys
from dataclasses import asdict
from importlib import import_module
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from waits import check, waits

from bitnet_kernels import gpu
from bitnet_kernels.gpu.catalog import catalog
from bitnet_kernels.gpu.common import Spec, await_inputs
from bitnet_kernels.gpu.matmul import unpack_kernel
from bitnet_kernels.gpu.popcount import activation_planes_kernel


@triton.jit
def copy_kernel(x_ptr: tl.tensor, y_ptr: tl.tensor, N: tl.tensor, FORM: tl.constexpr) -> None:
    """y = x, which touches memory too soon in every FORM but "right"."""
    lanes = tl.arange(0, 128)
    if FORM == "late":
        x = tl.load(x_ptr + lanes)
        await_inputs()
        tl.store(y_ptr + lanes, x)
    elif FORM == "store first":
        tl.store(y_ptr + lanes, lanes)
        await_inputs()
    elif FORM == "atomic first":
        tl.atomic_add(y_ptr, 1)
        await_inputs()
    else:
        if FORM == "right" or (FORM == "some programs" and tl.program_id(0) < N):
            await_inputs()
        tl.store(y_ptr + lanes, tl.load(x_ptr + lanes))


FORMS = ("right", "never", "late", "store first", "atomic first", "some programs")


def spec(kernel: Any, name: str, types: dict[str, str], constants: dict[str, Any]) -> Spec:
    pointers = tuple(types)
    return Spec(name, "", kernel, types, constants, 4, 1, tokens=0, weights=0, aligned=pointers)


def kernels() -> set[str]:
    """Names of the package's kernels; other jitted functions are parts of kernels."""
    names = [f"{gpu.__name__}.{file.name}" for file in pkgutil.iter_modules(gpu.__path__)]
    return {
        name
        for file in names
        for name, value in vars(import_module(file)).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


if __name__ == "__main__":
    codes, planes = {"w_ptr": "*u8", "codes_ptr": "*i8"}, {"x_ptr": "*i8", "planes_ptr": "*i32"}
    every = [
        *catalog(),
        spec(unpack_kernel, "unpack", codes, {"ROWS": 4, "BLOCK": 512}),
        spec(activation_planes_kernel, "activation planes", planes, {"WORDS": 32}),
    ]
    first = {one.kernel.__name__: one for one in reversed(every)}
    for one in first.values():
        check(one, 90)
    for name in ("gemv_kernel", "unpack_kernel"):
        check(first[name], 80)
    for name in ("gemv_kernel", "gemm_kernel"):
        check(first[name], 100)
    pointers = {"x_ptr": "*i32", "y_ptr": "*i32"}
    wrong = {form: spec(copy_kernel, form, pointers, {"FORM": form}) for form in FORMS}
    asked = {"launch_pdl": True, "enable_fp_fusion": False}
    options = make_backend(GPUTarget("cuda", 90, 32)).parse_options(asked)
    found = {
        "kernels": sorted(kernels()),
        "checked": sorted(first),
        "wrong": {form: waits(one, 90)._asdict() for form, one in wrong.items()},
        "options": {name: asdict(options)[name] for name in asked},
    }
    json.dump(found, sys.stdout)
