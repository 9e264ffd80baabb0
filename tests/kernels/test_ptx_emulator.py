"""The PTX emulator against scalar Python, against ptxas, and inside Triton's interpreter."""

import importlib.util
import json
import operator
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.scripts import run_script

HELPERS = Path(__file__).parents[1] / "helpers"
SPEC = importlib.util.spec_from_file_location("ptx_emulator", HELPERS / "ptx_emulator.py")
assert SPEC is not None
assert SPEC.loader is not None
emulator = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emulator)
run, INSTRUCTIONS = emulator.run, emulator.INSTRUCTIONS

CORNERS = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80808080, 0x7F7F7F7F, 0x00FF00FF, 0xFF80017F]
AMOUNTS = [2, 7, 8, 16, 30, 31, 32, 33, 63, 64, 255, 256, 261]
SIMD = re.compile(r"v\w+[24]\.")
Scalar = Callable[..., int]


def number(word: int, kind: str, bits: int = 32) -> int:
    """The low bits of a word as a signed ("s32", "s8") or unsigned number."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if kind[0] == "s" and word >> (bits - 1) else word


def fields(word: int, n: int, kind: str) -> list[int]:
    return [number(word >> 32 // n * i, kind, 32 // n) for i in range(n)]


def bfe_of(kind: str, a: int, b: int, c: int) -> int:
    start, length = b & 255, c & 255
    last = min(start + length - 1, 31)
    sign = a >> last & 1 if kind == "s32" and length else 0
    bits = [a >> (start + i) & 1 if i < length and start + i < 32 else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def bfi_of(a: int, b: int, c: int, d: int) -> int:
    for i in range(d & 255):
        position = (c & 255) + i
        if position < 32:
            b = b & ~(1 << position) | (a >> i & 1) << position
    return b


def prmt_of(a: int, b: int, c: int) -> int:
    pool = (a | b << 32).to_bytes(8, "little")
    out = []
    for i in range(4):
        selector = c >> 4 * i & 15
        byte = pool[selector & 7]
        out.append((255 if byte >= 128 else 0) if selector >= 8 else byte)
    return int.from_bytes(bytes(out), "little")


def shf_of(side: str, mode: str, a: int, b: int, c: int) -> int:
    n = min(c, 32) if mode == "clamp" else c % 32
    return (b << n | a >> (32 - n)) if side == "l" else (b << (32 - n) | a >> n)


def simd_of(name: str, lanes: str, a: int, b: int, c: int) -> int:
    operation, kind_d, kind_a, kind_b, *final = name.split(".")
    n = int(operation[-1])
    results = []
    for x, y in zip(fields(a, n, kind_a), fields(b, n, kind_b), strict=True):
        value = {"vadd": x + y, "vsub": x - y, "vabsdiff": abs(x - y)}[operation[:-1]]
        if final == ["sat"]:
            size = 1 << 32 // n
            low = -size // 2 if kind_d == "s32" else 0
            value = sorted([low, value, low + size - 1])[1]
        results.append(value)
    chosen = [str(i) in lanes for i in range(n)]
    if final == ["add"]:
        return c + sum(value for value, use in zip(results, chosen, strict=True) if use)
    merged = [
        value if use else old
        for value, use, old in zip(results, chosen, fields(c, n, "u32"), strict=True)
    ]
    bits = 32 // n
    return sum((value % (1 << bits)) << bits * i for i, value in enumerate(merged))


def oracle(name: str) -> Scalar:
    """What an instruction does to integers, one at a time; the result may exceed 32 bits."""
    opcode, _, rest = name.partition(".")
    kind = rest.rpartition(".")[2]
    if opcode == "shf":
        side, mode, _ = rest.split(".")
        return lambda a, b, c: shf_of(side, mode, a, b, c)
    if opcode == "dp4a":
        kind_a, kind_b = rest.split(".")
        return lambda a, b, c: (
            c + sum(x * y for x, y in zip(fields(a, 4, kind_a), fields(b, 4, kind_b), strict=True))
        )
    if opcode == "setp":
        compare = getattr(operator, rest.partition(".")[0])
        return lambda a, b: int(compare(number(a, kind), number(b, kind)))
    if SIMD.match(name):
        return lambda a, b, c: simd_of(name, "0123", a, b, c)
    by_opcode: dict[str, Scalar] = {
        "mov": lambda a: a,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "not": lambda a: ~a,
        "shl": lambda a, b: a << min(b, 64),
        "shr": lambda a, b: number(a, kind) >> b,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "mad": lambda a, b, c: a * b + c,
        "neg": lambda a: -a,
        "min": lambda a, b: min(number(a, kind), number(b, kind)),
        "max": lambda a, b: max(number(a, kind), number(b, kind)),
        "popc": lambda a: bin(a).count("1"),
        "bfe": lambda a, b, c: bfe_of(kind, a, b, c),
        "bfi": bfi_of,
        "prmt": prmt_of,
        "selp": lambda a, b, p: a if p else b,
    }
    return by_opcode[opcode]


def statement(name: str, target: str, sources: list[str]) -> str:
    """The instruction, and around those of predicates what makes and reads one in 32 bits."""
    if name.startswith("setp"):
        return f"{name} p, {', '.join(sources)}; selp.b32 {target}, 1, 0, p;"
    if name.startswith("selp"):
        return f"setp.ne.u32 p, {sources[2]}, 0; {name} {target}, {sources[0]}, {sources[1]}, p;"
    return f"{name} {target}, {', '.join(sources)};"


def words(*values: int) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


def tuples(n: int, count: int = 300) -> list[tuple[int, ...]]:
    """Operands: corners and shift amounts as often as random words."""

    def word() -> int:
        pool = random.choice([CORNERS, AMOUNTS, None])
        return random.getrandbits(32) if pool is None else random.choice(pool)

    return [tuple(word() for _ in range(n)) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(set(INSTRUCTIONS) - {"lop3.b32"}))
def test_an_instruction_equals_scalar_python(name: str) -> None:
    n = INSTRUCTIONS[name][0]
    cases = tuples(n)
    inputs = [f"${i + 1}" for i in range(n)]
    asm = "{ .reg .pred p; " + statement(name, "$0", inputs) + " }"
    columns = [words(*column) for column in zip(*cases, strict=True)]
    (got,) = run(asm, ",".join(["=&r", *["r"] * n]), columns)
    assert got.dtype == np.uint32
    assert got.tolist() == [oracle(name)(*case) % (1 << 32) for case in cases]
    for case in cases[: 0 if SIMD.match(name) else 20]:  # the same as immediates
        asm = "{ .reg .pred p; " + statement(name, "$0", [hex(word) for word in case]) + " }"
        assert run(asm, "=r", [])[0] == oracle(name)(*case) % (1 << 32)


def test_lop3_against_its_truth_table() -> None:
    a, b, c = words(0xF0), words(0xCC), words(0xAA)  # all eight combinations of three bits
    cases = tuples(3, 20)
    for table in range(256):
        asm = f"lop3.b32 $0, $1, $2, $3, {table:#x};"
        assert run(asm, "=r,r,r,r", [a, b, c])[0].item() & 255 == table
        got = run(asm, "=r,r,r,r", [words(*column) for column in zip(*cases, strict=True)])[0]
        for word, (x, y, z) in zip(got.tolist(), cases, strict=True):
            for i in range(32):
                index = (x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)
                assert word >> i & 1 == table >> index & 1


@pytest.mark.parametrize("nibble", range(16))
def test_prmt_selectors(nibble: int) -> None:
    """Each selector in each of the four positions, of words whose bytes all differ."""
    a, b = 0x83_02_81_00, 0x07_86_05_84
    byte = [0x00, 0x81, 0x02, 0x83, 0x84, 0x05, 0x86, 0x07][nibble % 8]
    if nibble >= 8:
        byte = 0xFF if byte & 0x80 else 0x00
    for i in range(4):
        others = 0x3210 & ~(15 << 4 * i)
        want = (a & ~(255 << 8 * i)) | byte << 8 * i
        selector = 0xABCD0000 | others | nibble << 4 * i  # the upper half does not count
        assert run("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [words(a), words(b), words(selector)])[
            0
        ].tolist() == [want]


@pytest.mark.parametrize(
    ("name", "sources", "want"),
    [
        ("prmt.b32", "0x80017FFF, 0, 0xBA98", 0xFF0000FF),
        ("shf.l.wrap.b32", "0x80000001, 0x00000001, 4", 0x00000018),
        ("shf.r.wrap.b32", "0x80000001, 0x00000001, 36", 0x18000000),
        ("shf.r.clamp.b32", "0x80000001, 0x00000001, 36", 0x00000001),
        ("bfe.s32", "0x000000F0, 4, 4", 0xFFFFFFFF),
        ("bfe.u32", "0x000000F0, 4, 4", 0x0000000F),
        ("bfi.b32", "0xFF, 0, 4, 8", 0x00000FF0),
        ("shr.s32", "0x80000000, 40", 0xFFFFFFFF),
        ("shr.u32", "0x80000000, 40", 0),
        ("shl.b32", "1, 32", 0),
        ("popc.b32", "0xF000000F", 8),
        ("lop3.b32", "0xFF00FF00, 0xF0F0F0F0, 0xCCCCCCCC, 0x28", 0x0CC00CC0),
        ("dp4a.u32.s32", "0xFF010203, 0x80FF0201, 10", 255 * -128 - 1 + 4 + 3 + 10),
        ("dp4a.s32.s32", "0xFF010203, 0x80FF0201, 10", 128 - 1 + 4 + 3 + 10),
        ("dp4a.u32.u32", "0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF", 4 * 65025 - 1),
        ("vabsdiff4.u32.u32.u32.add", "0xFF00807F, 0x00FF7F80, 1", 255 + 255 + 1 + 1 + 1),
        ("vabsdiff4.u32.s32.s32.add", "0xFF00807F, 0x00FF7F80, 1", 1 + 1 + 255 + 255 + 1),
        ("vabsdiff4.u32.u32.s32.add", "0xFF000000, 0x80000000, 0", 255 + 128),
        ("vabsdiff4.u32.u32.s32", "0xFF000000, 0x80000000, 0", 0x7F000000),  # 383 cut off
        ("vabsdiff4.u32.u32.s32.sat", "0xFF000000, 0x80000000, 0", 0xFF000000),
        ("vabsdiff4.s32.u32.u32.sat", "0xFF000000, 0x00000001, 0", 0x7F000001),
        ("vabsdiff2.u32.u32.u32.add", "0xFFFF0000, 0x00000001, 2", 65535 + 1 + 2),
        ("vadd4.u32.u32.u32", "0xFF01FF7F, 0x01010101, 0", 0x00020080),
        ("vsub4.u32.u32.u32.sat", "0x00010203, 0x01010101, 0", 0x00000102),
        ("vsub4.s32.s32.s32.add", "0x00010203, 0x01010101, 0", 2),
        ("mad.lo.s32", "-3, 5, 1", -14),
    ],
)
def test_example_by_hand(name: str, sources: str, want: int) -> None:
    values = [words(int(text, 0) % (1 << 32)) for text in sources.split(", ")]
    if name == "lop3.b32":
        asm = f"{name} $0, $1, $2, $3, {values.pop().item()};"
    else:
        asm = f"{name} $0, {', '.join(f'${i + 1}' for i in range(len(values)))};"
    assert run(asm, ",".join(["=r", *["r"] * len(values)]), values)[0] == want % (1 << 32)


@pytest.mark.parametrize(
    "name", [name for name in INSTRUCTIONS if re.match(r"v\w+\.s32\.u32", name)]
)
def test_masks_of_simd_destinations(name: str) -> None:
    n = int(name.partition(".")[0][-1])
    for chosen in range(1, 1 << n):
        lanes = "".join(str(i) for i in reversed(range(n)) if chosen >> i & 1)
        cases = tuples(3, 20)
        asm = f"{name} $0.{'h' if n == 2 else 'b'}{lanes}, $1, $2, $3;"
        (got,) = run(asm, "=r,r,r,r", [words(*column) for column in zip(*cases, strict=True)])
        assert got.tolist() == [simd_of(name, lanes, *case) % (1 << 32) for case in cases]


def test_comments_scopes_and_constants_are_parsed() -> None:
    asm = """
        // a comment; with a semicolon { and a brace
        { .reg .b32 a, b<3>;
          .reg .u32 %t; /* another;
          one */ .reg .s32 c;
          mov.b32 a, 0x1F; mov.b32 b0, 017;
          mov.b32 b2, -1;mov.u32 %t,0b101U
          ;
          { .reg .b32 a; mov.b32 a, 100; add.u32 b0, b0, a; }
          mov.s32\tc, b2;
          add.s32 $0, a, b0;
          add.s32 $1, %t, c;
        }
        { .reg .b32 a; mov.b32 a, $3; add.s32 $1, $1, a; }
        add.s32 $2, $2, $3;
    """
    outputs = run(asm, "=&r,=&r, =&r,r,2", [words(5, 6), np.array([-1, 7], np.int32)])
    assert [output.tolist() for output in outputs] == [[146, 146], [9, 10], [4, 13]]


def test_shapes_broadcast() -> None:
    got = run("add.s32 $0, $1, $2;", "=r,r,r", [words(1, 2)[:, None], words(10, 20, 30)])[0]
    assert got.tolist() == [[11, 21, 31], [12, 22, 32]]
    assert run("mov.b32 $0, 7;", "=r,r", [words(1, 2)])[0].tolist() == [7, 7]


def test_arguments_are_left_alone() -> None:
    x = words(1, 2)
    run("add.s32 $0, $0, 1;", "=r,0", [x])
    assert x.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("asm", "constraints", "error", "message"),
    [
        ("ex2.approx.f32 $0, $1;", "=r,r", NotImplementedError, "ex2.approx.f32"),
        ("@p mov.b32 $0, $1;", "=r,r", NotImplementedError, "@p"),
        ("mov.b32 $0, $1;", "=f,r", NotImplementedError, "constraint '=f'"),
        ("mov.b32 $0, $1;", "=r,l", NotImplementedError, "constraint 'l'"),
        ("mov.b32 $0, $1;", "=r,1", NotImplementedError, "constraint '1'"),
        ("{ .reg .b64 a; }", "=r,r", NotImplementedError, "b64"),
        ("mov.b32 $0, {a, b};", "=r,r", NotImplementedError, "operands of mov.b32"),
        (
            "vadd4.u32.u32.u32 $0, $1.b7654, $1, $1;",
            "=r,r",
            NotImplementedError,
            "operands of vadd4",
        ),
        ("mov.b32 $0, $1", "=r,r", ValueError, "no semicolon"),
        ("{ mov.b32 $0, $1;", "=r,r", ValueError, "without }"),
        ("mov.b32 $0, $1; }", "=r,r", ValueError, "without {"),
        ("mov.b32 $0, $2;", "=r,r", ValueError, r"'\$2'"),
        ("mov.b32 $0, a;", "=r,r", ValueError, "'a'"),
        ("{ .reg .b32 a; mov.b32 a, 1; } mov.b32 $0, a;", "=r,r", ValueError, "'a'"),
        (".reg .b32 a; mov.b32 $0, $1;", "=r,r", ValueError, "declared twice"),
        ("{ .reg .b32 a; mov.b32 $0, a; }", "=r,r", ValueError, "before it is written"),
        ("add.s32 $0, $0, $1;", "=r,r", ValueError, "before it is written"),
        ("add.s32 $0, $1;", "=r,r", ValueError, "2 operands"),
        ("add.s32 $0, $1, 0x100000000;", "=r,r", ValueError, "does not fit"),
        ("add.s32 $0, $1, -2147483649;", "=r,r", ValueError, "does not fit"),
        ("mov.b32 $0, 08;", "=r,r", ValueError, "'08'"),
        ("lop3.b32 $0, $1, $1, $1, $1;", "=r,r", ValueError, "0 to 255"),
        ("lop3.b32 $0, $1, $1, $1, 256;", "=r,r", ValueError, "0 to 255"),
        ("add.s32 $0.b0, $1, 1;", "=r,r", ValueError, r"cannot write \$0.b0"),
        ("vadd4.u32.u32.u32 $0, $1, $1, 0;", "=r,r", ValueError, "registers only"),
        ("vadd4.u32.u32.u32 $0.b01, $1, $1, $1;", "=r,r", ValueError, r"cannot write \$0.b01"),
        ("vadd2.u32.u32.u32 $0.b1, $1, $1, $1;", "=r,r", ValueError, r"cannot write \$0.b1"),
        ("mov.b32 $1, $1;", "=r,r", ValueError, r"cannot write \$1"),
        ("{ .reg .pred p; mov.b32 p, $1; }", "=r,r", ValueError, "cannot write p"),
        ("setp.eq.s32 $0, $1, $1;", "=r,r", ValueError, r"cannot write \$0"),
        ("selp.b32 $0, $1, $1, $1;", "=r,r", ValueError, r"cannot read \$1"),
        ("selp.b32 $0, $1, $1, 1;", "=r,r", ValueError, "'1'"),
        ("mov.b32 $0, $2;", "=r,=r,r", ValueError, r"outputs \['\$1'\] are never written"),
        ("mov.b32 $0, 1; add.s32 $0, $0, $1;", "=r,r", ValueError, "=&r"),
        ("mov.b32 $0, 1; mov.b32 $1, $2;", "=r,=&r,r", ValueError, "=&r"),
        ("mov.b32 $0, $1;", "=r,r,r", ValueError, "1 arguments"),
    ],
)
def test_what_is_refused(asm: str, constraints: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(asm, constraints, [words(1)])


def test_arguments_must_be_32_bit_integers() -> None:
    with pytest.raises(ValueError, match="float32"):
        run("mov.b32 $0, $1;", "=r,r", [np.ones(1, np.float32)])


# Inside Triton, in processes of their own.

MIXED = (  # $5 holds four bytes, $6 to $9 a word each; the comment shows their registers in PTX
    "// at $0 $1 $2 $3 $4 $5 $6 $7 $8 $9\n"
    "prmt.b32 $0, $5, 0, 0x4440; prmt.b32 $1, $5, 0, 0x4441; prmt.b32 $2, $5, 0, 0x4442;"
    "prmt.b32 $3, $5, 0, 0x4443; add.s32 $0, $0, $6; add.s32 $1, $1, $7; add.s32 $2, $2, $8;"
    "add.s32 $3, $3, $9; { .reg .b32 t; mov.b32 t, 0x01010101;"
    "vadd4.u32.u32.u32 $4, $5, t, t; }"
)


def run_kernels(argument: object, cache: Path, **env: str) -> dict[str, Any]:
    """What ``ptx_kernels.py`` prints; TRITON_INTERPRET is unset unless given."""
    stdin = json.dumps(argument)
    return json.loads(run_script("ptx_kernels.py", stdin=stdin, TRITON_CACHE_DIR=str(cache), **env))


def test_interpreted_kernels(tmp_path: Path) -> None:
    unknown, unwritten = "ex2.approx.f32 $0, $1;", "mov.b32 $0, $2;"
    found = run_kernels([MIXED, unknown, unwritten], tmp_path, TRITON_INTERPRET="1")
    assert found["two outputs"] == [[[6, 7, 8, 9], [-5, -4, -3, -2]], [[-95] * 4, [-106] * 4]]
    for size in (1, 2, 16):
        assert found[f"words and bytes {size}"] == [
            [200 + i + 1000 * i - 3000 for i in range(size)],
            [201 + i for i in range(size)],
        ]
    assert found["pairs"] == [-1, 1, -5, 5, -9, 9, -13, 13]
    # What is above an element is not its extension.
    assert [word & 255 for word in found["one byte"]] == [1, 255]
    assert all(word >> 8 not in (0, 0xFFFFFF) for word in found["one byte"])
    assert "no instruction ex2.approx.f32" in found[unknown]
    assert "never written" in found[unwritten]
    assert "inline assembly on fp32" in found["mov.b32 $0, $1;"]


def every_instruction() -> str:
    """Assembly with each emulated instruction, its results mixed into $0."""
    parts = []
    for name, (n, _) in INSTRUCTIONS.items():
        parts.append(statement(name, "t", ["$0", "$1", "$0", "9"][:n]))
        if SIMD.match(name):
            parts.append(f"{name} t.{'b210' if '4.' in name else 'h1'}, t, $1, $0;")
        parts.append("shf.l.wrap.b32 $0, $0, $0, 5; xor.b32 $0, $0, t;")
    return "\n".join(["{ .reg .b32 t; .reg .pred p; mov.b32 $0, $1;", *parts, "}"])


FOLDED = [name for name in INSTRUCTIONS if not re.match(r"prmt|lop3|dp4a|v\w+[24]\.", name)]
"""Instructions that ptxas evaluates itself where their operands are constants."""


def differences(cases: list[tuple[str, tuple[int, ...], int]]) -> str:
    """Assembly that makes 0 if each instruction gives the word it is listed with."""
    parts = ["{ .reg .b32 t, s<4>; .reg .pred p; mov.b32 $0, 0;"]
    for name, case, want in cases:
        parts += [f"mov.b32 s{i}, {word:#x};" for i, word in enumerate(case)]
        parts.append(statement(name, "t", [f"s{i}" for i in range(len(case))]))
        parts.append(f"xor.b32 t, t, {want:#x}; or.b32 $0, $0, t;")
    return "\n".join([*parts, "}"])


@pytest.mark.parametrize("sm", [80, 90])
def test_compiled_kernels(tmp_path: Path, sm: int) -> None:
    """ptxas takes every emulated instruction, computes the same where it computes itself, and
    Triton hands over the operands in the order in which ``install`` does."""
    cases = [
        (name, case, oracle(name)(*case) % (1 << 32))
        for name in FOLDED
        for case in tuples(INSTRUCTIONS[name][0], 10)
    ]
    name, case, want = cases[-1]
    wrong = [*cases[:-1], (name, case, want ^ 1)]
    asm = [every_instruction(), differences(cases), differences(wrong), "mov.b32 $0, 0;"]
    found = run_kernels([sm, MIXED, asm], tmp_path)
    every, right, other, zero = found["sass"]
    for opcode in ("PRMT", "LOP3.LUT", "POPC", "IDP.4A", "IABS"):
        assert opcode in every
    assert right == zero != other
    registers = re.search(r"// at((?: %r\d+)+)", found["ptx"])
    assert registers is not None
    r = registers[1].split()
    stores = re.findall(r"st\.global\S* \[[^]]*\], \{([^}]*)\}", found["ptx"])
    assert [re.findall(r"%r\d+", store) for store in stores] == [r[:4], r[4:5]]
    loads = re.findall(r"ld\.global\S* \{([^}]*)\}", found["ptx"])
    assert [re.findall(r"%r\d+", load) for load in loads] == [r[5:6], r[6:10]]
