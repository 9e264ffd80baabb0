"""What a compiled kernel does before it waits for the kernels before it.

Not a test module: the ``compiled_*.py`` use it for the kernels that they compile.
"""

import re
from typing import NamedTuple

from bitnet_kernels.gpu.common import Spec
from bitnet_kernels.sass import Instruction, compile_spec, parse
from bitnet_kernels.sass.read import successors

_PTX = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?"
    r"((?:griddepcontrol|ld|ldu|st|atom|red|cp|prefetchu?|multimem|tex|suld|sust|sured)\.\S+?)[ ;]",
    re.MULTILINE,
)
_SASS = re.compile(r"(LD|ST|ATOM|RED|SU|TEX|TLD|UTMA|UBLK|CCTL)\w*")
_OWN = re.compile(r"(ld|st|atom|red)\.(param|shared).*|(LDC|LDCU|LDS|STS|ATOMS)\b.*")
"""Accesses to parameters, and to memory that no other program sees, such as allocation for tensor
cores."""
_MATMULS = ("gemv_kernel", "gemm_kernel", "popcount_kernel")
"""The matmuls of packed weights, which they prefetch."""


class Waits(NamedTuple):
    """``control``: PTX's instructions of dependent launch, in order. ``ptx``: instructions that
    touch memory above the first wait, without repetition. ``sass``: the same on any path around the
    wait."""

    control: list[str]
    ptx: list[str]
    sass: list[str]


def waits(spec: Spec, sm: int) -> Waits:
    compiled = compile_spec(spec, sm)
    ptx = [one for one in _PTX.findall(compiled.ptx) if not _OWN.fullmatch(one)]
    first = ptx.index("griddepcontrol.wait") if "griddepcontrol.wait" in ptx else len(ptx)
    return Waits(
        control=[one for one in ptx if one.startswith("griddepcontrol")],
        ptx=sorted(set(ptx[:first])),
        sass=_around(parse(compiled.sass)),
    )


def _around(code: list[Instruction]) -> list[str]:
    """Opcodes that touch memory and can be reached without passing ACQBULK, the wait."""
    following = successors(code)
    seen, stack = {0}, [0]
    while stack:
        i = stack.pop()
        if code[i].base != "ACQBULK":
            new = set(following[i]) - seen
            seen |= new
            stack += new
    found = {code[i].opcode for i in seen if _SASS.fullmatch(code[i].base)}
    return sorted(one for one in found if not _OWN.fullmatch(one))


def check(spec: Spec, sm: int) -> None:
    """From sm_90 on a kernel waits once, before it touches memory, except for prefetches of packed
    weights. Below sm_90 no instruction can wait."""
    found, where = waits(spec, sm), f"{spec.name}, sm_{sm}: "
    if sm < 90:
        assert found.control == [], f"{where}{found}"
        assert not any(one.startswith("prefetch") for one in found.ptx), f"{where}{found}"
        return
    prefetches = spec.kernel.__name__ in _MATMULS and spec.constants.get("PLANES") != 1
    assert found.control == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"], where
    assert found.ptx == (["prefetch.global.L2"] if prefetches else []), f"{where}{found}"
    assert found.sass == (["CCTL.E.PF2"] if prefetches else []), f"{where}{found}"
