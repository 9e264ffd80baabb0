"""Compiles the kernels of attention over a cache for GPUs that are not present; prints JSON.

Not a test module: ``test_ops_decode.py`` starts it in a separate process without
TRITON_INTERPRET. Keys: "rope_append bf16 E=128 sm_90".
"""

import json
import re
import sys
from typing import Any

from waits import check

from bitnet_kernels.gpu import decode_attention, decode_rope
from bitnet_kernels.gpu.common import Spec
from bitnet_kernels.sass import compile_spec


def summary(spec: Spec, sm: int) -> dict[str, Any]:
    compiled = compile_spec(spec, sm)
    check(spec, sm)
    return {
        "registers": compiled.registers * 32 * spec.num_warps,  # per program
        "shared": compiled.shared_bytes,
        "spills": compiled.spill_bytes,
        "local": len(re.findall(r"\b(?:LDL|STL)\b", compiled.sass)),
        "copies": sorted(set(re.findall(r"\bLDGSTS\.E\S*?\.(\d+)\b", compiled.sass))),
        "dots": sorted(set(re.findall(r"\b(HMMA|HGMMA)\b", compiled.sass))),
    }


def odd_form(spec: Spec) -> Spec:
    """The specialization for sizes that 16 does not divide and for int64 lengths."""
    pointers = tuple(name for name in spec.aligned if name.endswith("_ptr"))
    types = spec.types | {"lengths_ptr": "*i64"}
    constants = spec.constants | {"E": 50, "BLOCK_E": 64, "REPEATS": 3}
    return spec._replace(
        name=f"odd {spec.name}", types=types, constants=constants, aligned=pointers
    )


if __name__ == "__main__":
    specs = [*decode_rope.specs(), *decode_attention.specs()]
    first = specs[len(decode_rope.specs())]
    forms = [(spec, 90) for spec in (*specs, odd_form(first))]
    forms += [(spec, 80) for spec in specs if "E=128 T=" in spec.name]
    json.dump({f"{spec.name} sm_{sm}": summary(spec, sm) for spec, sm in forms}, sys.stdout)
