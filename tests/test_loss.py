"""The fused loss against F.cross_entropy of all logits, in fp64 where it can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import bitnet.loss
from bitnet.loss import linear_cross_entropy
from bitnet.model import KVCache, ModelConfig, Transformer
from bitnet.training.step import compiled

SHAPES = [(1, 3, 2), (64, 16, 100), (63, 17, 101), (5, 2, 1), (130, 33, 7), (3, 2, 300_000)]


@pytest.fixture
def chunk_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitnet.loss, "_CPU_CHUNK", (1, 8))


class Watch(TorchDispatchMode):
    """Counts products of matrices and finds the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def case(m: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (
        torch.randn(m, d, dtype=dtype, requires_grad=True),
        torch.randn(v, d, dtype=dtype, requires_grad=True),
        torch.randint(v, (m,)),
    )


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets)


def with_gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients times 3, as of a loss that enters a larger one."""
    return loss.detach(), *torch.autograd.grad(3 * loss, of)


@pytest.mark.usefixtures("chunk_of_8")
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_in_chunks(shape: tuple[int, int, int]) -> None:
    """fp32: a logit is a sum of D <= 33 products of unit normals, each off by up to 2^-24 of their
    sizes: some 1e-6, and so is the relative error of exp(logit); dh is a sum of V of them."""
    hidden, weight, targets = case(*shape)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = with_gradients(plain(*exact, targets), *exact)
    found = with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6 + shape[2] * 2**-24)
    found = with_gradients(linear_cross_entropy(*exact, targets), *exact)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("device", "rows"), [("_CPU_CHUNK", 256), ("_GPU_CHUNK", 8192)])
def test_chunks_at_the_vocabulary_of_15m(device: str, rows: int) -> None:
    n_logits, n_least = getattr(bitnet.loss, device)
    assert max(n_least, n_logits // 16384) == rows


@pytest.mark.usefixtures("chunk_of_8")
def test_it_never_holds_all_logits_and_computes_no_more_than_asked() -> None:
    hidden, weight, targets = case(50, 3, 200)
    of_weight = weight.numel()
    assert of_weight < 8 * 200
    with Watch() as watch:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert (watch.largest, watch.products) == (8 * 200, 3 * 7)
    for frozen, products in (((hidden,), 14), ((weight,), 14), ((hidden, weight), 7)):
        inputs = [t.detach() if any(t is f for f in frozen) else t for t in (hidden, weight)]
        with Watch() as watch:
            loss = linear_cross_entropy(*inputs, targets)
        assert (watch.largest, watch.products) == (8 * 200, products)
        of = [t for t in inputs if t.requires_grad]
        for gradient, t in zip(torch.autograd.grad(loss, of) if of else (), of, strict=True):
            assert torch.equal(gradient, t.grad)  # type: ignore[arg-type]
    with torch.no_grad(), Watch() as watch:
        found = linear_cross_entropy(hidden, weight, targets)
    assert (watch.largest, watch.products) == (8 * 200, 7)
    assert torch.equal(found, loss)
    assert not found.requires_grad


@pytest.mark.usefixtures("chunk_of_8")
def test_under_autocast_it_is_no_less_exact_than_the_plain_way() -> None:
    """Against fp64 on the inputs as bf16 holds them."""
    hidden, weight, targets = case(100, 32, 64)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
    expected = with_gradients(plain(*rounded, targets), *rounded)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        reference = F.cross_entropy((hidden @ weight.t()).float(), targets)
    found = with_gradients(loss, hidden, weight)
    theirs = with_gradients(reference, hidden, weight)
    for ours, other, exact in zip(found, theirs, expected, strict=True):
        assert ours.dtype == torch.float32
        error, its_error = ((t.double() - exact).norm() for t in (ours, other))
        assert error < 1.5 * its_error + 1e-6 * exact.norm()
        assert error < 2**-6 * exact.norm()  # a logit of 6 is rounded to 6 * 2^-9, exp(6) likewise


def test_large_losses_under_autocast_are_those_of_the_logits() -> None:
    """One product a logit: z in bf16 is known. Of a loss up to 60, fp32 loses 60 * 2^-24 in its
    subtraction and some 2^-22 in log and softmax; bf16 would lose up to 60 * 2^-9 = 0.12."""
    hidden, weight = torch.ones(40, 1), torch.linspace(-31.7, 29.3, 50)[:, None]
    targets = torch.arange(40)
    z = (hidden.bfloat16() * weight.bfloat16().t()).double()
    with torch.autocast("cpu", torch.bfloat16):
        for row in range(40):
            loss = linear_cross_entropy(hidden[:1], weight, targets[row : row + 1])
            exact = F.cross_entropy(z[:1], targets[row : row + 1])
            assert abs(loss.item() - exact.item()) < 60 * 2**-24 + 2**-20


def test_the_gradient_of_the_head_is_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 chunks of one token, all the same: sums in bf16, of 8 bits, would end at 256 of them."""
    monkeypatch.setattr(bitnet.loss, "_CPU_CHUNK", (1, 1))
    hidden, weight = torch.ones(512, 1), torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.int64))
    (dw,) = torch.autograd.grad(loss, weight)
    assert dw.flatten().tolist() == [-0.5, 0.5]


def test_small_gradients_survive_fp16() -> None:
    """M tokens divide a gradient by M, which a GradScaler's factor makes good again: after fp16,
    whose smallest number is 6e-8, it would come too late."""
    hidden = torch.full((64, 1), 2.0**-10, requires_grad=True)
    weight = torch.tensor([[2.0**-13], [0.0]])
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64))
    (dh,) = torch.autograd.grad(loss * 2**16, hidden)
    exact = -(2.0**-14) / 64 * 2**16  # (softmax - 1) * 2^-13, times share and scale
    torch.testing.assert_close(dh, torch.full((64, 1), exact), rtol=2**-9, atol=0)


def test_grad_of_torch_func() -> None:
    hidden, weight, targets = case(30, 16, 11)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    both = torch.func.grad(linear_cross_entropy, argnums=(0, 1))
    found = both(hidden.detach(), weight.detach(), targets)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    of_weight = torch.func.grad(linear_cross_entropy, argnums=1)
    assert torch.equal(of_weight(hidden.detach(), weight.detach(), targets), expected[1])


def test_errors_name_the_argument() -> None:
    h, w, t = torch.ones(3, 2), torch.ones(4, 2), torch.zeros(3, dtype=torch.int64)
    for arguments, error, message in (
        ((h.long(), w, t), TypeError, "hidden: expected a floating-point tensor, got torch.int64"),
        ((h, w.int(), t), TypeError, "weight: expected a floating-point tensor, got torch.int32"),
        ((h, w, t.int()), TypeError, "targets: expected int64, got torch.int32"),
        ((h, w.to("meta"), t), ValueError, "weight: expected on cpu, where hidden is, got meta"),
        ((h, w, t.to("meta")), ValueError, "targets: expected on cpu, where hidden is, got meta"),
    ):
        with pytest.raises(error, match=message):
            linear_cross_entropy(*arguments)


def test_extreme_logits() -> None:
    """Differences that overflow exp and underflow softmax, by hand."""
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    for z, target, expected in ((1e4, 1, 1e4), (1e4, 0, 0.0), (-3e4, 0, 6e4)):
        hidden = torch.tensor([[z]], requires_grad=True)
        loss = linear_cross_entropy(hidden, weight, torch.tensor([target]))
        assert loss.item() == expected
        (dh,) = torch.autograd.grad(loss, hidden)
        best = 1.0 if z > 0 else -1.0
        assert dh.item() == best - weight[target].item()


def test_what_is_not_a_number_shows() -> None:
    hidden, weight, targets = case(9, 4, 5)
    for poison in (torch.nan, torch.inf):
        bad = hidden.detach().clone()
        bad[3, 1] = poison
        bad.requires_grad_()
        loss, dh, dw = with_gradients(linear_cross_entropy(bad, weight, targets), bad, weight)
        assert loss.isnan()
        assert dh[3].isnan().all()
        assert dh[:3].isfinite().all()
        assert dw.isnan().any()


def test_a_second_backward_and_a_second_loss_add_up() -> None:
    hidden, weight, targets = case(9, 4, 5)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    first = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * first)
    loss = linear_cross_entropy(hidden, weight, targets)
    (dh,) = torch.autograd.grad(loss, hidden, create_graph=True)
    assert not dh.requires_grad


@pytest.mark.parametrize("target", [-100, -1, 5])
@pytest.mark.parametrize("grad", [True, False])
def test_a_target_out_of_range_is_an_error(target: int, grad: bool) -> None:
    hidden, weight, targets = case(9, 4, 5)
    targets[8] = target
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match=f"{target} is out of b"),
    ):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize(
    ("m", "d", "v", "n_targets", "message"),
    [
        (0, 4, 5, 0, r"at least one, got \[0\]"),
        (9, 4, 5, 8, r"each of the 9 hidden states.*got \[8\]"),
        (9, 4, 0, 9, "weight"),
    ],
)
def test_shapes_that_do_not_fit(m: int, d: int, v: int, n_targets: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.zeros(m, d), torch.zeros(v, d), torch.zeros(n_targets, dtype=torch.int64)
        )
    with pytest.raises(ValueError, match=r"got \[9, 4\] and \[5, 3\]"):
        linear_cross_entropy(torch.zeros(9, 4), torch.zeros(5, 3), torch.zeros(9).long())


@pytest.mark.usefixtures("chunk_of_8")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiles_without_graph_break() -> None:
    """The same operations, not fused: equal to the rounding of a sum's order (see above)."""
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    hidden, weight, targets = case(30, 16, 11)
    found = with_gradients(compiled(hidden, weight, targets), hidden, weight)
    expected = with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


# -- A model's loss ------------------------------------------------------------------------------


def small(tied: bool = True) -> Transformer:
    shape = {"d_model": 24, "n_layers": 1, "n_heads": 2, "d_ff": 40}
    config = ModelConfig(vocab_size=50, max_seq_len=16, tie_embeddings=tied, **shape)
    return Transformer(config)


def add_bias(model: Transformer) -> None:
    model.lm_head.bias = nn.Parameter(torch.randn(50))


def add_hook(model: Transformer) -> None:
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def add_parametrization(model: Transformer) -> None:
    parametrizations.weight_norm(model.lm_head)


def add_backward_hook(model: Transformer) -> None:
    model.lm_head.register_full_backward_pre_hook(lambda _module, dys: (dys[0].clone(),))


def patch_head(model: Transformer) -> None:
    inner = model.lm_head.forward
    model.lm_head.forward = lambda input: inner(input).tanh()  # type: ignore[method-assign]


CHANGES = [
    None,
    add_bias,
    add_hook,
    add_backward_hook,
    add_parametrization,
    patch_head,
]


def replace_head(model: Transformer) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())  # type: ignore[assignment]


@pytest.mark.usefixtures("chunk_of_8")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [*CHANGES, replace_head])
def test_a_models_loss_is_that_of_its_logits(
    change: Callable[[Transformer], None] | None, tied: bool
) -> None:
    model = small(tied)
    if change is not None:
        change(model)
    inputs, targets = torch.randint(50, (2, 3, 11))
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    parameters = list(model.parameters())
    with Watch() as watch:
        loss = model(inputs, targets)
    fused = watch.largest < 3 * 11 * 50
    assert fused == (change is None), "all logits only where the head is more than a matrix"
    found = with_gradients(loss, *parameters)
    for ours, theirs in zip(found, with_gradients(expected, *parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # 24 to 33 products
    with torch.no_grad(), Watch() as watch:
        loss = model(inputs, targets)
    assert watch.largest < 3 * 11 * 50, "without gradients no head needs all logits"
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_every_head_refuses_the_same_targets(
    change: Callable[[Transformer], None] | None, grad: bool
) -> None:
    """-100 too, which ``F.cross_entropy`` leaves out of the mean by default."""
    model = small()
    if change is not None:
        change(model)
    tokens, targets = torch.randint(50, (2, 3, 11))
    none, minus_100 = tokens[:0], targets.clone()
    minus_100[1, 2] = -100
    with torch.set_grad_enabled(grad):
        with pytest.raises((RuntimeError, IndexError), match="-100 is out of bounds"):
            model(tokens, minus_100)
        with pytest.raises(TypeError, match="targets: expected int64"):
            model(tokens, targets.int())
        with pytest.raises(ValueError, match="at least one"):
            model(none, none)


def test_targets_have_the_shape_of_the_tokens() -> None:
    """Transposed targets have the same number of elements, and their loss would mean nothing."""
    model, (tokens, targets) = small(), torch.randint(50, (2, 3, 11))
    for wrong in (targets.t(), targets.flatten(), targets[:, :-1]):
        with pytest.raises(ValueError, match=r"targets: expected the shape of tokens, \[3, 11\]"):
            model(tokens, wrong)
    with pytest.raises(TypeError, match="targets: got a cache"):
        model(tokens, KVCache(model.config, 3, 16))


def test_a_hook_on_the_model_gets_what_the_call_returns() -> None:
    model = small()
    inputs, targets = torch.randint(50, (2, 3, 11))
    logits, loss = model(inputs), model(inputs, targets)
    model.register_forward_hook(lambda _module, _inputs, output: 3 * output)
    assert torch.equal(model(inputs), 3 * logits)
    assert torch.equal(model(inputs, targets), 3 * loss)


def test_graphs_of_another_vector_width_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's cache key holds its tag and not the width: each width gets one."""
    tags = []
    for width in ("AVX512", "AVX2", "AVX2"):
        monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "mine")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda width=width: width)
        compiled(nn.Linear(2, 2))
        compiled(nn.Linear(2, 2))
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags == ["mine AVX512", "mine AVX2", "mine AVX2"]
