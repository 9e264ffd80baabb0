"""The operators of training, ``int8_linear`` and ``int8_matmul``: on a CPU against numpy, their
Triton kernel in the interpreter, and its machine code for GPUs that are not present."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_kernels import int8_linear, int8_matmul, pack_ternary, quantized_linear, reference
from tests.helpers.scripts import CompiledBy, Interpreted, run_script

SHAPES = [(1, 1, 1), (5, 3, 1), (3, 5, 2), (1, 7, 63), (17, 1, 64), (16, 9, 65), (33, 40, 300)]


def any_int8(rows: int, columns: int) -> Tensor:
    """All values; the first row the least, the second one 127, whose products are the largest."""
    generator = torch.Generator().manual_seed(rows + 1000 * columns)
    values = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    values[:1] = -128
    values[1:2] = 127
    return values


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_q, s_x, codes, scale of every row, bias."""
    generator = torch.Generator().manual_seed(m + 1000 * n + 10**6 * k)
    codes = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    s_x, scale = torch.rand(m, generator=generator), torch.rand(n, generator=generator)
    return any_int8(m, k), s_x, codes, scale, torch.randn(n, generator=generator)


def int64_product(a: Tensor, b: Tensor) -> Tensor:
    product = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    return torch.from_numpy(product.astype(np.int32))


def rescaled(
    acc: Tensor, s_x: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = acc.numpy().astype(np.float32) * s_x.numpy()[:, None] * scale.numpy()
    return torch.from_numpy(y if bias is None else y + bias.float().numpy()).to(dtype)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_linear_against_numpy(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Equal, not close: the sums are exact, and fp32 is rounded in one order."""
    x_q, s_x, codes, scale, bias = operands(m, n, k)
    acc = int64_product(x_q, codes)
    for given in (scale, scale[0]):
        for one in (None, bias, bias.to(torch.bfloat16)):
            got = int8_linear(x_q, s_x, codes, given, one, dtype)
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert torch.equal(got, rescaled(acc, s_x, given, one, dtype))


def test_linear_equals_packed_inference() -> None:
    x_q, s_x, codes, scale, bias = operands(6, 5, 70)
    sums = x_q.sum(-1, dtype=torch.int32)
    packed = quantized_linear(x_q, s_x, sums, pack_ternary(codes), scale, bias)
    assert torch.equal(int8_linear(x_q, s_x, codes, scale, bias), packed)
    assert packed.dtype == torch.bfloat16


def test_layouts_and_leading_dimensions() -> None:
    x_q, s_x, codes, scale, bias = operands(6, 5, 70)
    want = int8_linear(x_q, s_x, codes, scale, bias)
    got = int8_linear(x_q.view(2, 3, 70), s_x.view(2, 3), codes, scale, bias)
    assert torch.equal(got, want.view(2, 3, 5))
    assert torch.equal(int8_linear(x_q[2], s_x[2], codes, scale, bias), want[2])
    assert int8_linear(x_q[:0], s_x[:0], codes, scale, bias).shape == (0, 5)
    assert int8_linear(x_q, s_x, codes[:0], scale[:0]).shape == (6, 0)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x_q, s_x, codes, scale, bias)]
    assert torch.equal(int8_linear(*strided), want)
    transposed = (x_q.t().contiguous().t(), s_x, codes.t().contiguous().t(), scale, bias)
    assert torch.equal(int8_linear(*transposed), want)


def test_arguments_are_left_as_they_were() -> None:
    """The outputs take the memory of the accumulators, and of nothing else."""
    arguments = operands(6, 5, 70)
    before = [one.clone() for one in arguments]
    int8_linear(*arguments, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_a_bad_token_spoils_only_itself() -> None:
    x_q, s_x, codes, scale, bias = operands(6, 5, 70)
    want = int8_linear(x_q, s_x, codes, scale, bias)
    s_x[3] = torch.nan
    got = int8_linear(x_q, s_x, codes, scale, bias)
    assert got[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (2, 3, 1024), (3, 2, 1025), (2, 2, 2**17 - 1)])
def test_matmul_is_exact(m: int, n: int, k: int) -> None:
    """Up to the longest rows: (2^17 - 1) * 128^2 is just below 2^31."""
    a, b = any_int8(m, k), any_int8(n, k)
    want = int64_product(a, b)
    for got in (
        int8_matmul(a, b),
        int8_matmul(a.t().contiguous().t(), b.t().contiguous().t()),
        reference.int8_matmul(a, b),
    ):
        assert got.dtype == torch.int32
        assert torch.equal(got, want)
    assert int8_matmul(a[:0], b).shape == (0, n)
    assert int8_matmul(a, b[:0]).shape == (m, 0)


def test_matmul_under_autocast() -> None:
    """fp32 slices that autocast turned into bf16 would round; on a CPU with VNNI none are used."""
    a, b = any_int8(20, 900), any_int8(9, 900)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_matmul(a, b), int64_product(a, b))
        assert torch.equal(reference.int8_matmul(a, b), int64_product(a, b))


OLDER_CPU = """
import json, numpy as np, torch
from bitnet_kernels import int8_matmul
from bitnet_kernels.cpu.int_mm import codes_matmul
torch.manual_seed(0)
right = []
for m, n, k in ((1, 1, 1), (3, 5, 2), (16, 16, 64), (64, 48, 256), (31, 65, 1300)):
    a = torch.where(torch.randn(m, k) > 0, 127, -128).to(torch.int8)
    b = torch.where(torch.randn(n, k) > 0, 127, -128).to(torch.int8)
    b[0], a[0] = -128, -128
    want = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    right.append(np.array_equal(int8_matmul(a, b).numpy(), want))
wrong = not np.array_equal(codes_matmul(a, b).numpy(), want)
print(json.dumps([right, wrong or not torch.cpu._is_avx2_supported()]))
"""


def test_matmul_is_exact_on_older_processors() -> None:
    """Without VNNI, oneDNN adds pairs of products in int16, where these saturate."""
    env = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "1"}
    assert json.loads(run_script(OLDER_CPU, **env)) == [5 * [True], True]


def test_operators_pass_opcheck() -> None:
    x_q, s_x, codes, scale, bias = operands(6, 5, 70)
    linear, matmul = torch.ops.bitnet.int8_linear.default, torch.ops.bitnet.int8_matmul.default
    for given in (scale, scale[0]):
        for one in (bias, None):
            for dtype in (torch.float32, torch.bfloat16):
                rest = (codes, given, one, dtype)
                torch.library.opcheck(linear, (x_q.view(2, 3, 70), s_x.view(2, 3), *rest))
    torch.library.opcheck(matmul, (x_q, codes))
    torch.library.opcheck(matmul, (x_q.t(), any_int8(6, 9).t()[:, :6].t().t()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    def layer(x: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x_q, s_x = reference.absmax_int8(x)
        return int8_linear(x_q, s_x, codes, scale).relu(), int8_matmul(x_q[0], codes) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (3, 4, 9):
        _, _, codes, scale, _ = operands(m, 5, 70)
        x = torch.randn(2, m, 70, generator=torch.Generator().manual_seed(m))
        for got, want in zip(compiled(x, codes, scale), layer(x, codes, scale), strict=True):
            assert torch.equal(got, want)


def test_meta_tensors_give_shapes() -> None:
    x_q, s_x, codes, scale, bias = (one.to("meta") for one in operands(6, 5, 70))
    y = int8_linear(x_q.view(2, 3, 70), s_x.view(2, 3), codes, scale, bias, torch.float16)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 5), torch.float16, "meta")
    assert int8_matmul(x_q, codes).shape == (6, 5)


def test_there_is_no_backward() -> None:
    x_q, s_x, codes, scale, _ = operands(6, 5, 70)
    y = int8_linear(x_q, s_x, codes, scale.requires_grad_(), out_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="have no backward"):
        y.sum().backward()


X_Q, S_X, CODES, SCALE, BIAS = operands(3, 5, 70)
LINEAR = {"x_q": X_Q, "s_x": S_X, "codes": CODES, "scale": SCALE, "bias": BIAS}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_q": X_Q.float()}, TypeError, "x_q: expected int8, got torch.float32"),
        ({"x_q": X_Q.view(torch.uint8)}, TypeError, "x_q: expected int8, got torch.uint8"),
        ({"x_q": [[1]]}, TypeError, "x_q: expected a tensor, got list"),
        ({"x_q": X_Q.to_sparse()}, TypeError, "x_q: expected a strided tensor"),
        ({"x_q": X_Q[:, :0]}, ValueError, r"x_q: expected shape \[..., K\] with K >= 1"),
        ({"x_q": X_Q[:, :69]}, ValueError, r"codes: expected shape \[N, 69\], got \[5, 70\]"),
        ({"x_q": X_Q[:1].expand(2, 70)}, ValueError, r"s_x: expected shape \[2\], got \[3\]"),
        (
            {"x_q": X_Q[:1, :1].expand(1, 2**24), "codes": CODES[:1, :1].expand(1, 2**24)},
            ValueError,
            "x_q: K = 16777216 may overflow int32 sums",
        ),
        ({"s_x": S_X.double()}, TypeError, "s_x: expected float32, got torch.float64"),
        ({"s_x": S_X[:, None]}, ValueError, r"s_x: expected shape \[3\], got \[3, 1\]"),
        ({"s_x": None}, TypeError, "s_x: expected a tensor, got NoneType"),
        ({"s_x": S_X.to("meta")}, ValueError, "s_x: is on meta, but the activations on cpu"),
        ({"codes": CODES.int()}, TypeError, "codes: expected int8, got torch.int32"),
        ({"codes": CODES[0]}, ValueError, r"codes: expected shape \[N, 70\], got \[70\]"),
        ({"codes": CODES.to("meta")}, ValueError, "codes: is on meta, but the activations on cpu"),
        ({"scale": 0.5}, TypeError, "scale: expected a tensor, got float"),
        ({"scale": SCALE.half()}, TypeError, "scale: expected float32, got torch.float16"),
        ({"scale": SCALE[:4]}, ValueError, r"scale: expected shape \[\] or \[5\], got \[4\]"),
        ({"scale": SCALE[:, None]}, ValueError, r"scale: expected shape .* got \[5, 1\]"),
        ({"bias": BIAS.int()}, TypeError, "bias: expected a float dtype, got torch.int32"),
        ({"bias": BIAS[:1]}, ValueError, r"bias: expected shape \[5\], got \[1\]"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias: is on meta, but the activations on cpu"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype: expected a float dtype"),
        ({"out_dtype": "bfloat16"}, TypeError, "out_dtype: expected a float dtype, got str"),
    ],
)
def test_wrong_arguments_of_the_linear_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        int8_linear(**(LINEAR | changes))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (X_Q.int(), CODES, TypeError, "a: expected int8, got torch.int32"),
        (X_Q, CODES.float(), TypeError, "b: expected int8, got torch.float32"),
        (X_Q[0], CODES, ValueError, r"a: expected shape \[M, K\] with K >= 1, got \[70\]"),
        (X_Q[:, :0], CODES[:, :0], ValueError, r"a: expected shape \[M, K\] with K >= 1"),
        (X_Q, CODES[:, :9], ValueError, r"b: expected shape \[N, 70\], got \[5, 9\]"),
        (X_Q, CODES[None], ValueError, r"b: expected shape \[N, 70\], got \[1, 5, 70\]"),
        (X_Q, CODES.to("meta"), ValueError, "b: is on meta, but the activations on cpu"),
        (X_Q, None, TypeError, "b: expected a tensor, got NoneType"),
        (
            X_Q[:, :1].expand(3, 2**17),
            CODES[:, :1].expand(5, 2**17),
            ValueError,
            "a: K = 131072 may overflow int32 sums; expected K < 2",
        ),
    ],
)
def test_wrong_matrices_are_named(a: Any, b: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        int8_matmul(a, b)


@pytest.fixture(scope="module")
def findings(interpreted: Interpreted) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    return interpreted("interpreted_int8.py")


@pytest.mark.parametrize(
    ("check", "at_least"),
    [("sums", 29), ("outputs", 60), ("extreme outputs", 12), ("operators", 8)],
)
def test_the_interpreted_kernel_is_exact(
    findings: list[dict[str, Any]], check: str, at_least: int
) -> None:
    cases = [one for one in findings if one["check"] == check]
    assert len({one["case"] for one in cases}) >= at_least
    assert [one["case"] for one in cases if not one["ok"]] == []


@pytest.fixture(scope="module")
def compiled(compiled_by: CompiledBy) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    return json.loads((compiled_by("compiled_int8.py") / "found.json").read_text())


@pytest.mark.slow
def test_machine_code_is_wide_exact_and_spills_nothing(compiled: dict[str, dict[str, Any]]) -> None:
    """int8 tensor cores, 16 bytes a load and store, nothing spilled, no fused multiply-add."""
    assert {"128x256 bf16 sm_90", "128x128 bf16 sm_80", "128x128 bf16 sm_89"} <= compiled.keys()
    for name, form in compiled.items():
        assert form["tensor"] == (["IGMMA"] if name.endswith("sm_90") else ["IMMA"]), name
        assert form["loads"] == [128], name
        if not name.startswith("odd"):  # outputs of one column
            assert form["spills"] == form["local"] == 0, name
            assert form["stores"] == [128], name
        assert form["fits"], name
        assert not form["fused"], name
    # Two programs of this tile fit an SM of 65536 registers, as its configuration claims.
    assert compiled["128x128 bf16 sm_90"]["registers"] <= 128


@pytest.mark.parametrize(
    ("m", "n", "capability", "n_sms", "tile"),
    [
        (32768, 4096, 90, 132, (128, 256)),
        (8192, 4096, 100, 148, (128, 256)),
        (8192, 384, 90, 132, (128, 256)),  # 128 programs, of 132
        (2048, 1024, 90, 132, (128, 128)),  # 128 programs, where the largest tile has 64
        (512, 1024, 90, 132, (64, 128)),
        (32768, 4096, 80, 108, (128, 128)),
        (512, 1024, 87, 108, (64, 128)),
        (32768, 4096, 89, 128, (128, 128)),
        (32768, 4096, 86, 84, (128, 128)),
        (32768, 4096, 120, 170, (64, 128)),
        (0, 4096, 90, 132, (128, 256)),
    ],
)
def test_the_tile_follows_sizes_and_gpu(
    m: int, n: int, capability: int, n_sms: int, tile: tuple[int, int]
) -> None:
    pytest.importorskip("triton")
    from bitnet_kernels.gpu.int8_gemm import CONFIGS, best_tile

    config = best_tile(m, n, capability, n_sms)
    assert config[:2] == tile
    limit = {86: 89, 87: 80, 100: 90, 120: 89}.get(capability, capability)
    assert config in CONFIGS[limit]
