"""Compiles kernels for GPUs that are not present, inspects them, and prints the findings as JSON.

Not a test module: ``test_sass_kernels.py`` runs it without TRITON_INTERPRET, with "few" or "every"
and a folder as its arguments. "few" takes one of the catalog's matmuls per kind and two forms, only
for sm_90.
Keys: "reports" of the kernels below and of the catalog's matmuls as dictionaries, "listings" of two
real loops, "cli" with exit code, stdout and stderr of command lines.
"""

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from waits import check

from bitnet.cli import main as cli
from bitnet_kernels.dispatch import TileConfig
from bitnet_kernels.gpu import catalog as gpu_catalog
from bitnet_kernels.gpu import gemm, gemv, popcount
from bitnet_kernels.gpu.common import Spec
from bitnet_kernels.sass import (
    Loop,
    Report,
    compile_spec,
    estimate_us,
    inspect,
    listing,
    multipliers,
    parse,
)

EVERY, FOLDER = sys.argv[1] == "every", Path(sys.argv[2])
CAPABILITIES = (80, 90) if EVERY else (90,)
DP4A = tl.constexpr("dp4a.u32.s32 $0, $2, $3, $1;")
SAD = tl.constexpr("vabsdiff4.u32.u32.u32.add $0, $2, $3, $1;")


@triton.jit
def loop_kernel(
    x_ptr: tl.tensor, w_ptr: tl.tensor, y_ptr: tl.tensor, W: tl.tensor, FORM: tl.constexpr
) -> None:
    """One warp over words of packed weights and of activations, 16 bytes per lane and pass."""
    lanes = tl.arange(0, 128)
    acc = tl.zeros((128,), dtype=tl.int32)
    total = tl.zeros((128,), dtype=tl.float32)
    for start in range(0, W, 128):
        w = tl.load(w_ptr + start + lanes, eviction_policy="evict_first")
        x = tl.load(x_ptr + start + lanes)
        if FORM == "add":
            acc += tl.where((w & 3) == 2, x, tl.where((w & 3) == 0, -x, 0))
        elif FORM == "shift":
            acc += (x << 5) + (w & x)
        elif FORM == "multiply":
            acc += x * w
        elif FORM == "constant":
            acc += x * 40503 + w
        elif FORM == "dp4a":
            acc = tl.inline_asm_elementwise(DP4A, "=r,r,r,r", [acc, w, x], tl.int32, True, 1)
        elif FORM == "float":
            total += x.to(tl.float32) * w.to(tl.float32)
        elif FORM == "sad":
            acc = tl.inline_asm_elementwise(SAD, "=r,r,r,r", [acc, w, x], tl.int32, True, 1)
        elif FORM == "sad and multiply":
            acc = tl.inline_asm_elementwise(SAD, "=r,r,r,r", [acc * w, w, x], tl.int32, True, 1)
    # The epilogue may multiply.
    tl.store(y_ptr + lanes, (acc.to(tl.float32) + total) * tl.load(y_ptr))


@triton.jit(noinline=True)
def product(x: tl.tensor, w: tl.tensor) -> tl.tensor:
    return x * w


REDUCED = tl.constexpr("""{
.reg .pred p;
.reg .b32 a, b;
setp.ne.s32 p, $2, 0;
barrier.cta.red.popc.u32 a, 0, p;
setp.ne.s32 p, $3, 0;
barrier.cta.red.popc.u32 b, 0, p;
mul.lo.s32 a, a, b;
add.s32 $0, $1, a;
}""")


@triton.jit
def smuggling_kernel(
    x_ptr: tl.tensor, w_ptr: tl.tensor, y_ptr: tl.tensor, W: tl.tensor, FORM: tl.constexpr
) -> None:
    """A clean main loop, except for multiplications that FORM puts elsewhere or hides."""
    lanes = tl.arange(0, 128)
    acc = tl.zeros((128,), dtype=tl.int32)
    for start in range(0, W, 128):
        w = tl.load(w_ptr + start + lanes, eviction_policy="evict_first")
        x = tl.load(x_ptr + start + lanes)
        if FORM == "function":
            acc += product(tl.sum(x, 0), tl.sum(w, 0))
        elif FORM == "barrier":
            acc = tl.inline_asm_elementwise(REDUCED, "=&r,r,r,r", [acc, w, x], tl.int32, False, 1)
        acc += w ^ x
    if FORM == "tail":
        inside = lanes < W
        acc += tl.load(x_ptr + W + lanes, inside, other=0) * tl.load(w_ptr + W + lanes, inside)
    elif FORM == "second loop":
        for start in range(0, W, 128):
            x = tl.load(x_ptr + start + lanes).to(tl.float32)
            acc += (x * tl.load(y_ptr)).to(tl.int32)
    elif FORM == "after":
        acc = acc * tl.load(x_ptr + lanes)
    tl.store(y_ptr + lanes, acc.to(tl.float32) * tl.load(y_ptr))


SMUGGLED = ("nothing", "function", "barrier", "tail", "second loop", "after")


@triton.jit
def tensor_core_kernel(
    x_ptr: tl.tensor, w_ptr: tl.tensor, y_ptr: tl.tensor, K: tl.tensor, BLOCK_M: tl.constexpr
) -> None:
    """[BLOCK_M, 64] += x [BLOCK_M, 64] w [64, 64], both int8."""
    rows, cols, k = tl.arange(0, BLOCK_M), tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((BLOCK_M, 64), dtype=tl.int32)
    for start in range(0, K, 64):
        x = tl.load(x_ptr + rows[:, None] * K + start + k[None, :])
        w = tl.load(w_ptr + cols[None, :] * K + start + k[:, None])
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    tl.store(y_ptr + rows[:, None] * 64 + cols[None, :], acc)


def own_specs() -> list[Spec]:
    types = {"x_ptr": "*i32", "w_ptr": "*i32", "y_ptr": "*fp32"}
    pointers = ("x_ptr", "w_ptr", "y_ptr")
    forms = ("add", "shift", "multiply", "constant", "dp4a", "float", "sad", "sad and multiply")
    found = []
    for form in forms:
        constants = {"FORM": form}
        spec = Spec(
            form, "addsub", loop_kernel, types, constants, 1, 1, 1, 128 * 16, (*pointers, "W")
        )
        found.append(spec)
    for form in SMUGGLED:
        name, constants = f"smuggled: {form}", {"FORM": form}
        spec = Spec(
            name, "addsub", smuggling_kernel, types, constants, 1, 1, 1, 128 * 16, (*pointers, "W")
        )
        found.append(spec)
    types = {"x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": "*i32"}
    for m in (16, 64):
        name = f"tensor core M={m}"
        constants = {"BLOCK_M": m}
        spec = Spec(
            name, "dot", tensor_core_kernel, types, constants, 4, 3, m, 64 * 64, (*pointers, "K")
        )
        found.append(spec)
    return found


def run(*args: str) -> tuple[int, str, str]:
    """Run a command line in this process, which keeps the compiled kernels."""
    sys.argv = ["bitnet", *args]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def whole_kernel(spec: Spec, sm: int) -> list[str]:
    """The opcodes that multiply data anywhere in a kernel."""
    code = parse(compile_spec(spec, sm).sass)
    found = multipliers(code, Loop(frozenset(range(len(code))))).on_data
    return sorted({one.opcode for one in found})


def forms(n_kinds: int) -> list[dict[str, Any]]:
    """Every matmul with K split, and each kind of epilogue (raw sums, a scale per row with a bias,
    other outputs): the findings outside the main loop."""
    split = (
        gemv.spec("sad", TileConfig(1, 8, 2048, 4)),
        gemv.spec("dp4a", TileConfig(2, 8, 1024, 2)),
        popcount.spec(TileConfig(2, 2, 4096, 2)),
        gemm.spec("gemm", TileConfig(16, 128, 256, 4, 4, 3)),
        gemm.spec("unpacked", TileConfig(64, 128, 64, 2, 8, 3)),
    )
    scales = ("s_x_ptr", "scale_ptr")
    found = []
    for spec in split[:n_kinds]:
        types = {name: kind for name, kind in spec.types.items() if name not in scales}
        raw = spec._replace(
            types=types | {"y_ptr": "*i32"}, constants=spec.constants | dict.fromkeys(scales)
        )
        constants = {key: value for key, value in spec.constants.items() if key != "bias_ptr"}
        biased = spec._replace(
            types=spec.types | {"bias_ptr": "*bf16", "y_ptr": "*fp32"},
            constants=constants | {"SCALE_PER_ROW": True},
        )
        for kind, one in (("raw", raw), ("biased", biased)):
            for sm in CAPABILITIES:
                made, report = compile_spec(one, sm), inspect(one, sm)
                check(one, sm)
                found.append(
                    {
                        "form": f"{spec.name}, {kind}, sm_{sm}",
                        "family": spec.family,
                        "spills": made.spill_bytes,
                        "atomics": sorted(set(re.findall(r"\b(?:atom|red)\.[\w.]+", made.ptx))),
                        "fused": bool(re.search(r"\bfma\.\w+\.f32", made.ptx)),
                        "multipliers": report.multipliers_on_data,
                        "outside": report.multipliers_outside,
                        "anywhere": whole_kernel(one, sm),
                    }
                )
    return found


if __name__ == "__main__":
    matmuls = [spec for spec in gpu_catalog.catalog() if spec.weights]
    if not EVERY:
        first = {spec.name.partition(" ")[0]: spec for spec in reversed(matmuls)}
        matmuls = list(first.values())
    reports: list[Report] = [inspect(s, sm) for s in own_specs() + matmuls for sm in CAPABILITIES]
    real = {spec.name: spec for spec in matmuls}
    for spec in matmuls:
        for sm in CAPABILITIES:
            check(spec, sm)
    archs = [word for sm in CAPABILITIES for word in ("--arch", f"sm_{sm}")]
    inspected = ("inspect", "kernels", *archs)
    found: dict[str, Any] = {
        "reports": [report._asdict() for report in reports],
        "listings": {f"sm_{sm}": compile_spec(real["sad M=1"], sm).sass for sm in CAPABILITIES},
        "marked": listing(real["dp4a M=1"], 90),
        "estimate": estimate_us("sad", TileConfig(1, 8, 2048), 90, 1, 4096, 4096),
        "forms": forms(5 if EVERY else 1),
        "cli": {
            "two": run(
                *inspected, "--kernel", "SAD m=1", "--sass", str(FOLDER / "a" / "b"),
                "--csv", str(FOLDER / "figures.csv"),
            ),
            "none": run(*inspected, "--kernel", "sat M=1"),
            "unwritable": run(*inspected, "--kernel", "sad M=1", "--csv", f"{__file__}/f"),
        },
    }  # fmt: skip
    gpu_catalog.catalog = own_specs  # in which one of the family multiplies
    found["cli"]["wrong"] = run(*inspected, "--kernel", "sad")
    json.dump(found, sys.stdout)
