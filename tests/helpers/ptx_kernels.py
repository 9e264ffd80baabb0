"""Triton kernels with inline assembly, for ``test_ptx_emulator.py``, which starts this script in a
separate process because TRITON_INTERPRET is read when Triton is imported. With it the kernels run
through the emulator, without it they are compiled, which needs no GPU. Reads assembly as JSON from
stdin and prints what it found as JSON.
"""

import json
import sys
from typing import Any

import ptx_emulator
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def two_outputs(
    x: tl.tensor,
    y: tl.tensor,
    sums: tl.tensor,
    differences: tl.tensor,
    scalar: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    a, b = tl.inline_asm_elementwise(
        "add.s32 $0, $2, $3; sub.s32 $1, $2, $4;",
        "=&r,=&r,r,r,r",
        [tl.load(x + i), tl.load(y + j), scalar],
        (tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    tl.store(sums + i * COLS + j, a)
    tl.store(differences + i * COLS + j, b)


@triton.jit
def words_and_bytes(
    x: tl.tensor,
    y: tl.tensor,
    words: tl.tensor,
    octets: tl.tensor,
    SIZE: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    i = tl.arange(0, SIZE)
    a, b = tl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [tl.load(x + i), tl.load(y + i)],
        (tl.int32, tl.uint8),
        is_pure=True,
        pack=4,
    )
    tl.store(words + i, a)
    tl.store(octets + i, b)


@triton.jit
def one_input(
    x: tl.tensor,
    y: tl.tensor,
    SIZE: tl.constexpr,
    PACK: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
) -> None:
    i = tl.arange(0, SIZE)
    values = tl.load(x + i)
    result = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [values], tl.int32, True, PACK)
    tl.store(y + i, result)


def interpreted(asm: list[str]) -> dict[str, Any]:
    """Runs the kernels: words_and_bytes with the first assembly, one_input with the others, which
    raise."""
    ptx_emulator.install()
    found: dict[str, Any] = {}
    x, y = torch.tensor([5, -6], dtype=torch.int32), torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    both = torch.zeros(2, 2, 4, dtype=torch.int32)
    two_outputs[(1,)](x, y, both[0], both[1], 100, 2, 4)
    found["two outputs"] = both.tolist()
    for size in (1, 2, 16):
        a = torch.arange(200, 200 + size).to(torch.uint8)
        b = torch.arange(size, dtype=torch.int32) * 1000 - 3000
        words, octets = torch.zeros_like(b), torch.zeros_like(a)
        words_and_bytes[(1,)](a, b, words, octets, size, asm[0])
        found[f"words and bytes {size}"] = [words.tolist(), octets.tolist()]
    squares, y = torch.arange(8, dtype=torch.int32) ** 2, torch.zeros(8, dtype=torch.int32)
    swap = "sub.s32 $0, $2, $3; sub.s32 $1, $3, $2;"
    one_input[(1,)](squares, y, 8, 2, swap, "=&r,=&r,r,r")
    found["pairs"] = y.tolist()
    octets = torch.tensor([1, 255], dtype=torch.uint8)
    one_input[(1,)](octets, y, 2, 1, "mov.b32 $0, $1;", "=r,r")
    found["one byte"] = [word % 2**32 for word in y[:2].tolist()]
    for text, values in [*((text, x) for text in asm[1:]), ("mov.b32 $0, $1;", torch.ones(2))]:
        try:
            one_input[(1,)](values, y, 2, 1, text, "=r,=r,r" if "$2" in text else "=r,r")
        except Exception as error:  # the interpreter wraps what a kernel raises
            found[text] = repr(error)
    return found


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], sm: int) -> Any:
    """The PTX and SASS of a kernel whose pointers are aligned."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options).asm


def compiled_all(sm: int, mixed: str, asm: list[str]) -> dict[str, Any]:
    """PTX of words_and_bytes with the first assembly, SASS of one_input with each of the others."""
    types = {"x": "*u8", "y": "*i32", "words": "*i32", "octets": "*u8"}
    ptx = compiled(words_and_bytes, types, {"SIZE": 512, "ASM": mixed}, sm)["ptx"]
    sass = []
    for text in asm:
        constants = {"SIZE": 128, "PACK": 1, "ASM": text, "CONSTRAINTS": "=&r,r"}
        sass.append(compiled(one_input, {"x": "*i32", "y": "*i32"}, constants, sm)["sass"])
    return {"ptx": ptx, "sass": sass}


if __name__ == "__main__":
    argument = json.load(sys.stdin)
    interpreting = isinstance(two_outputs, InterpretedFunction)
    print(json.dumps(interpreted(argument) if interpreting else compiled_all(*argument)))
