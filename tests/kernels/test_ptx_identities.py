"""The kernels' identities, in PTX with the instructions of the kernels, against products.

Each works on 16 weights in a word: bits 2j and 2j + 1 of its byte i are the code of weight 4j + i.
The popcount reads bit planes instead: 32 weights in two words.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HELPERS = Path(__file__).parents[1] / "helpers"
SPEC = importlib.util.spec_from_file_location("ptx_emulator", HELPERS / "ptx_emulator.py")
assert SPEC is not None
assert SPEC.loader is not None
emulator = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emulator)
run = emulator.run

SAD = (
    "{ .reg .b32 r0, r1, t, zero; mov.b32 zero, 0;"
    + "".join(
        f"""
        shl.b32 r0, $2, {7 - 2 * j};        // b0 of plane j to the sign of each byte
        prmt.b32 r0, r0, 0, 0xBA98;
        {f"shl.b32 r1, $2, {6 - 2 * j};" if j < 3 else "mov.b32 r1, $2;"}
        prmt.b32 r1, r1, 0, 0xBA98;
        lop3.b32 t, ${3 + j}, r1, r0, 0x41; // (x ^ ~r1) & ~r0
        vabsdiff4.u32.u32.u32.add $0, t, zero, $0;"""
        for j in range(4)
    )
    + "}"
)
POPCOUNT = (
    "{ .reg .b32 t;"
    + "".join(
        f"""
        lop3.b32 t, ${2 + b}, $10, $11, 0x28; // (x ^ s) & z
        popc.b32 t, t;
        shl.b32 t, t, {b};
        {"add" if b < 7 else "sub"}.s32 $0, $0, t;"""
        for b in range(8)
    )
    + "}"
)
DP4A = (
    "{ .reg .b32 t;"
    + "".join(
        f"and.b32 t, $8, {0x03030303 << 2 * j:#x}; dp4a.u32.s32 ${j}, t, ${9 + j}, ${j};\n"
        for j in range(4)
    )
    + "}"
)


def problem(k: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """w [20, k] and x [20, k], the first rows at the limits, and their products."""
    w, x = np.random.randint(-1, 2, (20, k)), np.random.randint(-128, 128, (20, k))
    w[0], w[1], x[:2] = 1, -1, -128
    w[2], w[3], x[2:4] = -1, 0, 127
    return w, x, (w * x).sum(1)


def quarter_words(w: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The words of codes, each [20]."""
    codes = (w + 1).reshape(len(w), -1, 4, 4).astype(np.uint8)
    packed = np.sum([codes[:, :, j] << 2 * j for j in range(4)], axis=0).astype(np.uint8)
    return list(np.ascontiguousarray(packed).view(np.uint32)[..., 0].T)


def byte_words(x: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Four bytes a word, each [20]."""
    return list(np.ascontiguousarray(x.astype(np.uint8)).view(np.uint32).T)


def test_sad_identity() -> None:
    w, x, want = problem(16 * 5)
    total = np.zeros(len(w), np.uint32)
    activations = byte_words(x + 128)
    for i, codes in enumerate(quarter_words(w)):
        (total,) = run(SAD, "=&r,0,r,r,r,r,r", [total, codes, *activations[4 * i : 4 * i + 4]])
    constant = 128 * w.sum(1) + 255 * (w == -1).sum(1)
    assert (total.view(np.int32) - constant == want).all()


def test_popcount_identity() -> None:
    w, x, want = problem(32 * 5)

    def bits(values: NDArray[Any]) -> list[NDArray[Any]]:
        return list(np.packbits(values, axis=1, bitorder="little").view(np.uint32).T)

    planes = [bits(x.astype(np.uint8) >> b & 1) for b in range(8)]
    total = np.zeros(len(w), np.uint32)
    for i, (s, z) in enumerate(zip(bits(w == -1), bits(w != 0), strict=True)):
        inputs = [total, *(plane[i] for plane in planes), s, z]
        (total,) = run(POPCOUNT, ",".join(["=&r,0", *["r"] * 10]), inputs)
    assert (total.view(np.int32) + (w == -1).sum(1) == want).all()


def test_dp4a_identity() -> None:
    w, x, want = problem(16 * 5)
    sums = [np.zeros(len(w), np.uint32)] * 4
    activations = byte_words(x)
    for i, codes in enumerate(quarter_words(w)):
        inputs = [*sums, codes, *activations[4 * i : 4 * i + 4]]
        sums = run(DP4A, "=&r,=&r,=&r,=&r,0,1,2,3,r,r,r,r,r", inputs)
    total = sum(part.view(np.int32) >> 2 * j for j, part in enumerate(sums))
    assert (total - x.sum(1) == want).all()
