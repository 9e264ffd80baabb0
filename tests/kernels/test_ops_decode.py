"""The operators of attention over a cache, their references, and their Triton kernels: in the
interpreter and compiled for GPUs that are not present, each in a separate process."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet.model import rotary, rotate
from bitnet_kernels import decode_attention, rope_append
from bitnet_kernels.gpu import decode_attention as gpu_attention
from bitnet_kernels.gpu import decode_rope as gpu_rope
from bitnet_kernels.ops.decode import ACTIVATIONS
from tests.helpers.scripts import CompiledBy, Interpreted, run_script

B, T, H, G, E, L, S = 2, 3, 6, 2, 16, 20, 3


def cache_of(dtype: torch.dtype, rows: int = S) -> tuple[Any, ...]:
    """Keys, values and their scales, zeros."""
    shape = (rows, G, L, E)
    scales = [torch.zeros(shape[:3]) if dtype == torch.int8 else None for _ in range(2)]
    return (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), *scales)


def counts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- the kernels ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def findings(interpreted: Interpreted) -> list[dict[str, Any]]:
    return interpreted("interpreted_decode.py")


@pytest.mark.parametrize(
    ("check", "at_least"),
    [
        ("rope_append", 24),
        ("rope_append reference", 24),
        ("attention", 48),
        ("attention reference", 24),
        ("rows", 6),
        ("tolerance", 6),
        ("not finite", 39),
        ("large scores", 4),
        ("CUDA implementations", 4),
    ],
)
def test_interpreted_kernels(findings: list[dict[str, Any]], check: str, at_least: int) -> None:
    cases = [finding for finding in findings if finding["check"] == check]
    assert len({case["case"] for case in cases}) >= at_least
    assert [case["case"] for case in cases if not case["ok"]] == []


@pytest.fixture(scope="module")
def compiled(compiled_by: CompiledBy) -> dict[str, dict[str, Any]]:
    return json.loads((compiled_by("compiled_decode.py") / "found.json").read_text())


@pytest.mark.slow
def test_nothing_spills(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == 14 + 4
    for name, form in compiled.items():
        assert form["spills"] == form["local"] == 0, name
        assert form["registers"] <= 65536, name  # of an SM: a program fits
        assert form["shared"] <= 99 * 1024, name  # what a program has on sm_86, sm_89 and sm_120


@pytest.mark.slow
def test_the_cache_is_copied_wide_and_dots_are_on_tensor_cores(
    compiled: dict[str, dict[str, Any]],
) -> None:
    for name, form in compiled.items():
        if name.startswith("decode_attention") and "second" not in name:
            assert "128" in form["copies"], name
            assert bool(form["dots"]) == ("fp32" not in name), name
    # It can be failed: with rows of 100 bytes nothing is wide.
    odd = compiled["odd decode_attention bf16 E=128 T=1, bf16 cache sm_90"]
    assert "128" not in odd["copies"]


class RecordingKernel:
    """Stands in for a jitted kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            sizes = tuple(one for one in arguments if isinstance(one, int))
            self.launches.append({"grid": grid, "sizes": sizes} | options)

        return launch


def test_launches_hang_on_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no values: whoever reads a length on the host fails."""
    kernel = RecordingKernel()
    monkeypatch.setattr(gpu_rope, "rope_append_kernel", kernel)
    monkeypatch.setattr(gpu_attention, "attention_kernel", kernel)
    monkeypatch.setattr(gpu_attention, "combine_kernel", kernel)
    with torch.device("meta"):
        qkv, table, length = torch.empty(B, T, (H + 2 * G) * E), torch.empty(L, E), torch.empty(B)
        k = torch.empty(S, G, L, E)
    q = gpu_rope.rope_append(qkv, table, table, k, k, length, length, None, None)
    tile = gpu_attention.Tile(16, 16, 2)
    y = gpu_attention.decode_attention(q, k, k, length, None, None, tile)
    assert (q.shape, y.shape) == ((B, T, H, E), (B, T, H * E))
    assert [launch["grid"] for launch in kernel.launches] == [
        (B * T, H + 2 * G),
        (B, G, 2),  # 9 queries of a row and key/value head: one tile of 16
        (B * T * H,),
    ]
    assert all(launch["enable_fp_fusion"] is False for launch in kernel.launches)


@pytest.mark.parametrize("head_dim", [2, 16, 50, 64, 80, 128, 256])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("chunk", [False, True])
def test_tiles_are_within_bounds_and_fill_the_gpu(head_dim: int, wide: bool, chunk: bool) -> None:
    for queries in (1, 4, 16, 17, 64, 1024):
        for programs in (1, 8, 40, 1000):
            for n_columns in (1, 64, 2048, 131072):
                tile = gpu_attention.tile_of(
                    queries, programs, head_dim, n_columns, wide, 132, chunk
                )
                assert 16 <= tile.block_m <= 64
                assert 16 <= tile.block_n <= 64
                assert 1 <= tile.splits <= gpu_attention.MAX_SPLITS
                assert (tile.splits - 1) * tile.block_n < n_columns
                if programs >= 2 * 132:  # enough to fill the GPU
                    assert tile.splits == 1
    # 8 * 32 programs: nearly two on each of 132 multiprocessors.
    assert gpu_attention.tile_of(4, 8, 128, 4096, False, 132, False).splits == 32


def test_prompts_of_any_length_share_few_forms() -> None:
    """Each tile is compiled, and so is each value that Triton specializes a size on."""
    steps, chunks = (
        {
            gpu_attention.tile_of(tokens * 4, rows * 8, 128, 2048, False, 132, tokens > 1)
            for rows in (1, 2, 3, 8, 20, 64)
            for tokens in lengths
        }
        for lengths in ([1], range(2, 257))
    )
    assert 1 < len(steps) <= 8
    assert 1 < len(chunks) <= 8
    script = """
from bitnet_kernels.gpu.decode_attention import attention_kernel, combine_kernel
for kernel in attention_kernel, combine_kernel:
    print(*(parameter.name for parameter in kernel.params if parameter.do_not_specialize))
"""
    assert run_script(script).splitlines() == ["T QUERIES", "HEADS"]


# --- the definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_rope_append_is_the_models(dtype: torch.dtype) -> None:
    """Bit for bit :func:`bitnet.model.rotate`, and in float64 a rotation of complex numbers."""
    qkv = torch.randn(B, T, (H + 2 * G) * E).to(dtype)
    cos, sin = rotary(torch.arange(L), E, 10_000.0)
    k, v, *_ = cache_of(dtype)
    q = rope_append(qkv, cos, sin, k, v, counts(4, 9), counts(3, 1))
    heads = qkv.view(B, T, H + 2 * G, E)
    for b, length in enumerate((4, 9)):
        window = slice(length, length + T)
        turned = rotate(heads[b].transpose(0, 1), cos[window], sin[window])
        assert torch.equal(q[b], turned[:H].transpose(0, 1))
        n = (3, 1)[b]
        assert torch.equal(k[b, :, length : length + n], turned[H : H + G, :n])
        assert torch.equal(v[b, :, length : length + n], heads[b, :n, H + G :].transpose(0, 1))
        for cache in (k, v):
            assert not cache[b, :, :length].any()
            assert not cache[b, :, length + n :].any()
    assert not k[B:].any()
    x = heads[0, 2, 0].double().numpy()
    angle = 6.0 * 10_000.0 ** (-np.arange(0, E, 2) / E)
    z = (x[: E // 2] + 1j * x[E // 2 :]) * np.exp(1j * angle)
    want = np.concatenate((z.real, z.imag))
    # The angle is off by 3 u of up to 6, cosine and sine by u more, the sum by 3 u; the cast.
    last = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    slack = (22 * 2.0**-24 + last) * np.tile(np.abs(z), 2) + 2.0**-25
    assert (np.abs(q[0, 2, 0].double().numpy() - want) <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_steps_are_attention_over_the_whole_sequence(dtype: torch.dtype) -> None:
    """A prompt in chunks, then steps, against F.scaled_dot_product_attention of the whole."""
    n = 17
    qkv = torch.randn(1, n, (H + 2 * G) * E).to(dtype)
    cos, sin = rotary(torch.arange(L), E, 10_000.0)
    heads = qkv.view(n, H + 2 * G, E).transpose(0, 1)
    q, k, v = heads.split((H, G, G))
    q, k = rotate(q, cos[:n], sin[:n]), rotate(k, cos[:n], sin[:n])
    want = F.scaled_dot_product_attention(
        *(x[None].double() for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    want = want[0].transpose(0, 1).reshape(n, H * E)
    for cache_dtype in (dtype, torch.int8):
        keys, values, *scales = cache_of(cache_dtype)
        got, length = [], 0
        for size in (7, 5, 1, 1, 1, 1, 1):
            chunk = F.pad(qkv[:, length : length + size], (0, 0, 0, 2))  # right padding
            filled = counts(length)
            new = rope_append(chunk, cos, sin, keys, values, filled, counts(size), *scales)
            y = decode_attention(new, keys, values, filled, *scales)
            got.append(y[0, :size])
            length += size
        # fp32: sums of 16 and 17 terms, scores of up to 10. bf16: outputs rounded once, 2^-8 of up
        # to 3. int8: keys and values off by 1/254 of their largest, 3.5: scores by 0.03, and twice
        # that of outputs of up to 3, plus the values' own 0.014.
        limit = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.int8: 0.2}[cache_dtype]
        assert (torch.cat(got).double() - want).abs().max() < limit


def test_attention_over_two_columns_by_hand() -> None:
    """Two columns with scores 0 and ln 3 / sqrt(2) * sqrt(2): weights 1/4 and 3/4."""
    k, v = torch.zeros(1, 1, 4, 2), torch.full((1, 1, 4, 2), math.nan)
    k[0, 0, 1, 0] = math.log(3.0) * math.sqrt(2.0)
    v[0, 0, :2] = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    assert decode_attention(q, k, v, counts(0)).tolist() == [[[4.0, 0.0]]]
    torch.testing.assert_close(decode_attention(q, k, v, counts(1)), torch.tensor([[[1.0, 6.0]]]))
    assert decode_attention(q, k, v, counts(2)).isnan().all()
    assert decode_attention(q, k, v, counts(-7)).tolist() == [[[4.0, 0.0]]]


def test_nothing_is_written_past_the_cache() -> None:
    qkv = torch.randn(B, T, (H + 2 * G) * E)
    table = torch.randn(L, E)
    for dtype in (torch.float32, torch.int8):
        for length in (L - 1, L, L + 1000, 2**31 - 1, -1, -(2**31)):
            cache = cache_of(dtype, B)
            rope_append(
                qkv, table, table, *cache[:2], counts(length, 0), counts(T + 9, 0), *cache[2:]
            )
            written = cache[0][0].ne(0).any(-1).nonzero()[:, 1].unique().tolist()
            assert written == {L - 1: [L - 1], -1: [0, 1]}.get(length, [])
            assert not cache[0][1].any()
            y = decode_attention(torch.randn(B, T, H, E), *cache[:2], counts(length, 0), *cache[2:])
            assert y.isfinite().all()


# --- the operators --------------------------------------------------------------------------------


def arguments(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    names = ("k_cache", "v_cache", "k_scale", "v_scale")
    given: dict[str, Any] = dict(zip(names, cache_of(dtype), strict=True))
    given |= {"qkv": torch.ones(B, T, (H + 2 * G) * E), "q": torch.ones(B, T, H, E)}
    given |= {"cos": torch.ones(L, E), "sin": torch.ones(L, E)}
    given |= {"lengths": counts(0, 1), "n_valid": counts(3, 3)}
    return given | changes


def call(op: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
    other = {"q"} if op is rope_append else {"qkv", "cos", "sin", "n_valid"}
    return op(**{name: value for name, value in given.items() if name not in other})


HALF = torch.zeros(S, G, L, E, dtype=torch.float16)
BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"k_cache": HALF.double()},
        TypeError,
        "^k_cache: expected float32, bfloat16, float16 or int8",
    ),
    ({"k_cache": None}, TypeError, "^k_cache: expected a tensor"),
    ({"k_cache": HALF[0]}, ValueError, r"^k_cache: expected shape \[S, G, L, E\]"),
    ({"k_cache": HALF[:, :, :0]}, ValueError, r"^k_cache: expected shape \[S, G, L, E\]"),
    ({"k_cache": HALF[:1]}, ValueError, "^k_cache: has 1 rows for a batch of 2"),
    (
        {"k_cache": torch.zeros(S, G, L, 15)},
        ValueError,
        "^k_cache: expected an even E of at most 256",
    ),
    (
        {"k_cache": torch.zeros(S, G, L, 258)},
        ValueError,
        "^k_cache: expected an even E of at most 256",
    ),
    ({"v_cache": HALF}, TypeError, "^v_cache: expected float32, got torch.float16"),
    (
        {"v_cache": torch.zeros(S, G, L + 1, E)},
        ValueError,
        r"^v_cache: expected shape \[3, 2, 20, 16\]",
    ),
    ({"v_cache": torch.zeros(S, G, E, L).mT}, ValueError, "^v_cache: expected a contiguous tensor"),
    ({"v_cache": torch.zeros(S, G, L, E, device="meta")}, ValueError, "^v_cache: is on meta"),
    (
        {"k_scale": torch.ones(S, G, L)},
        ValueError,
        "^k_scale: a cache of torch.float32 has no scales",
    ),
    ({"lengths": torch.ones(B)}, TypeError, "^lengths: expected int32 or int64"),
    ({"lengths": counts(1, 2, 3)}, ValueError, r"^lengths: expected shape \[2\], got \[3\]"),
    ({"lengths": counts(1, 2).to("meta")}, ValueError, "^lengths: is on meta"),
]
INT8: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"v_scale": None}, ValueError, r"^v_scale: an int8 cache needs its scales, fp32 \[3, 2, 20\]"),
    ({"k_scale": torch.ones(S, G)}, ValueError, r"^k_scale: expected shape \[3, 2, 20\]"),
    ({"k_scale": torch.ones(S, G, L).half()}, TypeError, "^k_scale: expected float32"),
    ({"k_scale": torch.ones(S, L, G).mT}, ValueError, "^k_scale: expected a contiguous tensor"),
]
ROPE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qkv": torch.ones(B, T, 160).double()}, TypeError, "^qkv: expected float32, bfloat16 or"),
    ({"qkv": torch.ones(B, 160)}, ValueError, r"^qkv: expected shape \[B, T, \(H"),
    ({"qkv": torch.ones(B, T, 161)}, ValueError, r"^qkv: expected \(H \+ 2G\) \* E columns"),
    ({"qkv": torch.ones(B, T, 2 * G * E)}, ValueError, r"^qkv: expected \(H \+ 2G\) \* E columns"),
    ({"cos": torch.ones(L, E // 2)}, ValueError, r"^cos: expected shape \[20, 16\]"),
    ({"sin": torch.ones(L - 1, E)}, ValueError, r"^sin: expected shape \[20, 16\]"),
    ({"sin": torch.ones(L, E).half()}, TypeError, "^sin: expected float32"),
    ({"sin": torch.ones(L, E, device="meta")}, ValueError, "^sin: is on meta"),
    ({"n_valid": torch.ones(B, 1).int()}, ValueError, r"^n_valid: expected shape \[2\]"),
    ({"n_valid": torch.ones(B).bool()}, TypeError, "^n_valid: expected int32 or int64"),
]
ATTENTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.ones(B, T, H, E).int()}, TypeError, "^q: expected float32, bfloat16 or float16"),
    ({"q": torch.ones(B, H, E)}, ValueError, r"^q: expected shape \[B, T, H, E\]"),
    (
        {"q": torch.ones(B, T, 5, E)},
        ValueError,
        "^q: expected H as a multiple of the cache's G = 2",
    ),
    (
        {"q": torch.ones(B, T, 0, E)},
        ValueError,
        "^q: expected H as a multiple of the cache's G = 2",
    ),
    ({"q": torch.ones(B, T, H, 18)}, ValueError, "^q: expected E = 16 as the cache, got 18"),
]
WRONG = [
    *((op, torch.float32, *wrong) for op in (rope_append, decode_attention) for wrong in BOTH),
    *((op, torch.int8, *wrong) for op in (rope_append, decode_attention) for wrong in INT8),
    *((rope_append, torch.float32, *wrong) for wrong in ROPE),
    *((decode_attention, torch.float32, *wrong) for wrong in ATTENTION),
]


@pytest.mark.parametrize(("op", "dtype", "changes", "error", "message"), WRONG)
def test_wrong_arguments(
    op: Callable[..., Tensor],
    dtype: torch.dtype,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    call(op, arguments(dtype))
    with pytest.raises(error, match=message):
        call(op, arguments(dtype, **changes))


def test_backward_is_refused() -> None:
    q = torch.randn(B, T, H, E, requires_grad=True)
    with pytest.raises(RuntimeError, match="have no backward"):
        call(decode_attention, arguments(q=q)).sum().backward()
    qkv = torch.randn(B, T, (H + 2 * G) * E, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        call(rope_append, arguments(qkv=qkv)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_opcheck(dtype: torch.dtype) -> None:
    cache, table = cache_of(dtype), torch.randn(L, E)
    for b, t in ((B, T), (1, 1), (0, 2)):
        lengths, n_valid = torch.arange(b), torch.full((b,), t)
        qkv = torch.randn(b, t, (H + 2 * G) * E)
        inputs = (qkv, table, table, *cache[:2], lengths, n_valid, *cache[2:])
        torch.library.opcheck(torch.ops.bitnet.rope_append, inputs)
        inputs = (torch.randn(b, t, H, E), *cache[:2], lengths, *cache[2:])
        torch.library.opcheck(torch.ops.bitnet.decode_attention, inputs)


def test_compiles_without_graph_break() -> None:
    """The writes to the cache survive functionalization, too."""
    table = torch.randn(L, E)

    def step(qkv: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        q = rope_append(qkv.sin(), table, table, k, v, lengths, torch.ones_like(lengths))
        return decode_attention(q, k, v, lengths).cos()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    caches = [cache_of(torch.float32)[:2] for _ in range(2)]
    for length in range(3):
        qkv, lengths = torch.randn(B, 1, (H + 2 * G) * E), counts(length, 2 * length)
        got = compiled(qkv, *caches[0], lengths)
        assert torch.equal(got, step(qkv, *caches[1], lengths))
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
