"""Runs the PTX of ``tl.inline_asm_elementwise`` on the CPU, so that the interpreted tests compare
the inline-asm branch of a kernel, not a copy of its arithmetic, with the reference.

``run`` executes a piece of assembly over numpy arrays: one lane per element, one 32-bit word per
register. ``install`` lets Triton's interpreter, which raises for inline assembly, call it.

The instructions follow NVIDIA's "Parallel Thread Execution ISA"; each function below names its
section there. Instructions that are not emulated raise NotImplementedError. Code that ptxas would
refuse (an undeclared register, a missing semicolon) or that would run by luck (a register read
before it is written) raises ValueError. So does an input that is read after an output was written
that is not marked early-clobber ("=&r"): the compiler may give both the same register, and in an
accumulating loop it does.
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
"""uint32, or bool for a predicate register; of any shape, 0-dimensional for an immediate."""
TYPES = ("u32", "s32")
UNDEFINED = 0xDEADBEEF
"""Fills the bits of a register beside its elements: on a GPU they keep their old contents."""


def wrapped(values: Words) -> Words:
    """Integers of any size to 32-bit words, modulo 2^32."""
    return np.asarray(values).astype(np.int64).astype(np.uint32)


def typed(words: Words, kind: str) -> Words:
    """The words as int64, which holds every sum and difference of two of them."""
    return np.asarray(words).view(np.int32 if kind == "s32" else np.uint32).astype(np.int64)


def parts(words: Words, n: int, kind: str = "u32") -> Words:
    """The n = 2 or 4 equal parts of each word, lowest first, sign- or zero-extended: int64
    [..., n]."""
    width = ("<i" if kind == "s32" else "<u") + str(4 // n)
    return np.ascontiguousarray(np.asarray(words)[..., None]).view(width).astype(np.int64)


def joined(values: Words) -> Words:
    """[..., n] to words, lowest first; bits that do not fit into 32 / n bits are cut off."""
    n = values.shape[-1]
    cut = np.ascontiguousarray(values.astype(f"<u{4 // n}"))
    return cut.view("<u4")[..., 0].astype(np.uint32)


# Logic and Shift Instructions


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """ "lop3": bit 4a + 2b + c of immLut is the result for the bits a, b and c."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for index in range(8):
        if int(table) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def shl(a: Words, b: Words) -> Words:
    """ "shl": amounts above 32 are clamped to 32."""
    return (a.astype(np.uint64) << np.minimum(b, 32).astype(np.uint64)).astype(np.uint32)


def shr(kind: str, a: Words, b: Words) -> Words:
    """ "shr": amounts above 32 are clamped to 32; .s32 fills with the sign bit."""
    return wrapped(typed(a, kind) >> np.minimum(b, 32).astype(np.int64))


def shf(direction: str, mode: str, a: Words, b: Words, c: Words) -> Words:
    """ "shf": the 64-bit value b:a shifted left (its upper word) or right (its lower word)."""
    amount = (np.minimum(c, 32) if mode == "clamp" else c & 31).astype(np.uint64)
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    if direction == "l":
        return ((both << amount) >> np.uint64(32)).astype(np.uint32)
    return (both >> amount).astype(np.uint32)


# Integer Arithmetic Instructions


def popc(a: Words) -> Words:
    """ "popc": the number of one bits."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return wrapped(ones[parts(a, 4)].sum(-1))


def bfe(kind: str, a: Words, b: Words, c: Words) -> Words:
    """ "bfe": c bits of a from bit b on (both modulo 256), zero-extended; for .s32 extended with
    bit min(b + c - 1, 31), and 0 where c is 0."""
    start, length = (b & 255).astype(np.int64), (c & 255).astype(np.int64)
    wide = typed(a, kind)
    field = wide >> np.minimum(start, 32) & (1 << np.minimum(length, 32)) - 1
    negative = (kind == "s32") & (length > 0) & (wide >> np.clip(start + length - 1, 0, 31) & 1)
    return wrapped(field | -negative << np.minimum(length, 32))


def bfi(a: Words, b: Words, c: Words, d: Words) -> Words:
    """ "bfi": b with its d bits from bit c on (both modulo 256) replaced by the low bits of a."""
    start, length = (np.minimum(field & 255, 32).astype(np.int64) for field in (c, d))
    mask = (1 << length) - 1 << start
    return wrapped(b & ~mask | typed(a, "u32") << start & mask)


def dp4a(kinds: tuple[str, ...], a: Words, b: Words, c: Words) -> Words:
    """ "dp4a": c plus the four products of bytes, modulo 2^32."""
    return wrapped(c + (parts(a, 4, kinds[0]) * parts(b, 4, kinds[1])).sum(-1))


def arithmetic(operation: Callable[..., Words], kind: str, *operands: Words) -> Words:
    """ "add", "sub", "mul", "mad", "neg", "min", "max", the .lo half where there are two."""
    return wrapped(operation(*(typed(operand, kind) for operand in operands)))


# Data Movement, Comparison and Selection Instructions


def prmt(a: Words, b: Words, c: Words) -> Words:
    """ "prmt", default mode: byte i is byte c[4i+2:4i] of b:a, or eight copies of that byte's
    sign where bit c[4i+3] is set."""
    a, b, c = np.broadcast_arrays(a, b, c)
    nibbles = (c[..., None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15).astype(np.int64)
    pool = np.concatenate([parts(a, 4), parts(b, 4)], axis=-1)
    chosen = np.take_along_axis(pool, nibbles & 7, axis=-1)
    return joined(np.where(nibbles & 8, -(chosen >> 7), chosen))


def setp(compare: Callable[..., Words], kind: str, a: Words, b: Words) -> Words:
    """ "setp": a predicate."""
    return compare(typed(a, kind), typed(b, kind))


def selp(a: Words, b: Words, p: Words) -> Words:
    """ "selp": a where the predicate is true, else b."""
    return np.where(p, a, b)


# SIMD Video Instructions


def simd(
    operation: Callable[..., Words], kinds: tuple[str, ...], final: str, n: int, *sources: Any
) -> Words:
    """ "vadd2", "vadd4", "vsub2", ...: n lanes of 32 / n bits; ``kinds`` of d, a and b. A lane that
    d's mask leaves out comes from c; with .add, d is c plus the others, each of them whole."""
    a, b, c, *mask = sources
    lanes = operation(parts(a, n, kinds[1]), parts(b, n, kinds[2]))
    chosen = [not mask or str(i) in mask[0] for i in range(n)]
    if final == ".add":
        return wrapped(c + np.where(chosen, lanes, 0).sum(-1))
    if final == ".sat":
        limits = np.iinfo(f"{kinds[0][0]}{4 // n}".replace("s", "i"))
        lanes = np.clip(lanes, limits.min, limits.max)
    return joined(np.where(chosen, lanes, parts(c, n)))


ARITHMETIC: dict[str, tuple[int, Callable[..., Words]]] = {
    "add": (2, operator.add),
    "sub": (2, operator.sub),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "mul.lo": (2, operator.mul),
    "mad.lo": (3, lambda a, b, c: a * b + c),
}
SIMD: dict[str, Callable[..., Words]] = {
    "vadd": operator.add,
    "vsub": operator.sub,
    "vabsdiff": lambda a, b: abs(a - b),
}
INSTRUCTIONS: dict[str, tuple[int, Callable[..., Words]]] = {
    "and.b32": (2, operator.and_),
    "or.b32": (2, operator.or_),
    "xor.b32": (2, operator.xor),
    "not.b32": (1, operator.invert),
    "lop3.b32": (4, lop3),
    "shl.b32": (2, shl),
    "popc.b32": (1, popc),
    "bfi.b32": (4, bfi),
    "prmt.b32": (3, prmt),
    "neg.s32": (1, partial(arithmetic, operator.neg, "s32")),
}
"""The full name of each instruction: the number of its sources, and what it does."""
for kind in ("b32", *TYPES):
    INSTRUCTIONS[f"mov.{kind}"] = (1, operator.pos)
    INSTRUCTIONS[f"shr.{kind}"] = (2, partial(shr, kind))
    INSTRUCTIONS[f"selp.{kind}"] = (3, selp)
for kind in TYPES:
    INSTRUCTIONS[f"bfe.{kind}"] = (3, partial(bfe, kind))
    for name, (n, function) in ARITHMETIC.items():
        INSTRUCTIONS[f"{name}.{kind}"] = (n, partial(arithmetic, function, kind))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        INSTRUCTIONS[f"setp.{name}.{kind}"] = (2, partial(setp, getattr(operator, name), kind))
for side, mode in itertools.product("lr", ("wrap", "clamp")):
    INSTRUCTIONS[f"shf.{side}.{mode}.b32"] = (3, partial(shf, side, mode))
for kinds in itertools.product(TYPES, repeat=2):
    INSTRUCTIONS[f"dp4a.{'.'.join(kinds)}"] = (3, partial(dp4a, kinds))
for name, lanes, final in itertools.product(SIMD, (2, 4), ("", ".sat", ".add")):
    for kinds in itertools.product(TYPES, repeat=3):
        function = partial(simd, SIMD[name], kinds, final, lanes)
        INSTRUCTIONS[f"{name}{lanes}.{'.'.join(kinds)}{final}"] = (3, function)


class Instruction(NamedTuple):
    """One statement; registers are named uniquely, immediates are words."""

    name: str
    target: str
    lanes: str
    sources: tuple[str | Words, ...]


class Program(NamedTuple):
    """Parsed assembly: the registers of the outputs and of the inputs, in order."""

    outputs: list[str]
    inputs: list[str]
    instructions: list[Instruction]


def statements(asm: str) -> Iterator[str]:
    """ "{", "}" and statements that end with a semicolon, without comments."""
    rest = re.sub(r"//[^\n]*|/\*.*?\*/", " ", asm, flags=re.S).strip()
    while rest:
        end = 1 if rest[0] in "{};" else rest.find(";") + 1
        if not end:
            raise ValueError(f"no semicolon after {rest!r}")
        if rest[0] != ";":
            yield rest[:end].rstrip("; \t\n")
        rest = rest[end:].strip()


def immediate(text: str) -> Words | None:
    """ "Integer Constants": decimal, 0x, 0b or octal, with or without U, negated or not."""
    match = re.fullmatch(r"(-?)(0[xX][\da-fA-F]+|0[bB][01]+|0[0-7]*|[1-9]\d*)U?", text)
    if match is None:
        return None
    octal = re.fullmatch(r"0\d+", match[2])
    value = int(match[2], 8 if octal else 0) * (-1 if match[1] else 1)
    if not -(1 << 31) <= value < 1 << 32:
        raise ValueError(f"{text} does not fit into 32 bits")
    return np.asarray(value % (1 << 32), np.uint32)


class Parser:
    """Reads assembly once, and refuses code that a GPU would not run or would run differently."""

    def __init__(self, constraints: str) -> None:
        self.operands: list[str] = []  # the register of $0, $1, ...
        self.outputs: list[str] = []
        self.early: set[str] = set()  # outputs that share no register with an input
        for i, constraint in enumerate(text.strip() for text in constraints.split(",")):
            if constraint in ("=r", "=&r") and len(self.outputs) == i:
                self.outputs.append(f"${i}")
                self.early |= {f"${i}"} if "&" in constraint else set()
            elif constraint != "r" and constraint not in map(str, range(len(self.outputs))):
                raise NotImplementedError(f"constraint {constraint!r} of {constraints!r}")
            self.operands.append(f"${i}" if "r" in constraint else f"${constraint}")
        self.inputs = self.operands[len(self.outputs) :]
        self.untied = set(self.inputs) - set(self.outputs)
        self.scopes: list[dict[str, str]] = [{}]
        self.predicates: set[str] = set()
        self.written = set(self.inputs)
        self.may_be_lost = False
        self.instructions: list[Instruction] = []

    def register(self, text: str) -> str:
        names = {f"${i}": name for i, name in enumerate(self.operands)}
        for scope in self.scopes:
            names |= scope  # of two registers with the same name, the innermost
        if text not in names:
            raise ValueError(f"{text!r} is no register, operand or 32-bit integer")
        return names[text]

    def declare(self, kind: str, names: str) -> None:
        if len(self.scopes) == 1:
            # A thread that has several elements repeats the assembly in one function.
            raise ValueError("a .reg outside of { } is declared twice")
        if kind not in ("b32", *TYPES, "pred"):
            raise NotImplementedError(f"registers of type .{kind}")
        for name in re.split(r"\s*,\s*", names):
            stem, _, count = name.rstrip(">").partition("<")
            for full in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                unique = f"{full} of block {len(self.scopes)}, {len(self.written)}"
                self.scopes[-1][full] = unique
                self.predicates |= {unique} if kind == "pred" else set()

    def source(self, text: str, name: str, wants_predicate: bool) -> str | Words:
        if (value := immediate(text)) is not None and not wants_predicate:
            return value
        register = self.register(text)
        if register not in self.written:
            raise ValueError(f"{name} reads {text} before it is written")
        if (register in self.predicates) != wants_predicate:
            raise ValueError(f"{name} cannot read {text}")
        if register in self.untied and self.may_be_lost:
            raise ValueError(f"{name} reads {text} after an output was written: mark that =&r")
        return register

    def instruction(self, name: str, operands: list[str]) -> None:
        if name not in INSTRUCTIONS:
            raise NotImplementedError(f"the PTX emulator has no instruction {name}")
        if any(re.search(r"[{}\[\]|]|\w\.", operand) for operand in operands[1:]):
            raise NotImplementedError(f"operands of {name} {', '.join(operands)}")
        if len(operands) != INSTRUCTIONS[name][0] + 1:
            raise ValueError(f"{name} with {len(operands)} operands")
        predicates = [name.startswith("selp") and i == 2 for i in range(4)]
        sources = tuple(map(self.source, operands[1:], [name] * 4, predicates))
        if name == "lop3.b32" and (isinstance(sources[3], str) or sources[3] > 255):
            raise ValueError("the table of lop3 is an integer from 0 to 255")
        if re.match(r"v\w+[24]\.", name) and not all(isinstance(text, str) for text in sources):
            raise ValueError(f"{name} takes registers only")
        target, dot, lanes = operands[0].partition(".")
        if dot and not re.fullmatch(r"v\w+2\.\S+ h1?0?|v\w+4\.\S+ b3?2?1?0?", f"{name} {lanes}"):
            raise ValueError(f"{name} cannot write {operands[0]}")
        register = self.register(target)
        if register in self.untied or (register in self.predicates) != name.startswith("setp"):
            raise ValueError(f"{name} cannot write {target}")
        self.written.add(register)
        self.may_be_lost |= register in self.outputs and register not in self.early
        self.instructions.append(Instruction(name, register, lanes[1:], sources))


@cache
def parse(asm: str, constraints: str) -> Program:
    parser = Parser(constraints)
    for statement in statements(asm):
        if statement == "{":
            parser.scopes.append({})
        elif statement == "}":
            parser.scopes.pop()
            if not parser.scopes:
                raise ValueError("} without {")
        elif match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", statement, re.S):
            parser.declare(match[1], match[2])
        else:
            name, *rest = statement.split(None, 1)
            parser.instruction(name, re.split(r"\s*,\s*", "".join(rest)))
    if len(parser.scopes) != 1:
        raise ValueError("{ without }")
    if missing := set(parser.outputs) - parser.written:
        raise ValueError(f"outputs {sorted(missing)} are never written")
    return Program(parser.outputs, parser.inputs, parser.instructions)


def run(asm: str, constraints: str, args: list[Words]) -> list[Words]:
    """Execute assembly on each lane.

    Args:
        asm: PTX, its operands $0, $1, ... numbered outputs first.
        constraints: as LLVM writes them: "=r" and "=&r" (outputs), "r", and a number for an input
            that starts in that output's register.
        args: an array per input, uint32 or int32, of shapes that broadcast.

    Returns:
        An array per output, uint32, of the broadcast shape.
    """
    program = parse(asm, constraints)
    if len(program.inputs) != len(args):
        raise ValueError(f"{len(args)} arguments for the constraints {constraints!r}")
    shape = np.broadcast_shapes(*(np.shape(arg) for arg in args))
    registers: dict[str, Words] = {}
    for name, arg in zip(program.inputs, args, strict=True):
        if arg.dtype not in (np.uint32, np.int32):
            raise ValueError(f"arguments are 32-bit integers, not {arg.dtype}")
        registers[name] = np.asarray(arg).view(np.uint32)
    with np.errstate(over="ignore"):  # numpy warns of scalars that wrap around
        for name, target, lanes, sources in program.instructions:
            values = [registers[text] if isinstance(text, str) else text for text in sources]
            registers[target] = INSTRUCTIONS[name][1](*values, *([lanes] if lanes else []))
    return [np.broadcast_to(registers[name], shape) for name in program.outputs]


# Triton's interpreter


def to_registers(data: NDArray[Any], pack: int) -> list[Words]:
    """The registers in which Triton passes ``pack`` consecutive elements to the assembly: one per
    32-bit element; for smaller ones 32 / bits elements per register, the first lowest."""
    bits = data.itemsize * 8
    per_register = min(pack, 32 // bits)
    n_registers = -(-pack * data.itemsize // 4)
    words = np.full((-(-data.size // pack), n_registers), UNDEFINED, np.uint32)
    slots = words.view(f"<u{data.itemsize}").reshape(len(words), n_registers, 32 // bits)
    flat = np.full(len(words) * pack, UNDEFINED, np.uint32).astype(slots.dtype)
    flat[: data.size] = data.reshape(-1).view(slots.dtype)
    slots[:, :, :per_register] = flat.reshape(len(words), n_registers, per_register)
    return [words[:, i] for i in range(n_registers)]


def from_registers(words: list[Words], dtype: np.dtype[Any], pack: int) -> NDArray[Any]:
    """The inverse of ``to_registers``: flat, with all elements of the registers."""
    per_register = min(pack, 4 // dtype.itemsize)
    slots = np.ascontiguousarray(np.stack(words, axis=-1)).view(f"<u{dtype.itemsize}")
    slots = slots.reshape(len(slots), len(words), 4 // dtype.itemsize)
    return slots[:, :, :per_register].reshape(-1).view(dtype)


def integer_type(kind: Any) -> np.dtype[Any]:
    """The numpy type of a Triton type that fits into 32-bit registers."""
    from triton.runtime import interpreter

    dtype: np.dtype[Any] = interpreter._get_np_dtype(kind)
    if dtype.kind not in "iu" or dtype.itemsize > 4:
        raise NotImplementedError(f"inline assembly on {kind}")
    return dtype


def install() -> None:
    """Let ``tl.inline_asm_elementwise`` run in interpreted kernels from now on, in this process.

    Elements are passed to the assembly as the compiler does it: for each argument, in order, the
    registers of ``pack`` elements, and the results likewise, from $0 on. Triton does not specify
    which ``pack`` elements (a layout decides); here they are adjacent in memory.
    """
    from triton.runtime import interpreter

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
    ) -> SimpleNamespace:
        shape = types[0].shape if types[0].is_block() else (1,)
        args: list[Words] = []
        for value in values:
            data = value.data.astype(integer_type(value.dtype))
            args += to_registers(np.ascontiguousarray(np.broadcast_to(data, shape)), pack)
        results = run(asm, constraints, args)
        handles = []
        for kind in types:
            dtype = integer_type(kind)
            n_registers = -(-pack * dtype.itemsize // 4)
            if len(results) < n_registers:
                raise ValueError(f"{constraints!r} has too few outputs")
            data = from_registers(results[:n_registers], dtype, pack)
            results = results[n_registers:]
            handles.append(
                interpreter.TensorHandle(data[: math.prod(shape)].reshape(shape), kind.scalar)
            )
        if results:
            raise ValueError(f"{constraints!r} has too many outputs")
        return SimpleNamespace(get_result=handles.__getitem__)

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
