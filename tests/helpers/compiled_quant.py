"""Compiles the quantization kernels for GPUs that are not present and prints the findings as JSON.

Not a test module: ``test_compiled_quant.py`` starts it in a separate process without
TRITON_INTERPRET. Keys: "quant bf16 K=4096 sm_90".
"""

import json
import re
import sys
from typing import Any

from waits import check

from bitnet_kernels.gpu import norm_quant, quant
from bitnet_kernels.gpu.common import Spec
from bitnet_kernels.sass import compile_spec

CAPABILITIES = (80, 90)


def summary(spec: Spec, sm: int) -> dict[str, Any]:
    compiled = compile_spec(spec, sm)
    check(spec, sm)
    loads = re.findall(r"\bLDG\.E((?:\.\w+)*)", compiled.sass)
    return {
        "registers": compiled.registers * 32 * spec.num_warps,  # per program
        "spills": compiled.spill_bytes,
        "local": len(re.findall(r"\b(?:LDL|STL)\b", compiled.sass)),
        "loads": sorted(set(loads)),
        "floats": sorted(
            set(re.findall(r"\b(?:div|sqrt|fma|mad|rcp|rsqrt)\.\S*f(?:32|64)", compiled.ptx))
        ),
        "ftz": ".ftz" in compiled.ptx,
    }


def odd_forms() -> list[Spec]:
    """Specializations for a size of 1 or one that 16 does not divide; other dtypes."""
    found = []
    for spec in (quant.specs()[1], norm_quant.specs()[0]):
        names = spec.kernel.arg_names
        sizes = [name for name in ("M", "K", "COLUMNS") if name in names]
        pointers = tuple(name for name in spec.aligned if name not in sizes)
        ones = spec.constants | dict.fromkeys(sizes, 1)
        found.append(spec._replace(name=f"ones {spec.name}", constants=ones, aligned=pointers))
        for dtype in ("fp16", "fp64"):
            inputs = [name for name in ("x_ptr", "weight_ptr") if name in names]
            types = spec.types | dict.fromkeys(inputs, f"*{dtype}")
            name = f"odd {dtype} {spec.name}"
            found.append(spec._replace(name=name, types=types, aligned=pointers))
    return found


if __name__ == "__main__":
    specs = [*quant.specs(), *norm_quant.specs()]
    forms = [(spec, sm) for spec in specs for sm in CAPABILITIES]
    forms += [(spec, 90) for spec in odd_forms()]
    json.dump({f"{spec.name} sm_{sm}": summary(spec, sm) for spec, sm in forms}, sys.stdout)
