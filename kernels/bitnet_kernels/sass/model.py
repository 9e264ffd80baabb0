"""Count the cost of a kernel's main loop, and bound its speed.

The counts are facts of the listing: every instruction of the loop counts once, except NOPs, divided
by the weights that one thread consumes per pass. The speed is a bound from published rates, not a
measurement: it ignores latencies, occupancy, bank conflicts and the time of a launch.

Weights per pass: packed weights are loaded evict-first, so their number is four times the bytes of
those loads, however the loop is unrolled. Kernels whose weights go through shared memory have no
such load. There the tensor-core instructions of the loop show the unrolling: ``spec.weights`` per
``spec.weights * BLOCK_M`` multiply-accumulates.
"""

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from bitnet_kernels.sass.compile import compile_spec
from bitnet_kernels.sass.read import Instruction, Loop, loops, main_loop, parse
from bitnet_kernels.sass.taint import multipliers, outside

if TYPE_CHECKING:
    from bitnet_kernels.gpu.common import Spec

_LANES = 32


class Arch(NamedTuple):
    """The GPU that stands for its compute capability in the figures.

    From the vendor's data sheets: ``clock_ghz`` is the highest boost clock, ``int8_macs`` the dense
    multiply-accumulates of the tensor cores per clock and SM. ``fp32_lanes`` comes from the CUDA
    C++ Programming Guide's table of arithmetic throughput.
    """

    gpu: str
    sm: int
    n_sms: int
    clock_ghz: float
    memory_tb_s: float
    l2_bytes: int
    fp32_lanes: int
    int8_macs: int

    @property
    def needed_weights_per_clock(self) -> float:
        """2-bit weights that memory delivers to each SM per clock: the rate that a kernel needs to
        be memory-bound at M = 1."""
        return self.memory_tb_s * 1e12 * 4 / (self.n_sms * self.clock_ghz * 1e9)


ARCHS = {
    "sm_80": Arch("A100 80GB", 80, 108, 1.41, 2.039, 40 << 20, 64, 2048),
    "sm_89": Arch("RTX 4090", 89, 128, 2.52, 1.008, 72 << 20, 128, 1024),
    "sm_90": Arch("H100", 90, 132, 1.98, 3.35, 50 << 20, 128, 4096),
    "sm_100": Arch("B200", 100, 148, 1.965, 8.0, 126 << 20, 128, 8192),
}
"""The targets of ahead-of-time compilation, by name."""

_MMA_SHARE = 0.63
"""The share of the tensor cores' rate that mma instructions, which read registers, reach from
Hopper on (arXiv 2402.13499 measures 62.9% on an H100); wgmma and tcgen05 reach all of it."""

_PIPES = (
    ("tensor", r"[A-Z]+MMA"),
    ("lsu", r"LD(G|S|SM|L|TM|GSTS)?|ST(G|S|SM|L|TM)?|ATOM[GS]?|RED[GS]?|SHFL"),
    ("xu", r"MUFU|POPC|FLO|BREV|I2F|F2I|F2F|I2I|FRND"),
    ("imad", r"IMAD|IMUL\w*|XMAD|IDP\w*"),
    ("fma", r"[FH](ADD|MUL|FMA)\w*"),
    (
        "other",  # issued, but to units that no loop here can fill: one lane per warp, or control
        r"U[A-Z]\w*|R2UR|S2U?R|CS2R|LDCU?|VOTE|REDUX|ELECT|BRA|JMP|CALL|RET|EXIT|BAR|BSSY|BSYNC"
        r"|BREAK|WARPSYNC|WARPGROUP|\w*DEPBAR|MEMBAR|FENCE|CCTL|NANOSLEEP|SYNCS|NOP|YIELD",
    ),
    ("alu", r"\w+"),
)
_RATES = {"issue": 128, "alu": 64, "imad": 64, "xu": 16, "lsu": 32}
"""Thread instructions per clock and SM, the same from 8.0 to 10.0, from the CUDA C++ Programming
Guide's table of arithmetic throughput: 64 for integer add, logic, shift, compare, multiply-add and
vabsdiff4, 16 for popc; the rate of fp32 is in Arch. The pipe of each instruction follows Nsight
Compute's description of its pipelines: IMAD and dot products share the heavy half of the FMA pipe.
"lsu" counts words of 4 bytes: L1 moves 128 bytes per clock, if every lane reads its own."""


class Report(NamedTuple):
    """The findings of :func:`inspect` about a kernel compiled for ``sm_<sm>``.

    Counts are thread instructions of one pass of the main loop. ``instructions_per_weight`` and
    ``by_pipe`` are divided by the weights that a thread consumes in that pass. ``by_pipe`` counts
    words of 4 bytes for "lsu" and multiply-accumulates for "tensor". A kernel without weights has
    None for ``instructions_per_weight`` and the speeds.

    ``weight_load_bits``: widths of the weight loads, or of all global loads where these cannot be
    told apart; empty for bulk copies.
    ``multipliers_on_data``, ``data_moves``, ``address_multiplies``: opcodes of the loop, in order;
    see :class:`bitnet_kernels.sass.taint.Multipliers`. ``multipliers_outside``: opcodes that
    multiply data outside the loop and the epilogue, see :func:`bitnet_kernels.sass.taint.outside`.
    ``local_accesses``: LDL and STL in the whole kernel.
    ``weights_per_clock``: the most that an SM reaches, over all pipes; ``bound``: the limit:
    "memory" if that is at least ``needed_weights_per_clock``, else a pipe or "issue".
    ``notes``: what the counting could not see, in words.
    """

    name: str
    family: str
    sm: int
    tokens: int
    loop_instructions: int
    weights_per_pass: int
    instructions_per_weight: float | None
    by_pipe: dict[str, float]
    registers: int
    spill_bytes: int
    local_accesses: int
    shared_bytes: int
    tensor_core: int
    multipliers_on_data: list[str]
    multipliers_outside: list[str]
    data_moves: list[str]
    address_multiplies: list[str]
    weight_load_bits: list[int]
    weights_per_clock: float | None
    needed_weights_per_clock: float
    bound: str
    notes: list[str]


_reports: dict[tuple[str, int], Report] = {}
"""Reports made in this process, since reading a listing takes most of a second."""


def inspect(spec: "Spec", sm: int) -> Report:
    """Compile a spec and report on it, for an ``sm`` in :data:`ARCHS`.

    Raises:
        ValueError: see :func:`bitnet_kernels.sass.compile.compile_spec`.
    """
    key = (repr(spec), sm)
    if key not in _reports:
        _reports[key] = _inspect(spec, sm)
    return _reports[key]


def _inspect(spec: "Spec", sm: int) -> Report:
    arch = ARCHS[f"sm_{sm}"]
    made = compile_spec(spec, sm)
    code = parse(made.sass)
    loop = main_loop(code)
    body = [code[i] for i in sorted(loop.body) if code[i].base != "NOP"]
    found = multipliers(code, loop)
    weights, notes = _weights_per_pass(spec, body)
    if not loop.looped:
        if weights:  # a kernel without weights may hold a whole row in registers
            notes.append("no loop: the whole kernel is counted")
    elif any(other.body < loop.body and not _waits(code, other) for other in loops(code)):
        notes.append("a loop inside the main loop is counted as one pass of it")
    by_pipe = _by_pipe(spec, body, weights)
    speeds = _speeds(by_pipe, body, arch)
    slowest = min(speeds, key=lambda pipe: speeds[pipe], default="")
    per_clock = speeds.get(slowest)
    needed = arch.needed_weights_per_clock / (4 * _bytes_per_weight(spec))
    enough = per_clock is not None and per_clock >= needed
    return Report(
        name=spec.name,
        family=spec.family,
        sm=sm,
        tokens=spec.tokens,
        loop_instructions=len(body),
        weights_per_pass=weights,
        instructions_per_weight=len(body) / weights if weights else None,
        by_pipe=by_pipe,
        registers=made.registers,
        spill_bytes=made.spill_bytes,
        local_accesses=sum(one.base in ("LDL", "STL") for one in code),
        shared_bytes=made.shared_bytes,
        tensor_core=sum(one.is_tensor_core for one in body),
        multipliers_on_data=[one.opcode for one in found.on_data],
        multipliers_outside=[one.opcode for one in outside(code, loop)],
        data_moves=[one.opcode for one in found.moving],
        address_multiplies=[one.opcode for one in found.on_addresses],
        weight_load_bits=_weight_load_bits(body, weights * _bytes_per_weight(spec)),
        weights_per_clock=per_clock,
        needed_weights_per_clock=needed,
        bound="memory" if enough else slowest,
        notes=notes,
    )


def listing(spec: "Spec", sm: int) -> str:
    """The SASS with ``>`` before each instruction of the main loop, and ``!`` where it multiplies
    data. Raises as :func:`inspect`."""
    sass = compile_spec(spec, sm).sass
    code = parse(sass)
    loop = main_loop(code)
    marks = {code[i].address: ">" for i in loop.body}
    marks |= {one.address: "!" for one in multipliers(code, loop).on_data}
    lines = []
    for line in sass.splitlines():
        found = re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)
        lines.append(f"{marks.get(int(found[1], 16), ' ') if found else ' '} {line}".rstrip())
    return "\n".join(lines) + "\n"


def _weights_per_pass(spec: "Spec", body: list[Instruction]) -> tuple[int, list[str]]:
    """The weights of one thread per pass, and notes."""
    if not spec.weights:
        return 0, []
    marked = sum(one.access_bits for one in body if one.is_weight_load)
    if marked:
        return marked // 2, []
    threads = spec.num_warps * _LANES
    passes = sum(map(_macs, body)) * threads / (spec.weights * _tile_tokens(spec))
    if passes:
        return max(round(passes), 1) * spec.weights // threads, []
    note = "no evict-first load and no tensor-core shape: the loop is taken not to be unrolled"
    return spec.weights // threads, [note]


def _tile_tokens(spec: "Spec") -> int:
    """The tokens that a program computes, which may be more than it needs."""
    return int(spec.constants.get("BLOCK_M", spec.tokens))


def _macs(instruction: Instruction) -> int:
    """A thread's share of the multiply-accumulates of a tensor-core instruction. A warpgroup's
    shape is 64xNxK. A warp's shape has N = 8 and is written as MK or M8K (16832: 16 x 8 x 32)."""
    if not instruction.is_tensor_core:
        return 0
    if shape := re.search(r"\.64x(\d+)x(\d+)", instruction.opcode):
        return 64 * int(shape[1]) * int(shape[2]) // (4 * _LANES)
    if shape := re.search(r"\.(8|16)8(\d+)\b", instruction.opcode):
        return int(shape[1]) * 8 * int(shape[2]) // _LANES
    return 0


def _waits(code: list[Instruction], loop: Loop) -> bool:
    """Whether a loop polls a barrier: it passes once when its data is there."""
    return any(code[i].base == "SYNCS" for i in loop.body)


def _weight_load_bits(body: list[Instruction], weight_bytes: float) -> list[int]:
    """The widths of the weight loads. If no load is marked, and the loads of one width add up to
    the bytes of the weights, that is the width."""
    marked = {one.access_bits for one in body if one.is_weight_load}
    bits = Counter(one.access_bits for one in body if one.base in ("LDG", "LDGSTS"))
    exact = [width for width, n in bits.items() if width * n == 8 * weight_bytes]
    if not weight_bytes:
        return []
    return sorted(marked or (exact if len(exact) == 1 else bits))


def _bytes_per_weight(spec: "Spec") -> float:
    """Packed weights come as bytes or words; int8 weights are not packed."""
    return 1.0 if spec.types.get("w_ptr") == "*i8" else 0.25


def _by_pipe(spec: "Spec", body: list[Instruction], weights: int) -> dict[str, float]:
    """Instructions per weight on each pipe."""
    if not weights:
        return {}
    counts = Counter[str]()
    for one in body:
        pipe = next(pipe for pipe, pattern in _PIPES if re.fullmatch(pattern, one.base))
        counts["issue"] += 1
        if pipe == "tensor":
            counts[pipe] += _macs(one)
        elif pipe == "lsu":
            counts[pipe] += max(one.access_bits // 32, 1)
        else:
            counts[pipe] += 1
    if counts.get("tensor") == 0:  # a shape that the listing does not show
        counts["tensor"] = weights * _tile_tokens(spec)
    return {pipe: count / weights for pipe, count in sorted(counts.items())}


def _speeds(by_pipe: dict[str, float], body: list[Instruction], arch: Arch) -> dict[str, float]:
    """Weights per clock and SM that each pipe allows."""
    registers_only = not any("GMMA" in one.base or one.base.startswith("UTC") for one in body)
    share = _MMA_SHARE if arch.sm >= 90 and registers_only else 1.0
    rates = _RATES | {"fma": arch.fp32_lanes, "tensor": arch.int8_macs * share}
    asked = {pipe: count for pipe, count in by_pipe.items() if pipe in rates}
    if "fma" in asked:  # IMAD runs in the same pipe
        asked["fma"] += asked.get("imad", 0.0)
    return {pipe: rates[pipe] / count for pipe, count in asked.items() if count}
