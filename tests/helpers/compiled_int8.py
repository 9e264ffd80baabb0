"""Compiles the int8 matmul of training for GPUs that are not present; prints findings as JSON.

Not a test module: ``test_int8_linear.py`` starts it in a separate process without
TRITON_INTERPRET. Keys: "128x256 bf16 sm_90".
"""

import json
import re
import sys
from typing import Any

from waits import check

from bitnet_kernels.gpu import int8_gemm
from bitnet_kernels.gpu.common import Spec
from bitnet_kernels.sass import ARCHS, compile_spec, main_loop, parse

LIMITS = {80: 166_912, 89: 101_376, 90: 232_448}
"""Bytes of shared memory per block, from the CUDA C++ Programming Guide."""


def summary(spec: Spec, sm: int) -> dict[str, Any]:
    compiled = compile_spec(spec, sm)
    check(spec, sm)
    code = parse(compiled.sass)
    body = [code[i] for i in main_loop(code).body]
    return {
        "registers": compiled.registers,
        "spills": compiled.spill_bytes,
        "local": sum(one.base in ("LDL", "STL") for one in code),
        "fits": compiled.shared_bytes <= LIMITS[sm],
        "tensor": sorted({one.base for one in body if one.is_tensor_core}),
        "loads": sorted({one.access_bits for one in body if one.base in ("LDG", "LDGSTS")}),
        "stores": sorted({one.access_bits for one in code if one.base == "STG"}),
        "fused": bool(re.search(r"\bfma\.\w+\.f32", compiled.ptx)),
    }


def biased(spec: Spec, **constants: Any) -> Spec:
    """The spec with one scale per row and a bias."""
    rest = {name: value for name, value in spec.constants.items() if name != "bias_ptr"}
    types = spec.types | {"bias_ptr": "*fp32"}
    aligned = (*spec.aligned, "bias_ptr")
    return spec._replace(
        types=types, constants=rest | {"SCALE_PER_ROW": True} | constants, aligned=aligned
    )


def forms(sm: int) -> dict[str, Spec]:
    """Every tile; for the largest also the other epilogues and loops, and the specialization for
    sizes of 1."""
    configs = int8_gemm.CONFIGS[sm]
    if sm == 89:  # the code of 8.0, in less shared memory
        configs = configs[:1]
    found = {f"{one.block_m}x{one.block_n} bf16": int8_gemm.spec(one) for one in configs}
    if sm != 89:
        plain, largest = int8_gemm.spec(configs[0]), next(iter(found)).removesuffix(" bf16")
        found |= {
            f"{largest} i32": int8_gemm.spec(configs[0], "*i32"),
            f"{largest} fp32 biased": biased(int8_gemm.spec(configs[0], "*fp32")),
            f"{largest} bf16 biased masked": biased(plain, EVEN_K=False),
        }
    if sm == 90:
        unaligned = tuple(name for name in plain.aligned if name != "N")
        found["odd ones"] = plain._replace(
            constants=plain.constants | {"M": 1, "N": 1}, aligned=unaligned
        )
    return {f"{name} sm_{sm}": one for name, one in found.items()}


if __name__ == "__main__":
    assert {f"sm_{sm}" for sm in LIMITS} <= ARCHS.keys()
    made = {name: (one, sm) for sm in int8_gemm.CONFIGS for name, one in forms(sm).items()}
    json.dump({name: summary(one, sm) for name, (one, sm) in made.items()}, sys.stdout)
