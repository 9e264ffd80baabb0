"""The matmul operators, and the Triton kernels behind them in Triton's interpreter."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_kernels import (
    bit_planes,
    pack_ternary,
    quant,
    quantized_linear,
    reference,
    rmsnorm_quant,
    ternary_linear,
    ternary_matmul,
)
from bitnet_kernels.dispatch import FORMULATIONS, TileConfig
from bitnet_kernels.gpu import common
from tests.helpers.scripts import Interpreted, run_script

N, K = 5, 70


def operands(m: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x fp32 [m, K], codes int8 [N, K], a scale per row and a bias."""
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(-1, 2, (N, K), generator=generator, dtype=torch.int8)
    x = torch.randn(m, K, generator=generator)
    return x, codes, torch.rand(N, generator=generator), torch.randn(N, generator=generator)


SCRIPT = "interpreted_kernels.py"
SHAPES = [12, pytest.param(208, marks=pytest.mark.slow)]
"""How many shapes the interpreter runs; it needs 10 ms per token and kernel."""


@pytest.fixture(scope="module", params=SHAPES)
def shapes(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def findings(shapes: int, interpreted: Interpreted) -> list[dict[str, Any]]:
    """Of two processes at a time."""
    halves = ("sad", "dp4a"), ("popcount", "gemm", "unpacked", "reference")
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda half: interpreted(SCRIPT, str(shapes), *half), halves)
        return list(chain.from_iterable(found))


@pytest.mark.parametrize("kernel", [*FORMULATIONS, "reference"])
def test_interpreted_kernels(findings: list[dict[str, Any]], shapes: int, kernel: str) -> None:
    """Every inline-assembly branch, executed PTX instruction by instruction."""
    for kind, at_least in (("accumulators", shapes // 3), ("outputs", shapes)):
        cases = [one for one in findings if one["check"] == f"{kernel} {kind}"]
        assembly = {one["case"] for one in cases if one["case"].startswith("assembly")}
        plain = {one["case"] for one in cases if one["case"].startswith("plain")}
        assert len(assembly) >= at_least
        assert len(plain) >= min(at_least, {12: 8, 208: 12}[shapes])
        assert [one["case"] for one in cases if not one["ok"]] == []


@pytest.mark.parametrize(
    ("check", "at_least"),
    [
        ("training accumulators", 1.0),
        ("packed layer, reference", 1.0),
        ("packed layer, addsub", 0.1),
        ("packed layer, dot", 0.1),
        ("configurations", 12),
        ("activation planes", 4),
        ("ops", 70),
        ("CUDA implementations", 11),
    ],
)
def test_interpreted_operators(
    findings: list[dict[str, Any]], shapes: int, check: str, at_least: float
) -> None:
    """``at_least`` counts cases; as a float it is a share of the shapes."""
    if isinstance(at_least, float):
        at_least *= shapes
    cases = [one for one in findings if one["check"] == check]
    assert len({one["case"] for one in cases}) >= at_least
    assert [one["case"] for one in cases if not one["ok"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [208], indirect=True)
def test_interpreted_long_rows(findings: list[dict[str, Any]]) -> None:
    """Accumulators that fp32 could not hold, and more configurations."""
    for check, at_least in (("long rows", 7), ("configurations", 40)):
        cases = [one for one in findings if one["check"] == check]
        assert len({one["case"] for one in cases}) >= at_least
        assert [one["case"] for one in cases if not one["ok"]] == []


class RecordingKernel:
    """Stands in for a jitted kernel and keeps the options it was launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> "RecordingKernel":
        self.grid = grid
        return self

    def __call__(self, *args: object, **options: object) -> None:
        self.args, self.options = args, options


def test_launch_forbids_fused_multiply_add() -> None:
    kernel = RecordingKernel()
    x_q, w = torch.zeros(9, 128, dtype=torch.int8), torch.zeros(33, 32, dtype=torch.uint8)
    config = TileConfig(8, 16, 64, split_k=2, num_warps=2, num_stages=3)
    y = common.launch(kernel, config, x_q, w, (9, 33, 32), None, None, PLANES=4)
    assert y.shape == (9, 33)
    assert kernel.grid == (2 * 3 * 2,)
    assert kernel.options["enable_fp_fusion"] is False
    assert (kernel.options["num_warps"], kernel.options["num_stages"]) == (2, 3)
    partial, arrived = kernel.args[7:9]
    assert isinstance(partial, Tensor)
    assert isinstance(arrived, Tensor)
    assert (partial.numel(), arrived.numel()) == (9 * 33, 6)
    assert not partial.any()
    assert not arrived.any()


def test_auto_and_reference_on_cpu() -> None:
    x, codes, scale, bias = operands()
    packed = pack_ternary(codes)
    want = reference.ternary_linear(x, packed, scale, bias)
    for kernel in ("auto", "reference"):
        assert torch.equal(ternary_linear(x, packed, scale, bias, kernel), want)
        x_q = quant(x)[0]
        product = (x_q.long() @ codes.long().t()).int()
        assert torch.equal(ternary_matmul(x_q, packed, kernel), product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_leading_dimensions_and_dtypes(dtype: torch.dtype) -> None:
    x, codes, scale, bias = operands(6)
    packed = pack_ternary(codes)
    x = x.to(dtype)
    want = reference.ternary_linear(x, packed, scale, bias)
    assert want.dtype == dtype
    for lead in ((2, 3), (6, 1), (1, 2, 3)):
        got = ternary_linear(x.view(*lead, K), packed, scale, bias)
        assert torch.equal(got, want.view(*lead, N))
        tensors = quant(x.view(*lead, K))
        for got, flat in zip(tensors, reference.quant(x), strict=True):
            assert torch.equal(got.flatten(), flat.flatten())
    assert torch.equal(ternary_linear(x[4], packed, scale, bias), want[4])
    assert quant(x[4])[1].shape == ()


def test_non_contiguous_inputs() -> None:
    x, codes, scale, bias = operands()
    packed = pack_ternary(codes)
    want = ternary_linear(x, packed, scale, bias)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, packed, scale, bias)]
    assert not any(t.is_contiguous() for t in strided)
    got = ternary_linear(strided[0], strided[1], strided[2], strided[3])
    assert torch.equal(got, want)
    x_q = quant(strided[0])[0]
    assert x_q.is_contiguous()
    got = ternary_matmul(x_q.t().contiguous().t(), strided[1])
    assert torch.equal(got, ternary_matmul(x_q, packed))


def test_empty_batches_give_empty_outputs() -> None:
    x, codes, scale, bias = operands()
    packed = pack_ternary(codes)
    assert ternary_linear(x[:0], packed, scale, bias).shape == (0, N)
    assert ternary_linear(x.view(3, 1, K)[:, :0], packed, scale).shape == (3, 0, N)
    assert ternary_linear(x, packed[:0], scale[:0]).shape == (3, 0)
    assert [t.shape for t in quant(x[:0])] == [(0, K), (0,), (0,)]
    assert ternary_matmul(quant(x[:0])[0], packed).shape == (0, N)


def test_group_scales_against_numpy() -> None:
    x, codes, _, bias = operands()
    packed = pack_ternary(codes)
    groups = torch.rand(N, 3, generator=torch.Generator().manual_seed(1))
    x_q, s_x, _ = quant(x)
    want = np.zeros((3, N), dtype=np.float32)
    for g in range(3):
        columns = slice(32 * g, 32 * (g + 1))
        acc = x_q[:, columns].numpy().astype(np.int64) @ codes[:, columns].numpy().T
        want += acc.astype(np.float32) * s_x.numpy()[:, None] * groups[:, g].numpy()
    want += bias.numpy()
    for kernel in ("auto", "reference"):
        got = ternary_linear(x, packed, groups, bias, kernel, group_size=32)
        assert np.array_equal(got.numpy(), want)
    for kernel in ("addsub", "dot", "gemm"):
        with pytest.raises(ValueError, match=f"kernel: '{kernel}' has no group-wise scales"):
            ternary_linear(x, packed, groups, bias, kernel, group_size=32)


TRITON_ON_CPU = """
import sys
import torch
import bitnet_kernels
assert "triton" not in sys.modules, "importing bitnet_kernels imported triton"
packed = bitnet_kernels.pack_ternary(torch.ones(5, 70, dtype=torch.int8))
def message(kernel):
    try:
        bitnet_kernels.ternary_linear(torch.randn(3, 70), packed, torch.tensor(0.5), kernel=kernel)
    except ValueError as error:
        return str(error)
"""
NOT_INTERPRETED = """
from bitnet_kernels.cpu import native
names = ["sad", "dp4a", "gemm", "unpacked"]
if native.library() is None:
    names += ["addsub", "dot"]
for kernel in names:
    assert message(kernel) == (
        f"kernel: {kernel!r} runs on CUDA tensors; for cpu tensors use 'auto', or set "
        "TRITON_INTERPRET=1 before Triton is imported"
    )
"""
NOT_INSTALLED = """
from bitnet_kernels import available, reference
from bitnet_kernels.cpu import native
sys.modules["triton"] = None
native.library = lambda: None
for kernel in ("addsub", "dot"):
    assert message(kernel) == f"kernel: {kernel!r} needs Triton, which is not installed; use 'auto'"
x, scale = torch.randn(3, 70), torch.tensor(0.5)
assert not available.triton_installed()
assert not available.triton_by_default(torch.device("cuda"))
x_q, s_x, _ = bitnet_kernels.quant(x)
assert torch.equal(x_q, reference.quant(x)[0])
want = reference.ternary_matmul(x_q, packed)
assert torch.equal(bitnet_kernels.ternary_matmul(x_q, packed), want)
want = reference.ternary_linear(x, packed, scale, None)
assert torch.equal(bitnet_kernels.ternary_linear(x, packed, scale), want)
"""


@pytest.mark.parametrize("script", [NOT_INTERPRETED, NOT_INSTALLED])
def test_triton_kernels_that_cannot_run_here(script: str) -> None:
    run_script(TRITON_ON_CPU + script)


WRONG_LINEAR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.ones(3, K, dtype=torch.int8)}, TypeError, "x: expected float32"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape"),
    ({"x": torch.ones(3, 0)}, ValueError, "x: expected shape"),
    ({"x": torch.ones(3, 128 + 1)}, ValueError, "packed: expected shape"),
    ({"packed": torch.ones(N, 32, dtype=torch.int8)}, TypeError, "packed: expected uint8"),
    ({"packed": torch.ones(N, 16, dtype=torch.uint8)}, ValueError, "packed: expected shape"),
    ({"packed": torch.ones(32, dtype=torch.uint8)}, ValueError, "packed: expected shape"),
    ({"packed": torch.ones(N, 32, dtype=torch.uint8, device="meta")}, ValueError, "packed: is on"),
    ({"scale": torch.ones(N).double()}, TypeError, "scale: expected float32"),
    ({"scale": torch.ones(N + 1)}, ValueError, "scale: expected shape"),
    ({"scale": torch.ones(1)}, ValueError, "scale: expected shape"),
    ({"scale": torch.ones(N, 2)}, ValueError, r"scale: expected shape \[5, 1\]"),
    ({"scale": torch.ones(N, 1, 1)}, ValueError, "scale: expected shape"),
    ({"scale": torch.ones(N, 1), "group_size": 0}, ValueError, "group_size: expected at least 1"),
    ({"group_size": 0}, ValueError, "group_size: expected at least 1"),
    ({"group_size": 2**63}, ValueError, "group_size: expected at least 1"),
    ({"group_size": 1.5}, TypeError, "group_size: expected an integer"),
    ({"group_size": None}, TypeError, "group_size: expected an integer"),
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"x": torch.ones(3, K).to_sparse()}, TypeError, "x: expected a strided tensor"),
    ({"x": torch.empty(1, 2**24, device="meta")}, ValueError, "x: K = 16777216 may overflow"),
    ({"packed": None}, TypeError, "packed: expected a tensor, got NoneType"),
    ({"scale": 0.1}, TypeError, "scale: expected a tensor, got float"),
    ({"bias": np.ones(N)}, TypeError, "bias: expected a tensor, got ndarray"),
    ({"planes": "x"}, TypeError, "planes: expected a tensor, got str"),
    ({"kernel": np.ones(2)}, TypeError, "kernel: expected a string, got ndarray"),
    ({"out_dtype": np.ones(2)}, TypeError, "out_dtype: expected a float dtype"),
    ({"out_dtype": "bf16"}, TypeError, "out_dtype: expected a float dtype"),
    ({"scale": torch.ones((), device="meta")}, ValueError, "scale: is on meta"),
    ({"bias": torch.ones(N, dtype=torch.int32)}, TypeError, "bias: expected a float dtype"),
    ({"bias": torch.ones(N + 1)}, ValueError, "bias: expected shape"),
    ({"bias": torch.ones(N, 1)}, ValueError, "bias: expected shape"),
    ({"bias": torch.ones(N, device="meta")}, ValueError, "bias: is on meta"),
    ({"kernel": "fast"}, ValueError, "kernel: 'fast' is none of auto, addsub, dot, sad,"),
    ({"kernel": "popcount"}, ValueError, "planes: kernel 'popcount' needs them"),
    ({"planes": torch.ones(N, 2, 4)}, TypeError, "planes: expected int32"),
    ({"planes": torch.ones(N, 2, 3).int()}, ValueError, r"planes: expected shape \[5, 2, 4\]"),
    ({"planes": torch.ones(N, 8).int()}, ValueError, r"planes: expected shape \[5, 2, 4\]"),
    ({"planes": torch.ones(N, 2, 4, device="meta").int()}, ValueError, "planes: is on meta"),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype: expected a float dtype"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_LINEAR)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    x, codes, scale, bias = operands()
    right = {"x": x, "packed": pack_ternary(codes), "scale": scale, "bias": bias}
    with pytest.raises(error, match=message):
        ternary_linear(**(right | wrong))


def test_wrong_arguments_of_the_other_ops() -> None:
    x, codes, _, _ = operands()
    packed = pack_ternary(codes)
    with pytest.raises(TypeError, match="x: expected float32"):
        quant(torch.ones(3, K, dtype=torch.int32))
    with pytest.raises(ValueError, match="x: expected shape"):
        quant(torch.ones(3, 0))
    with pytest.raises(TypeError, match="x_q: expected int8"):
        ternary_matmul(x, packed)
    with pytest.raises(ValueError, match="x_q: expected shape"):
        ternary_matmul(quant(x)[0][0], packed)
    with pytest.raises(ValueError, match="kernel: 'fast' is none of"):
        ternary_matmul(quant(x)[0], packed, "fast")
    with pytest.raises(ValueError, match="packed: is on meta"):
        ternary_matmul(quant(x)[0], packed.to("meta"))


WRONG_QUANTIZED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x_q": torch.ones(3, K)}, TypeError, "x_q: expected int8"),
    ({"x_q": None}, TypeError, "x_q: expected a tensor"),
    ({"x_q": torch.ones(3, 0, dtype=torch.int8)}, ValueError, "x_q: expected shape"),
    ({"s_x": torch.ones(3, 1)}, ValueError, r"s_x: expected shape \[3\]"),
    ({"s_x": torch.ones(3).double()}, TypeError, "s_x: expected float32"),
    ({"row_sum": torch.ones(3)}, TypeError, "row_sum: expected int32"),
    ({"row_sum": torch.ones(2).int()}, ValueError, r"row_sum: expected shape \[3\]"),
    ({"scale": torch.ones(N, 1)}, ValueError, r"scale: expected shape \[\] or \[5\], got"),
    ({"bias": torch.ones(N + 1)}, ValueError, "bias: expected shape"),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype: expected a float dtype"),
    ({"row_sum": torch.ones(3, device="meta").int()}, ValueError, "row_sum: is on meta"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_QUANTIZED)
def test_wrong_arguments_of_quantized_linear(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, codes, scale, bias = operands()
    x_q, s_x, row_sum = quant(x)
    right = {"x_q": x_q, "s_x": s_x, "row_sum": row_sum, "packed": pack_ternary(codes)}
    right |= {"scale": scale, "bias": bias}
    with pytest.raises(error, match=message):
        quantized_linear(**(right | wrong))


def test_quantized_before_is_the_same() -> None:
    """Three layers on tokens that are quantized once, or each by itself."""
    x, codes, scale, bias = operands(6)
    x = x.view(2, 3, K)
    packed = pack_ternary(codes)
    tokens = quant(x)
    for given in (scale, scale[0]):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = quantized_linear(*tokens, packed, given, bias, out_dtype=dtype)
            want = ternary_linear(x, packed, given, bias, out_dtype=dtype)
            assert torch.equal(got, want)
    assert quantized_linear(*tokens, packed, scale).dtype == torch.bfloat16
    assert quantized_linear(*quant(x[:, :0]), packed, scale).shape == (2, 0, N)
    args = (*tokens, packed, scale, bias, "auto", None, torch.float16)
    torch.library.opcheck(torch.ops.bitnet.quantized_linear, args)
    norm = torch.rand(K, generator=torch.Generator().manual_seed(0))
    codes_q, s_x, row_sum = rmsnorm_quant(x, norm, 1e-5)
    got = quantized_linear(codes_q, s_x, row_sum, packed, scale, None, out_dtype=torch.float32)
    want = ternary_linear(reference.rmsnorm(x.view(-1, K), norm, 1e-5), packed, scale)
    assert torch.equal(got.view(-1, N), want)


def test_backward_says_that_there_is_none() -> None:
    x, codes, scale, _ = operands()
    x.requires_grad_()
    for y in (ternary_linear(x, pack_ternary(codes), scale), quant(x)[1]):
        with pytest.raises(RuntimeError, match="have no backward: packed weights are for"):
            y.sum().backward()


def test_opcheck() -> None:
    x, codes, scale, bias = operands(6)
    packed = pack_ternary(codes)
    library = torch.ops.bitnet
    for x_any in (x, x.view(2, 3, K), x[0], x[:0], x.t().contiguous().t(), x.bfloat16()):
        torch.library.opcheck(library.quant, (x_any,))
        linear_args = (x_any, packed, scale, bias, "auto", 128, None, x_any.dtype)
        torch.library.opcheck(library.ternary_linear, linear_args)
    planes = bit_planes(packed)
    linear_args = (x, packed, scale[0], None, "auto", 128, planes, torch.float16)
    torch.library.opcheck(library.ternary_linear, linear_args)
    torch.library.opcheck(library.ternary_matmul, (quant(x)[0], packed, "auto", planes))
    torch.library.opcheck(library.ternary_matmul, (quant(x)[0], packed, "auto", None))


def test_compiles_without_graph_break() -> None:
    _, codes, scale, bias = operands()
    packed = pack_ternary(codes)

    def block(x: Tensor) -> Tensor:
        codes, s_x, _ = quant(x)
        return ternary_linear(x.relu(), packed, scale, bias) + codes.sum() * s_x.sum()

    # aot_eager: traces and functionalizes as the default backend does, and needs no C++ compiler.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for m in (3, 7, 4):
        x = operands(m)[0]
        assert torch.equal(compiled(x), block(x))
