"""Inspect kernels without a GPU: compile ahead of time, disassemble, count and check.

``inspect(spec, 90)`` reports the instructions per weight of a kernel's main loop, and whether any
instruction multiplies data there. ``compile`` makes the listing, ``read`` parses it, ``taint``
follows the data, ``model`` counts.
"""

from bitnet_kernels.sass.compile import Compiled, compile_spec
from bitnet_kernels.sass.estimate import estimate_us, sixteen_bit_us
from bitnet_kernels.sass.model import ARCHS, Arch, Report, inspect, listing
from bitnet_kernels.sass.read import Instruction, Loop, loops, main_loop, parse
from bitnet_kernels.sass.taint import Multipliers, multipliers

__all__ = [
    "ARCHS",
    "Arch",
    "Compiled",
    "Instruction",
    "Loop",
    "Multipliers",
    "Report",
    "compile_spec",
    "estimate_us",
    "inspect",
    "listing",
    "loops",
    "main_loop",
    "multipliers",
    "parse",
    "sixteen_bit_us",
]
