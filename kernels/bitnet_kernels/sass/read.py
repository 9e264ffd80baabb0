"""Parse SASS as nvdisasm prints it: instructions, the flow between them, and the main loop.

    /*0120*/              @!P1 IADD3 R4, P0, R2, c[0x0][0x160], RZ ;
    address               guard base.modifiers operands

A loop is a natural loop of the control-flow graph: a backward branch whose target lies on every
path to the branch, with all code between them. (Code that ptxas moved out of line jumps backward,
too.)
"""

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)(.*);")
_LABEL = re.compile(r"\s*([\w.$]+):\s*$")
_TARGET = re.compile(r"`\(([\w.$]+)\)")
_TENSOR = re.compile(r"[A-Z]+MMA")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Instruction(NamedTuple):
    """One instruction: ``IMAD.WIDE.U32`` has the base ``IMAD`` and modifiers ``WIDE``, ``U32``.

    ``guard`` is the predicate that must hold for it to be executed, "" for always; ``target`` is
    the address that it may branch to, or None.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The opcode's dotted parts after the first."""
        return tuple(self.opcode.split(".")[1:])

    @property
    def is_tensor_core(self) -> bool:
        """HMMA, IMMA, IGMMA, UTCIMMA, ...; HFMA2.MMA is none of them."""
        return _TENSOR.fullmatch(self.base) is not None

    @property
    def access_bits(self) -> int:
        """Bits that a thread moves, if this is a load or a store."""
        if self.base in ("LDSM", "STSM"):
            return 32 * next((int(part) for part in self.modifiers if part in ("2", "4")), 1)
        return next((_BITS[part] for part in self.modifiers if part in _BITS), 32)

    @property
    def is_weight_load(self) -> bool:
        """Whether it is a global load marked evict-first: the matmuls mark only packed weights."""
        return self.base == "LDG" and "EF" in self.modifiers


class Loop(NamedTuple):
    """Indices of the instructions of a loop. ``looped`` is False if this is a whole kernel that has
    no loop."""

    body: frozenset[int]
    looped: bool = True


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing, including NOPs, in order of their addresses.

    Raises:
        ValueError: the listing holds none, or more than one function.
    """
    labels: dict[str, int] = {}
    waiting: list[str] = []
    rows: list[tuple[int, str, str, str]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            address = int(found[1], 16)
            if rows and address <= rows[-1][0]:
                raise ValueError("a listing of more than one function")
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            rows.append((address, found[2] or "", found[3], found[4].strip()))
    if not rows:
        raise ValueError("a listing without instructions")
    instructions = []
    for address, guard, opcode, text in rows:
        named = _TARGET.search(text)
        target = labels.get(named[1]) if named else None
        instructions.append(Instruction(address, guard, opcode, _split(text), target))
    return instructions


def _split(text: str) -> tuple[str, ...]:
    """The operands, split at commas outside brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", text) if part.strip())


def successors(code: list[Instruction]) -> list[list[int]]:
    """Which instructions may follow each one. A call is followed both by the next instruction (a
    loop that calls is still a loop) and by its function, which ends where it returns.

    Raises:
        ValueError: an indirect branch, whose targets the listing does not show.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following: list[list[int]] = []
    for i, instruction in enumerate(code):
        base, conditional = instruction.base, bool(instruction.guard)
        after = [i + 1] if i + 1 < len(code) else []
        if base in ("BRX", "JMX", "BRXU"):
            raise ValueError(f"an indirect branch at {instruction.address:#x}")
        if base in ("EXIT", "RET", "KILL"):
            following.append(after if conditional else [])
        elif base in ("BRA", "JMP", "CALL") and instruction.target is not None:
            goes_on = conditional or base == "CALL" or len(instruction.operands) > 1
            following.append([index[instruction.target], *(after if goes_on else [])])
        else:  # BSSY names the address right after its BSYNC
            following.append(after)
    return following


def predecessors(code: list[Instruction]) -> list[list[int]]:
    """Which instructions may come right before each one, from :func:`successors`."""
    before: list[list[int]] = [[] for _ in code]
    for i, targets in enumerate(successors(code)):
        for target in targets:
            before[target].append(i)
    return before


def functions(code: list[Instruction]) -> frozenset[int]:
    """Indices of the instructions of the functions that the kernel calls, which calls enter and
    returns leave. (A call that never returns is a jump.)"""
    edges, index = successors(code), {one.address: i for i, one in enumerate(code)}
    found: set[int] = set()
    for one in code:
        if one.base == "CALL" and one.target is not None:
            body = _reach(edges, index[one.target])
            if any(code[i].base == "RET" for i in body):
                found |= body
    return frozenset(found)


def loops(code: list[Instruction]) -> list[Loop]:
    """Every loop; loops with the same head are one."""
    following, before = successors(code), predecessors(code)
    reachable = _reach(following, 0)
    bodies: dict[int, set[int]] = {}
    for tail in sorted(reachable):
        for head in following[tail]:
            if head <= tail and tail not in _reach(following, 0, without=head):
                bodies.setdefault(head, {head}).update(
                    _reach(before, tail, without=head) & reachable
                )
    return [Loop(frozenset(body)) for body in bodies.values()]


def _reach(edges: list[list[int]], start: int, without: int = -1) -> set[int]:
    """The nodes reachable from ``start``, including itself, on paths that avoid ``without``."""
    seen = {start} - {without}
    stack = list(seen)
    while stack:
        for target in edges[stack.pop()]:
            if target not in seen and target != without:
                seen.add(target)
                stack.append(target)
    return seen


def main_loop(code: list[Instruction]) -> Loop:
    """The innermost loop that loads the most weights. If weights come in other ways, it is the one
    with the most tensor-core instructions, else the one that loads the most bytes of global memory.

    Of two loops that load the same amount it is the shorter, since masked copies are longer.
    """

    def score(loop: Loop) -> tuple[int, int, int]:
        body = [code[i] for i in loop.body]
        return (
            sum(one.access_bits for one in body if one.is_weight_load),
            sum(one.is_tensor_core for one in body),
            sum(one.access_bits for one in body if one.base in ("LDG", "LDGSTS")),
        )

    working = [loop for loop in loops(code) if any(score(loop))]
    innermost = [loop for loop in working if not any(other.body < loop.body for other in working)]
    if not innermost:
        return Loop(frozenset(range(len(code))), looped=False)
    return max(innermost, key=lambda loop: (score(loop), -len(loop.body)))
