"""RMSNorm and the squared-ReLU gate: torch's bits forward, torch's gradients, less kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.elementwise import RMSNorm, relu2_mul

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(3, 5, 48), (7,), (2, 1), (0, 4), (1, 0, 3), (4, 1000)]


def norm_of(features: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(features, 1e-5, dtype=dtype)
    nn.init.normal_(norm.weight)
    return norm


def torch_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """The composition of torch's own operators, in fp32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.eps)
    return y.to(x.dtype)


def torch_relu2_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate).square() * up


def assert_gradients_agree(ours: list[Tensor], theirs: list[Tensor], n_tokens: int) -> None:
    """Sums over K or the tokens, in fp32 in another order and rounded once to the dtype: a few ulps
    of the largest entry and a square root of the tokens more."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        if mine.numel():
            ulps = 8 * max(1, n_tokens) ** 0.5 * torch.finfo(mine.dtype).eps
            assert (mine - other).abs().max() <= ulps * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_norm_has_torchs_bits_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for weight_dtype in {dtype, torch.promote_types(dtype, torch.float32)}:
        norm = norm_of(shape[-1], weight_dtype)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y, expected = norm(x), torch_norm(x, norm)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        dy = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(z, [x, norm.weight], dy) for z in (y, expected))
        assert_gradients_agree(list(ours), list(theirs), x.shape[:-1].numel())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_gate_has_torchs_bits_and_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        gate, up, dy = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
        y, expected = relu2_mul(gate, up), torch_relu2_mul(gate, up)
        assert torch.equal(y, expected)
        ours, theirs = (torch.autograd.grad(z, [gate, up], dy) for z in (y, expected))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_the_gate_takes_two_dtypes_as_torch_does() -> None:
    torch.manual_seed(0)
    gate = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(3, 4, requires_grad=True)
    y = relu2_mul(gate, up)
    assert torch.equal(y, torch_relu2_mul(gate, up))
    y.sum().backward()
    assert gate.grad is not None
    assert (gate.grad.dtype, y.dtype) == (torch.bfloat16, torch.float32)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    norm = norm_of(5, torch.float64)
    x, other = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
        return result

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(normed, (x, norm.weight))
        assert check(relu2_mul, (x, other))


def test_only_the_gradients_that_are_wanted() -> None:
    norm = norm_of(4, torch.float32)
    x = torch.randn(3, 4)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    expected = torch_norm(x, norm) / norm.weight  # dy = 1
    torch.testing.assert_close(norm.weight.grad, expected.detach().sum(0))
    frozen = norm.requires_grad_(False)
    frozen(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_gradients_of_each_sample() -> None:
    torch.manual_seed(0)
    norm, x, up = norm_of(6, torch.float32), torch.randn(5, 3, 6), torch.randn(5, 3, 6)

    def loss(weight: Tensor, x: Tensor, up: Tensor) -> Tensor:
        y = torch.func.functional_call(norm, {"weight": weight}, (x,))
        return relu2_mul(y, up).square().sum()

    weight = norm.weight.detach()
    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, x, up)
    one_by_one = [torch.func.grad(loss)(weight, *pair) for pair in zip(x, up, strict=True)]
    torch.testing.assert_close(together, torch.stack(one_by_one))


def test_nan_and_infinity_stay_in_their_token() -> None:
    x = torch.ones(3, 4)
    x[0, 1], x[2, 2] = torch.nan, torch.inf
    y = norm_of(4, torch.float32)(x)
    assert y.isnan().any(1).tolist() == [True, False, True]
    assert relu2_mul(torch.tensor([torch.nan, -torch.inf]), torch.ones(2)).isnan().tolist() == [
        True,
        False,
    ]


def saved_bytes(function: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """What autograd keeps for the backward beyond the inputs themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(kept.values())


def test_what_is_kept_for_the_backward() -> None:
    norm, tokens, features = norm_of(64, torch.float32), 10, 64
    x, up = (torch.randn(tokens, features, requires_grad=True) for _ in range(2))
    one = 4 * tokens * features
    assert saved_bytes(lambda: norm(x), [x, norm.weight]) == 4 * tokens
    assert saved_bytes(lambda: torch_norm(x, norm), [x, norm.weight]) > one
    assert saved_bytes(lambda: relu2_mul(x, up), [x, up]) == 0
    assert saved_bytes(lambda: torch_relu2_mul(x, up), [x, up]) == 2 * one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_backward_inside_of_autocast_is_not_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x, up = norm_of(256, torch.float32), torch.randn(16, 256, requires_grad=True), 2.0
    dy = x.detach() * 65536  # as a scaled loss has it: sums beyond fp16
    with torch.autocast("cpu", dtype):
        ours = torch.autograd.grad(relu2_mul(norm(x), up + x), [x, norm.weight], dy)
    theirs = torch.autograd.grad(torch_relu2_mul(torch_norm(x, norm), up + x), [x, norm.weight], dy)
    assert all(gradient.isfinite().all() for gradient in ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_transforms_get_the_composition() -> None:
    torch.manual_seed(0)
    norm, x, v = norm_of(4, torch.float32), torch.randn(3, 4), torch.randn(3, 4)

    def function(x: Tensor) -> Tensor:
        return relu2_mul(norm(x), x)

    def theirs(x: Tensor) -> Tensor:
        return torch_relu2_mul(torch_norm(x, norm), x)

    for ours, expected in (
        (torch.func.jvp(function, (x,), (v,))[1], torch.func.jvp(theirs, (x,), (v,))[1]),
        (torch.func.jacrev(function)(x), torch.func.jacrev(theirs)(x)),
        (torch.func.jacfwd(function)(x), torch.func.jacfwd(theirs)(x)),
    ):
        assert torch.equal(ours, expected)
    weights = torch.randn(5, 4)
    many = torch.func.vmap(lambda w: torch.func.functional_call(norm, {"weight": w}, (x,)))(weights)
    torch.testing.assert_close(many[2], F.rms_norm(x, (4,), weights[2], 1e-5))
    with torch.inference_mode():
        made = torch.randn(3, 4)
    norm(made).sum().backward()  # to the weight: what is made for inference cannot be kept
    assert norm.weight.grad is not None


def test_other_shapes_are_torchs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, requires_grad=True)
    two = RMSNorm((3, 4), 1e-5)  # type: ignore[arg-type]
    nn.init.normal_(two.weight)
    assert torch.equal(two(x), F.rms_norm(x, (3, 4), two.weight, 1e-5))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        RMSNorm(1)(x)
    none = RMSNorm(0)
    none(torch.zeros(3, 0, requires_grad=True)).sum().backward()
    gate, up = torch.randn(4, requires_grad=True), torch.randn(3, 4)
    (ours,) = torch.autograd.grad(relu2_mul(gate, up).sum(), gate)
    torch.testing.assert_close(ours, (2 * F.relu(gate) * up).sum(0))


def test_a_norm_without_eps_has_that_of_fp32() -> None:
    x = torch.full((2, 4), 1e-4, requires_grad=True)
    for norm in (RMSNorm(4), RMSNorm(4).requires_grad_(False)):
        with torch.no_grad():
            plain = norm(x)
        assert torch.equal(norm(x), plain)
        assert torch.equal(plain, F.rms_norm(x, (4,), norm.weight, torch.finfo(torch.float32).eps))


def test_a_shut_gate_passes_no_gradient() -> None:
    gate = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    up = torch.tensor([torch.inf, torch.nan, 3.0])
    (gradient,) = torch.autograd.grad(relu2_mul(gate, up).sum(), gate)
    assert gradient.tolist() == [0.0, 0.0, 12.0]


def test_compiled_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    norm, x, up = norm_of(32, torch.float32), torch.randn(6, 32, requires_grad=True), torch.ones(32)

    def function(x: Tensor) -> Tensor:
        return relu2_mul(norm(x), up).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(x), [x, norm.weight]) for f in (function, compiled))
    assert_gradients_agree(list(ours), list(theirs), len(x))
