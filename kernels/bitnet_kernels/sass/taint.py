"""Find the multipliers that touch data: taint analysis of SASS.

Data is every value loaded from memory (global, shared, tensor memory, atomics), and every result
computed from data: in registers, uniform registers and predicates, vectors register by register. A
result is also data if a predicate computed from data guards the instruction. Constant memory holds
kernel parameters and is not data. Local memory belongs to one thread and holds spilled registers:
all of it is data once any data was stored there, none before. The analysis follows the control flow
of the whole kernel, since registers are reused: a register stops being data where an unguarded
instruction overwrites it. Branches on data are not followed.

Multiplier units also move, shift and add: ptxas writes ``R4 = R5`` as IMAD.MOV and a shift by two
as IMAD.SHL by 4, to spread work over pipes. So for *integer* multiply-adds on data the other factor
decides: if it is 0 or plus or minus a power of two, they count as moves, whether the factor is in
the instruction or in a register that holds it on every path. Any other integer multiply-add, and
every floating-point multiplier, dot product and tensor-core instruction, multiplies data."""

import re
from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from bitnet_kernels.sass.read import Instruction, Loop, functions, loops, predecessors, successors

_REGISTER = re.compile(r"\b(UR|UP|R|P)(\d+)(\.64)?\b")
_FIRST_BIT = {"R": 0, "UR": 256, "P": 512, "UP": 528}
_ALL_PREDICATES = {"PR": 0xFF << 512, "UPR": 0xFF << 528}
_LOCAL_MEMORY = 1 << 544

_LOAD = re.compile(r"LD(G|S|SM|TM|GMC)?|ATOM[GS]?|SULD|TEX|TLD4?|B2R")  # B2R: of a barrier
_NO_OUTPUT = re.compile(
    r"(ST|BRA|BRX|JMP|CALL|RET|EXIT|BAR|BSSY|BSYNC|BREAK|WARPSYNC|NANOSLEEP|UTMA|UBLK).*"
    r"|REDG?|WARPGROUP|DEPBAR|LDGDEPBAR|LDGSTS|MEMBAR|FENCE|CCTL|NOP|ERRBAR|YIELD"
)
_TWO_PREDICATES = re.compile(r"\w+SETP2?|U?PLOP3")
_PREDICATE = re.compile(r"R2P|UR2UP|FCHK|VOTEU?|SYNCS")  # alone, if that is what comes first
_PREDICATE_AND_REGISTER = re.compile(r"U?LOP3|SHFL|ATOM[GS]?|MATCH|R2UR|ELECT")
_CARRIES = re.compile(r"U?(IADD3|IMAD|LEA)|VI\w*MNMX\w*|VOTEU?")

_INTEGER = re.compile(r"U?(IMAD|IMUL|XMAD)\w*")
_ALWAYS = re.compile(r"\w*(MUL|MAD|FMA)\w*|U?IDP\w*|MUFU")


class Multipliers(NamedTuple):
    """The instructions of a loop that run on multiplier units, by what they do there.

    ``on_data``: multiply data. ``moving``: move, shift or add data: the factor is a constant 0 or
    power of two, or only the addend is data. ``on_addresses``: have no data among their operands.
    """

    on_data: list[Instruction]
    moving: list[Instruction]
    on_addresses: list[Instruction]


def multipliers(code: list[Instruction], loop: Loop) -> Multipliers:
    """Sort the multipliers of a loop of ``code``, in order of their addresses."""
    found = Multipliers([], [], [])
    states, before = taints(code), predecessors(code)
    for i in sorted(loop.body):
        instruction, state = code[i], states[i]
        if instruction.is_tensor_core:  # reads its operands from memory, or from fragments of it
            found.on_data.append(instruction)
        elif _INTEGER.fullmatch(instruction.base) or _ALWAYS.fullmatch(instruction.base):
            factors = _outputs_and_sources(instruction)[1][:2]
            on_data = any(mask & state for mask in _source_masks(instruction)[:2])
            integer = _INTEGER.fullmatch(instruction.base)
            if on_data and not (
                integer and any(_only_shifts(code, before, i, factor) for factor in factors)
            ):
                found.on_data.append(instruction)
            elif _reads(instruction) & state:
                found.moving.append(instruction)
            else:
                found.on_addresses.append(instruction)
    return found


def outside(code: list[Instruction], loop: Loop) -> list[Instruction]:
    """The instructions that multiply data outside a main loop and the epilogue. The epilogue may
    use fp32 products outside every loop and every called function."""
    inner = functions(code).union(*(other.body for other in loops(code)))
    rest = Loop(frozenset(range(len(code))) - loop.body)
    allowed = {id(code[i]) for i in rest.body - inner if code[i].base in ("FMUL", "FMUL2")}
    return [one for one in multipliers(code, rest).on_data if id(one) not in allowed]


def taints(code: list[Instruction]) -> list[int]:
    """For each instruction, a bit mask of the registers that may hold data before it."""
    following = successors(code)
    behind_calls = [i + 1 for i, one in enumerate(code) if one.base == "CALL" and i + 1 < len(code)]
    effects = [(_writes(one), _surely_writes(one), _reads(one)) for one in code]
    states = [0] * len(code)
    pending = list(range(len(code) - 1, -1, -1))
    while pending:
        i = pending.pop()
        instruction, (writes, surely, reads) = code[i], effects[i]
        state = states[i]
        if _LOAD.fullmatch(instruction.base) or instruction.is_tensor_core or reads & state:
            state |= writes
        else:
            state &= ~surely
        returns = behind_calls if instruction.base == "RET" else []
        for target in (*following[i], *returns):
            if state & ~states[target]:
                states[target] |= state
                pending.append(target)
    return states


def _outputs_and_sources(instruction: Instruction) -> tuple[list[str], list[str]]:
    """An instruction's operands, split into outputs and sources. Outputs come first; their number
    depends on the opcode. For an unknown opcode, operands that may be either count as both, which
    errs on the side of data."""
    base, operands = instruction.base, list(instruction.operands)
    if not operands or _NO_OUTPUT.fullmatch(base) or operands[0][0] in "[`gdt":
        return [], operands
    if _is_predicate(operands[0]):
        if _PREDICATE.fullmatch(base):
            return operands[:1], operands[1:]
        known = _TWO_PREDICATES.fullmatch(base) or _PREDICATE_AND_REGISTER.fullmatch(base)
        return operands[:2], operands[2 if known else 1 :]
    most = {"P2R": 0, "UP2UR": 0, "VOTE": 1, "VOTEU": 1}.get(base, 2)
    carries = list(takewhile(_is_predicate, operands[1 : 1 + most]))  # IADD3 R4, P0, P1, R2, ...
    n_outputs = 1 + len(carries)
    return operands[:n_outputs], operands[n_outputs if _CARRIES.fullmatch(base) else 1 :]


def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T|R)", operand) is not None


def _width(instruction: Instruction) -> int:
    """Registers that an output may occupy. Inputs count as equally wide, except those of loads and
    IMAD.WIDE's factors: this is too wide by one register at worst."""
    base, modifiers = instruction.base, instruction.modifiers
    if instruction.is_tensor_core:
        shape = re.search(r"\.64x(\d+)x", instruction.opcode)
        return max(int(shape[1]) // 2, 1) if shape else 4  # of a warpgroup's 64 x N; of a warp's
    if base == "LDTM":
        return next((int(part[1:]) for part in modifiers if re.fullmatch(r"x\d+", part)), 1)
    if re.fullmatch(r"LD\w*|ULDC|ATOM[GS]?", base):
        return max(instruction.access_bits // 32, 1)
    wide = {"WIDE", "64", "F64", "S64"} & {*modifiers} or (
        base.startswith("D") and base != "DEPBAR"
    )
    if wide or re.fullmatch(r"F(ADD|MUL|FMA)2", base) or (base == "CS2R" and "32" not in modifiers):
        return 2
    return 1


def _writes(instruction: Instruction) -> int:
    """The registers that an instruction may write."""
    outputs, _ = _outputs_and_sources(instruction)
    local = _LOCAL_MEMORY if instruction.base in ("STL", "ST") else 0
    return _union(_mask(operand, _width(instruction)) for operand in outputs) | local


def _surely_writes(instruction: Instruction) -> int:
    """The registers that an instruction is certain to write if it is executed: conversions to and
    from 64 bits, whose width the opcode does not show, count as narrow."""
    outputs, _ = _outputs_and_sources(instruction)
    width = 1 if {"F64", "S64"} & {*instruction.modifiers} else _width(instruction)
    return 0 if instruction.guard else _union(_mask(operand, width) for operand in outputs)


def _reads(instruction: Instruction) -> int:
    """The registers of an instruction's sources and guard."""
    local = _LOCAL_MEMORY if instruction.base == "LDL" else 0
    return _union(_source_masks(instruction)) | _mask(instruction.guard, 1) | local


def _source_masks(instruction: Instruction) -> list[int]:
    _, sources = _outputs_and_sources(instruction)
    widths = [_width(instruction)] * len(sources)
    if "WIDE" in instruction.modifiers:
        widths[:2] = [1, 1]
    elif any("[" in source for source in sources):
        widths = [1] * len(sources)
    return [_mask(source, width) for source, width in zip(sources, widths, strict=True)]


def _mask(operand: str, width: int) -> int:
    """The registers that an operand names; address registers have widths of their own."""
    bare = operand.strip("!-~|+")
    if bare in _ALL_PREDICATES:
        return _ALL_PREDICATES[bare]
    mask = 0
    for kind, number, pair in _REGISTER.findall(operand):
        n = 1 if kind in ("P", "UP") else 2 if pair else width
        mask |= ((1 << n) - 1) << (_FIRST_BIT[kind] + int(number))
    return mask


def _union(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def _only_shifts(code: list[Instruction], before: list[list[int]], i: int, factor: str) -> bool:
    """Whether a factor of instruction ``i`` is 0 or plus or minus a power of two: in the
    instruction itself, or in a register into which every path moves such a constant. ``before`` is
    :func:`bitnet_kernels.sass.read.predecessors` of ``code``."""
    if _is_shift(factor):
        return True
    register = re.fullmatch(r"-?(U?R\d+)(\.reuse)?", factor)
    if register is None:
        return False
    mask = _mask(register[1], 1)
    seen, stack = {i}, [i]
    while stack:
        above = before[stack.pop()]
        if not above:  # the kernel's start, or code that is reached only by calls
            return False
        for j in {*above} - seen:
            seen.add(j)
            one = code[j]
            if one.base == "CALL" or (_writes(one) & mask and not _moves_shift(one)):
                return False
            if not _surely_writes(one) & mask:
                stack.append(j)
    return True


def _moves_shift(instruction: Instruction) -> bool:
    """Whether an instruction writes 0 or plus or minus a power of two into one register."""
    opcode, operands = instruction.opcode, instruction.operands
    moves = (opcode in ("MOV", "UMOV") and len(operands) == 2) or (
        re.fullmatch(r"IMAD\.MOV(\.U32)?", opcode) and operands[1:3] == ("RZ", "RZ")
    )
    return bool(moves) and _is_shift(operands[-1])


def _is_shift(constant: str) -> bool:
    """Whether an instruction's factor is 0 (RZ) or plus or minus a power of two."""
    if constant.strip("-") in ("RZ", "URZ"):
        return True
    if not re.fullmatch(r"-?0x[0-9a-f]+", constant):
        return False
    value = abs(int(constant, 16))
    value = min(value, 2**32 - value)  # -2 may be printed as 0xfffffffe
    return value & (value - 1) == 0
