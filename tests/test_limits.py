"""The limits that docs/bitlinear.md lists: each is an error that says the words given there.

Sharding runs on gloo with one rank, in this process."""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from bitnet import BitLinear, TernaryLinear, pack, replace_linear
from bitnet.qat import Recipe, convert, prepare

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
QAT = Recipe(weights="int", keep_first_last=False)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def forward_mode() -> None:
    torch.func.jvp(BitLinear(4, 3), (X,), (X,))


def twice() -> None:
    x = X.clone().requires_grad_()
    y = BitLinear(4, 3)(x).square().sum()
    torch.autograd.grad(y, x, create_graph=True)[0].sum().backward()


def onnx() -> None:
    torch.onnx.export(BitLinear(4, 3), (X,), "/dev/null", dynamo=False)


def parallel(mesh: DeviceMesh) -> None:
    layer = BitLinear(4, 4, granularity="group", group_size=2, bias=False)
    parallelize_module(layer, mesh, RowwiseParallel())(X)


def normed() -> None:
    replace_linear(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


def prepare_packed() -> None:
    prepare(pack(nn.Sequential(BitLinear(3, 3))), Recipe(weights="int"))


def write_packed() -> None:
    layer = TernaryLinear.from_bitlinear(BitLinear(3, 3))
    with pytest.raises(RuntimeError, match="cannot be written"):
        layer.weight.zero_()
    layer.weight.T[0] = 1


LIMITS: dict[str, Callable[..., Any]] = {
    "`torch.func.vmap`, `jacfwd`": lambda: torch.func.vmap(BitLinear(4, 3))(X),
    "`torch.func` of a QAT layer": lambda: torch.func.vjp(prepare(nn.Linear(4, 3), QAT), X),
    "forward mode, `torch.func.jvp`": forward_mode,
    "gradients of gradients": twice,
    "`torch.jit.script`": lambda: torch.jit.script(BitLinear(4, 3)),  # type: ignore[no-untyped-call]
    "`torch.onnx.export`": onnx,
    "`torch.fx.symbolic_trace`": lambda: torch.fx.symbolic_trace(nn.Sequential(BitLinear(4, 3))),
    "`torch.jit.save` of a trace": lambda: torch.jit.save(  # type: ignore[no-untyped-call]
        torch.jit.trace(BitLinear(4, 3), X),  # type: ignore[no-untyped-call]
        io.BytesIO(),
    ),
    'tensor parallelism over the columns of `granularity="group"`': parallel,
    "`replace_linear` after `fully_shard`": lambda mesh: replace_linear(
        sharded(nn.Sequential(nn.Linear(4, 4)), mesh)
    ),
    "`pack` of a model sharded by `fully_shard`": lambda mesh: pack(
        sharded(nn.Sequential(BitLinear(4, 4)), mesh)
    ),
    "`replace_linear` of an `nn.LazyLinear`": lambda: replace_linear(nn.LazyLinear(3)),
    "`replace_linear` of a layer under `weight_norm` or pruning": normed,
    "`replace_linear` where nothing can be replaced": lambda: replace_linear(nn.Conv2d(1, 1, 1)),
    "`pack` of a model without BitLinear layers": lambda: pack(nn.Linear(3, 3)),
    "`prepare` after `pack` or `convert`": prepare_packed,
    "writing to a packed layer's `weight`, or to a view of it": write_packed,
    "integer or complex inputs": lambda: BitLinear(4, 3)(X.to(torch.complex64)),
}
TEXT = (Path(__file__).parents[1] / "docs" / "bitlinear.md").read_text()
TABLE = dict(re.findall(r"^\| (.+?) \| `(.+?)` \| .+ \|$", TEXT, re.M))


def test_the_table_is_whole() -> None:
    assert list(TABLE) == list(LIMITS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_loud(limit: str, mesh: DeviceMesh) -> None:
    function = LIMITS[limit]
    arguments = [mesh] if function.__code__.co_argcount else []
    with pytest.raises(Exception, match=re.escape(TABLE[limit])):
        function(*arguments)


def test_what_the_text_says_works() -> None:
    """The gradients of transforms are sums in another order than those of native code."""
    close = torch.testing.assert_close
    layer = BitLinear(4, 3)
    x = X.clone().requires_grad_()
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (weight,) = torch.autograd.grad(y.sum(), layer.weight)
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed.sum(), x)[0], expected)
    close(torch.func.jacrev(layer)(X).sum((0, 1)), expected)
    close(torch.func.vjp(layer, X)[1](torch.ones(2, 3))[0], expected)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, X).sum()

    close(torch.func.grad(loss)(dict(layer.named_parameters()))["weight"], weight)


def test_a_sharded_model_trains_and_says_to_gather_first(mesh: DeviceMesh) -> None:
    whole = nn.Sequential(BitLinear(4, 4), nn.ReLU(), BitLinear(4, 3))
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    expected = whole(X)
    model = sharded(whole, mesh)
    y = model(X)
    assert torch.equal(y, expected)
    y.sum().backward()
    with pytest.raises(
        ValueError, match=r"^0\.weight: is sharded over ranks \(a DTensor\); gather"
    ):
        pack(model)
    assert isinstance(model[0], BitLinear)  # type: ignore[index]
    gathered = nn.Sequential(BitLinear(4, 4), nn.ReLU(), BitLinear(4, 3))
    full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    gathered.load_state_dict(full)
    assert all(torch.equal(full[name], tensor) for name, tensor in state.items())
    assert torch.equal(pack(gathered)(X), y)


def test_qat_of_a_sharded_model(mesh: DeviceMesh) -> None:
    recipe = Recipe(weights="int", keep_first_last=False)
    with pytest.raises(ValueError, match="replace its layers first, then shard"):
        prepare(sharded(nn.Sequential(nn.Linear(4, 4)), mesh), recipe)
    model = sharded(prepare(nn.Sequential(nn.Linear(4, 4)), recipe), mesh)
    model(X).sum().backward()
    with pytest.raises(ValueError, match="gather first"):
        convert(model)


@pytest.mark.filterwarnings("ignore:FSDP is switching")  # of one rank
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_says_to_gather_first(original: bool, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    layers = nn.Sequential(BitLinear(4, 4), nn.ReLU())
    device = torch.device("cpu")
    model = FullyShardedDataParallel(layers, use_orig_params=original, device_id=device)
    with pytest.raises(ValueError, match=r"^model: is sharded \(FSDP\); gather first"):
        pack(model)
    with pytest.raises(ValueError, match="replace its layers first"):
        replace_linear(model)
