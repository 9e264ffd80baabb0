"""The quantization operators and their references; their Triton kernels in the interpreter."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.linear import RMSNorm
from bitnet_kernels import reference
from bitnet_kernels.gpu import norm_quant
from bitnet_kernels.gpu import quant as gpu_quant
from bitnet_kernels.ops.quantize import (
    add_rmsnorm_quant,
    quant,
    relu2_mul_rmsnorm_quant,
    rmsnorm_quant,
)
from tests.helpers.scripts import Interpreted

K, EPS = 70, 1e-5
Op = Callable[..., tuple[Tensor, ...]]
TOKEN_OPS: dict[str, tuple[Op, Op, int]] = {
    "quant": (quant, reference.quant, 1),
    "rmsnorm_quant": (rmsnorm_quant, reference.rmsnorm_quant, 1),
    "add_rmsnorm_quant": (add_rmsnorm_quant, reference.add_rmsnorm_quant, 2),
    "relu2_mul_rmsnorm_quant": (relu2_mul_rmsnorm_quant, reference.relu2_mul_rmsnorm_quant, 2),
}
"""Operator, reference, number of inputs of x's shape."""


def rest_of(name: str) -> tuple[Any, ...]:
    """The arguments after the inputs of x's shape."""
    if name == "quant":
        return ()
    return torch.rand(K, generator=torch.Generator().manual_seed(7)), EPS


# --- the kernels, interpreted ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=[40, pytest.param(204, marks=pytest.mark.slow)])
def shapes(request: pytest.FixtureRequest) -> int:
    """How many shapes the interpreter runs."""
    return request.param


@pytest.fixture(scope="module")
def findings(shapes: int, interpreted: Interpreted) -> list[dict[str, Any]]:
    return interpreted("interpreted_quant.py", str(shapes))


@pytest.mark.parametrize(
    ("check", "at_least"),
    [
        ("quant", 1.0),
        ("rmsnorm_quant", 1.0),
        ("add_rmsnorm_quant", 1.0),
        ("relu2_mul_rmsnorm_quant", 1.0),
        ("grid", 2),
        ("conversions", 12),
        ("CUDA implementations", 28),
    ],
)
def test_interpreted_kernels(
    findings: list[dict[str, Any]], shapes: int, check: str, at_least: float
) -> None:
    """``at_least`` counts cases; as a float it is a share of the shapes."""
    if isinstance(at_least, float):
        at_least *= shapes
    cases = [finding for finding in findings if finding["check"] == check]
    assert len({case["case"] for case in cases}) >= at_least
    assert [case["case"] for case in cases if not case["ok"]] == []


class RecordingKernel:
    """Stands in for a jitted kernel and keeps the options it was launched with."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append({"grid": grid} | options)


def test_launches_forbid_fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = RecordingKernel()
    monkeypatch.setattr(gpu_quant, "quant_kernel", kernel)
    monkeypatch.setattr(norm_quant, "norm_quant_kernel", kernel)
    x = torch.zeros(3, 4096)
    gpu_quant.quant(x)
    norm_quant.launch(x, None, x[0], EPS, "x")
    assert len(kernel.launches) == 2
    assert all(launch["enable_fp_fusion"] is False for launch in kernel.launches)
    gpu_quant.quant(x[:0])
    norm_quant.launch(x[:0], None, x[0], EPS, "x")
    assert len(kernel.launches) == 2  # nothing to launch for no tokens


# --- the references -------------------------------------------------------------------------------


def test_exact_sum_has_no_order() -> None:
    """2^53 and ones: fp64 drops the ones or not, as they come. Every order of exact_sum agrees."""
    terms = torch.tensor([2.0**53, 1.0, 1.0, 1.0, 3.0, 2.0**-40])
    plain, exact = set(), set()
    for order in itertools.permutations(range(6)):
        values = [terms[i].item() for i in order]
        plain.add(sum(values[1:], values[0]))
        exact.add(reference.exact_sum(terms[list(order)]).item())
    assert len(plain) > 1
    assert exact == {2.0**53}  # the grid is 2^(3 - 52 + 54): ones are far below a multiple of it


@pytest.mark.parametrize("k", [1, 2, 3, 63, 64, 65, 1000, 4096, 5000])
def test_exact_sum_is_accurate(k: int) -> None:
    terms = torch.rand(5, k, dtype=torch.float64) ** 8
    terms[1] = 0.0
    terms[2, 0] = 1e30
    terms[3] = 2.0**-1000
    bits = math.ceil(math.log2(k))
    for row, total in zip(terms, reference.exact_sum(terms), strict=True):
        want = math.fsum(row.tolist())
        assert abs(total.item() - want) <= want * 2.0 ** (2 * bits - 52)
    one = terms[:, :1].float()
    assert torch.equal(reference.exact_sum(one), one[:, 0].double())


def test_exact_sum_of_what_is_not_finite() -> None:
    terms = torch.tensor([[1.0, math.inf], [math.nan, 1.0], [math.inf, math.nan]])
    assert reference.exact_sum(terms).isnan().all()
    assert reference.exact_sum(terms[:0]).shape == (0,)


def test_rmsnorm_by_hand() -> None:
    y = reference.rmsnorm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    rstd = np.float32(1) / np.sqrt(np.float32(12.5))  # (9 + 16) / 2
    assert y.tolist() == [np.float32(3) * rstd, np.float32(4) * rstd * np.float32(2)]
    # eps is not below an ulp of the mean square 0.25, and is added as fp32.
    y = reference.rmsnorm(torch.full((4,), 0.5), torch.ones(4), 0.1)
    rstd = np.float32(1) / np.sqrt(np.float32(0.25) + np.float32(0.1))
    assert y.tolist() == [np.float32(0.5) * rstd] * 4


def test_rmsnorm_root_is_correctly_rounded() -> None:
    """torch's own fp32 root is not, on a CPU with MKL."""
    x = torch.rand(2000, 1) * 100
    got = reference.rmsnorm(x, torch.ones(1), 0.0)[:, 0]
    square = (x.numpy().astype(np.float64) ** 2).astype(np.float32)
    want = x.numpy() * (np.float32(1) / np.sqrt(square))
    assert np.array_equal(got.numpy(), want[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_the_models(dtype: torch.dtype) -> None:
    """The model's own modules, whose fp32 sums have an order, differ by an ulp here and there."""
    norm = RMSNorm(500, EPS)
    nn.init.uniform_(norm.weight)
    gate, up = (3 * torch.randn(2, 7, 500)).to(dtype), torch.randn(2, 7, 500).to(dtype)
    weight = norm.weight.detach()
    with torch.no_grad():
        for x, got in (
            (gate, rmsnorm_quant(gate, weight, EPS)),
            (gate + up, add_rmsnorm_quant(gate, up, weight, EPS)[:3]),
            (F.relu(gate).square() * up, relu2_mul_rmsnorm_quant(gate, up, weight, EPS)),
        ):
            codes, scale, _ = quant(norm(x))
            assert (codes != got[0]).float().mean() < 1e-3
            assert (codes.int() - got[0].int()).abs().max() <= 1
            torch.testing.assert_close(scale, got[1], rtol=4 * torch.finfo(dtype).eps, atol=0)
    h = add_rmsnorm_quant(gate, up, weight, EPS)[3]
    assert h.dtype == dtype
    assert torch.equal(h, gate + up)


# --- the operators --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKEN_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_leading_dimensions_layouts_and_dtypes(name: str, dtype: torch.dtype) -> None:
    op, expected, n_inputs = TOKEN_OPS[name]
    flat = [torch.randn(6, K).to(dtype) for _ in range(n_inputs)]
    want = expected(*flat, *rest_of(name))
    for lead in ((6,), (2, 3), (6, 1), (1, 2, 3)):
        inputs = [t.view(*lead, K) for t in flat]
        strided = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
        transposed = [t.mT.contiguous().mT for t in inputs]
        for tensors in (inputs, strided, transposed):
            for got, tensor in zip(op(*tensors, *rest_of(name)), want, strict=True):
                assert got.is_contiguous()
                assert got.dtype == tensor.dtype
                assert torch.equal(got, tensor.view(*lead, *tensor.shape[1:]))
    for got, tensor in zip(op(*(t[4] for t in flat), *rest_of(name)), want, strict=True):
        assert torch.equal(got, tensor[4])
    for got, tensor in zip(op(*(t[:0] for t in flat), *rest_of(name)), want, strict=True):
        assert got.shape == tensor[:0].shape


def test_a_bad_token_touches_no_other() -> None:
    x = torch.randn(4, K)
    good = rmsnorm_quant(x, torch.ones(K), EPS)
    x[1, 3], x[2, 5] = math.nan, math.inf
    codes, scale, row_sum = rmsnorm_quant(x, torch.ones(K), EPS)
    assert scale.isnan().tolist() == [False, True, True, False]
    assert not codes[1:3].any()
    assert not row_sum[1:3].any()
    for got, want in zip((codes, scale, row_sum), good, strict=True):
        assert torch.equal(got[::3], want[::3])


X, W = torch.ones(3, K), torch.ones(K)
WRONG: list[tuple[Op, tuple[Any, ...], type[Exception], str]] = [
    (quant, (X.int(),), TypeError, "^x: expected float32"),
    (quant, (torch.tensor(1.0),), ValueError, "^x: expected shape"),
    (quant, (torch.ones(3, 0),), ValueError, "^x: expected shape"),
    (rmsnorm_quant, (X.int(), W, EPS), TypeError, "^x: expected float32"),
    (rmsnorm_quant, (X[:, :0], W, EPS), ValueError, "^x: expected shape"),
    (rmsnorm_quant, (X, W.int(), EPS), TypeError, "^weight: expected a float dtype"),
    (rmsnorm_quant, (X, W[1:], EPS), ValueError, r"^weight: expected shape \[70\], got \[69\]"),
    (rmsnorm_quant, (X, W.view(1, K), EPS), ValueError, r"^weight: expected shape \[70\]"),
    (rmsnorm_quant, (X, W.to("meta"), EPS), ValueError, "^weight: is on meta"),
    (rmsnorm_quant, (X, W, -1e-6), ValueError, "^eps: expected a number >= 0"),
    (rmsnorm_quant, (X, W, math.nan), ValueError, "^eps: expected a number >= 0"),
    (rmsnorm_quant, (X, W, math.inf), ValueError, "^eps: expected a number >= 0"),
    (add_rmsnorm_quant, (X, X.bfloat16(), W, EPS), TypeError, "^residual: expected torch.float32"),
    (add_rmsnorm_quant, (X, X[:1], W, EPS), ValueError, r"^residual: expected shape \[3, 70\]"),
    (add_rmsnorm_quant, (X, X.to("meta"), W, EPS), ValueError, "^residual: is on meta"),
    (add_rmsnorm_quant, (X, X, W[:1], EPS), ValueError, "^weight: expected shape"),
    (relu2_mul_rmsnorm_quant, (X.int(), X, W, EPS), TypeError, "^gate: expected float32"),
    (relu2_mul_rmsnorm_quant, (X, X.half(), W, EPS), TypeError, "^up: expected torch.float32"),
    (relu2_mul_rmsnorm_quant, (X, X[0], W, EPS), ValueError, r"^up: expected shape \[3, 70\]"),
    (relu2_mul_rmsnorm_quant, (X, X.to("meta"), W, EPS), ValueError, "^up: is on meta"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), WRONG)
def test_wrong_arguments(
    op: Op, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(*arguments)


def test_backward_says_that_there_is_none() -> None:
    x = torch.randn(3, K, requires_grad=True)
    for output in (
        quant(x)[1],
        rmsnorm_quant(x, W, EPS)[1],
        add_rmsnorm_quant(x, X, W, EPS)[3],
        relu2_mul_rmsnorm_quant(x, X, W, EPS)[1],
    ):
        with pytest.raises(RuntimeError, match="have no backward: packed weights are for"):
            output.sum().backward()


@pytest.mark.parametrize("name", TOKEN_OPS)
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.bitnet, name)
    x = torch.randn(6, K)
    for x_any in (x, x.view(2, 3, K), x[0], x[:0], x.t().contiguous().t(), x.bfloat16()):
        inputs = [x_any + i for i in range(TOKEN_OPS[name][2])]
        torch.library.opcheck(op, (*inputs, *rest_of(name)))


def test_compiles_without_graph_break() -> None:
    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        codes, s_x, _, h = add_rmsnorm_quant(x.sin(), residual, W, EPS)
        middle = relu2_mul_rmsnorm_quant(h, x, W, EPS)
        y = codes.float() * s_x[:, None]
        return y, h, *middle, *rmsnorm_quant(h, W, EPS), *quant(y)

    # aot_eager: traces and functionalizes as the default backend does, and needs no C++ compiler.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for m in (3, 7, 4):
        x, residual = torch.randn(m, K), torch.randn(m, K)
        pairs = zip(compiled(x, residual), block(x, residual), strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)
