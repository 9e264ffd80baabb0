"""The ternary products of the native CPU library, on every instruction set that this CPU has."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from bitnet_kernels import (
    bit_planes,
    pack_ternary,
    quant,
    quantized_linear,
    reference,
    ternary_linear,
    ternary_matmul,
)
from bitnet_kernels.cpu import native, ternary

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())
SHAPES = [60, pytest.param(1000, marks=pytest.mark.slow)]
M, N = (1, 2, 3, 4, 5, 6, 7, 8, 13, 33, 129), (1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 65, 100, 130)
K = (
    1,
    2,
    63,
    64,
    65,
    127,
    128,
    129,
    191,
    192,
    255,
    256,
    257,
    511,
    512,
    768,
    1000,
    2047,
    2560,
    4100,
)


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use during the test."""
    before = native.used()
    native.use(request.param)
    yield request.param
    native.use(before)


def products(x_q: Tensor, packed: Tensor, planes: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The product by each family and layout, into memory that holds garbage."""
    cases: list[tuple[str, bool, list[Tensor | None]]] = [
        ("dot of packed", False, [packed, None]),
        ("dot of planes", False, [None, planes]),
        ("addsub", True, [None, planes]),
    ]
    if native.families_share_layout():
        cases.append(("addsub of packed", True, [packed, None]))
    for name, addsub, packed_or_planes in cases:
        acc = torch.full((len(x_q), len(packed)), 123_456_789, dtype=torch.int32)
        ternary._call(
            "bn_ternary_matmul", addsub, *acc.shape, x_q.shape[1], [x_q], packed_or_planes, [acc]
        )
        yield name, acc


def exact(x_q: Tensor, codes: Tensor) -> Tensor:
    """In fp64, which holds every sum."""
    return (x_q.double() @ codes.double().T).int()


@pytest.mark.parametrize("shapes", SHAPES)
def test_random_shapes(isa: str, shapes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for i in range(shapes):
        torch.set_num_threads(1 + i % 3)
        m, n, k = (
            choices[int(torch.randint(len(choices), (), generator=draw))] for choices in (M, N, K)
        )
        codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=draw)
        x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=draw)
        packed = pack_ternary(codes)
        want = exact(x_q, codes)
        assert torch.equal(want, reference.ternary_matmul(x_q, packed))
        for name, acc in products(x_q, packed, bit_planes(packed)):
            assert torch.equal(acc, want), f"{name}, {m} tokens, {n} x {k}"


@pytest.mark.parametrize("k", [130, 4096, 2**17, pytest.param(2**23, marks=pytest.mark.slow)])
def test_extreme_values(isa: str, k: int) -> None:
    """No sum on the way overflows, however long the row."""
    for x, w, m in product((-128, 127), (-1, 1), (1, 2, 7)):
        codes = torch.full((3, k), w, dtype=torch.int8)
        codes[1] = 0
        codes[2, ::2] = -w
        x_q = torch.full((m, k), x, dtype=torch.int8)
        packed = pack_ternary(codes)
        want = torch.tensor([x * w * k, 0, x * w * (k // 2 - -(-k // 2))], dtype=torch.int32)
        for name, acc in products(x_q, packed, bit_planes(packed)):
            assert torch.equal(acc, want.expand(m, 3)), f"{name}, {m} tokens of {x}, weights {w}"


def test_layers_of_both_families(isa: str) -> None:
    """The rescale of each dtype of x, with and without bias, with a scale per tensor and row."""
    draw = torch.Generator().manual_seed(1)
    for m, n, k in ((1, 3, 70), (5, 77, 192), (140, 70, 300)):
        packed = pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=draw))
        planes, x = bit_planes(packed), torch.randn(m, k, generator=draw)
        scale, bias = torch.rand(n, generator=draw), torch.randn(n, generator=draw)
        x[0, 0] = float("nan")
        for kernel, some, added in product(
            ("addsub", "dot", "auto"), (scale, scale[0]), (bias, None)
        ):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                want = reference.ternary_linear(x.to(dtype), packed, some, added)
                for given in (planes, None):
                    got = ternary_linear(x.to(dtype), packed, some, added, kernel, planes=given)
                    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
            tokens = quant(x)
            got = quantized_linear(*tokens, packed, some, added, kernel, out_dtype=torch.float32)
            want = reference.ternary_linear(x, packed, some, added)
            assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def test_strided_operands(isa: str) -> None:
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(-1, 2, (9, 130), dtype=torch.int8, generator=draw)
    x_q = torch.randint(-128, 128, (5, 130), dtype=torch.int8, generator=draw)
    packed, want = pack_ternary(codes), exact(x_q, codes)
    planes = bit_planes(packed)
    apart = [t.repeat_interleave(2, -1)[..., ::2] for t in (x_q, packed, planes)]
    shifted = torch.empty(x_q.numel() + 1, dtype=torch.int8)[1:].view(5, 130).copy_(x_q)
    for kernel in ("addsub", "dot"):
        assert torch.equal(ternary_matmul(apart[0], apart[1], kernel, apart[2]), want)
        assert torch.equal(ternary_matmul(shifted, packed, kernel), want)
        assert torch.equal(ternary_matmul(x_q.t().contiguous().t(), packed, kernel), want)


def test_packing_is_that_of_packing(isa: str) -> None:
    draw = torch.Generator().manual_seed(6)
    for n, k in ((1, 1), (3, 15), (2, 16), (5, 47), (4, 48), (3, 49), (2, 63), (7, 64), (3, 1000)):
        codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=draw)
        assert torch.equal(ternary.pack(codes), pack_ternary(codes))
        assert torch.equal(ternary.pack(codes.t().contiguous().t()), pack_ternary(codes))


def test_planes_are_those_of_packing(isa: str) -> None:
    for n, k in ((1, 1), (3, 64), (70, 129), (5, 4100)):
        draw = torch.Generator().manual_seed(k)
        packed = pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=draw))
        assert torch.equal(ternary.bit_planes(packed), bit_planes(packed))


def test_auto_takes_the_faster_family() -> None:
    small, large = torch.empty(4, 16), torch.empty(2**22, 16, device="meta")
    cases = [("auto", 1, small), ("auto", 1, large), ("auto", 2, large), ("dot", 1, large)]
    takes = [ternary.takes_addsub(kernel, m, packed, small) for kernel, m, packed in cases]
    # with AVX2, addsub computes for longer than it waits for memory
    assert takes == [False, not native.families_share_layout(), False, False]
    assert not ternary.takes_addsub("auto", 1, large, None)  # it would need planes
    assert ternary.takes_addsub("addsub", 9, small, None)


MULTIPLIES = re.compile(r"^v?(p?mul|pmadd|pdp|f(n?m)(add|sub)|i?mul|tdp|gf2p8mul|dpp)")
"""x86 instructions that multiply: integers, floats, dot products, matrix tiles."""


def disassembled() -> dict[str, list[str]]:
    """The instructions of each function of the library, as objdump prints them; of all those with
    the same name together."""
    tool = shutil.which("objdump")
    assert tool is not None, "binutils come with every compiler that can build the library"
    path = native._path()
    text = subprocess.run(
        [tool, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.+)>:", line):
            lines = functions.setdefault(start[1], [])
        elif "\t" in line:
            lines.append(line.split("\t")[1].strip())
    return functions


@pytest.mark.skipif("avx2" not in native.available(), reason="not an x86 CPU")
def test_addsub_multiplies_nothing() -> None:
    """In the machine code. An address needs no multiplication either."""
    functions = disassembled()
    addsub = {
        name: lines for name, lines in functions.items() if "addsub" in name or "bits" in name
    }
    assert {"addsub_avx512", "addsub_avx2", "bn_addsub_portable"} <= set(addsub)
    for name, lines in addsub.items():
        assert len(lines) > 50, name
        found = [line for line in lines if MULTIPLIES.match(line)]
        # the address of a row is its number times the bytes of a row: general registers only
        data = [line for line in found if not re.match(r"imul\s.*%r\w+$", line)]
        assert data == [], name
        calls = [line for line in lines if line.startswith("call")]
        assert all("addsub" in line or "mem" in line for line in calls), calls
    dot = [line for name in functions if "dot" in name for line in functions[name]]
    assert any(MULTIPLIES.match(line) for line in dot)  # the pattern finds them
