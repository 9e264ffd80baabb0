"""Compiles the Triton kernels for NVIDIA GPUs, which needs none, and prints their PTX as JSON.

Not a test module: ``test_kernels.py`` starts it in a process of its own without TRITON_INTERPRET,
under which there is nothing to compile. Keys: "addsub 1 *i32 sm_80" and "dot 64 *bf16 sm_90" (M and
the type of the outputs, int32 for raw sums), "quant fp16 sm_90" (the type of x).
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitnet_kernels.gpu import addsub, dot
from bitnet_kernels.gpu.quant import quant_kernel
from bitnet_kernels.reference import EPS

CAPABILITIES = (80, 90)


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    """Compile with the options of ``launch``; arguments in neither dict are int32 sizes."""
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": False},
    )
    return compiled.asm["ptx"]


def matmul_ptx(module: Any, kernel: Any, m: int, outputs: str, capability: int) -> str:
    tile = module.tile(m, interpreted=False)
    types = {"x_ptr": "*i8", "w_ptr": "*u8", "y_ptr": outputs}
    epilogue = {"s_ptr": "*fp32", "gamma_ptr": "*fp32", "bias_ptr": "*bf16"}
    constants = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_P": tile.p, "GAMMA_PER_ROW": True}
    if outputs == "*i32":
        return ptx(kernel, types, constants | dict.fromkeys(epilogue), capability)
    return ptx(kernel, types | epilogue, constants, capability)


if __name__ == "__main__":
    found: dict[str, str] = {}
    for sm in CAPABILITIES:
        for outputs in ("*i32", "*bf16"):
            for m in (1, 8, 64):
                name = f"addsub {m} {outputs} sm_{sm}"
                found[name] = matmul_ptx(addsub, addsub.addsub_kernel, m, outputs, sm)
            for m in (16, 64):
                name = f"dot {m} {outputs} sm_{sm}"
                found[name] = matmul_ptx(dot, dot.dot_kernel, m, outputs, sm)
        for dtype in ("fp32", "bf16", "fp16"):
            types = {"x_ptr": f"*{dtype}", "codes_ptr": "*i8"}
            types |= {"scale_ptr": "*fp32", "row_sum_ptr": "*i32"}
            constants = {"EPS": EPS, "BLOCK_K": 1024}
            found[f"quant {dtype} sm_{sm}"] = ptx(quant_kernel, types, constants, sm)
    json.dump(found, sys.stdout)
