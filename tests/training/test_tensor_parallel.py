"""Tensor parallelism on 2 and 4 gloo processes, against one process.

Scales, codes and int32 sums are compared to the bit, so outputs are, too. Only gradients are sums
in another order, and with them the weights after a step.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import bitnet_kernels
from bitnet import BitLinear, pack, replace_linear, weights_quantized
from bitnet.bitlinear import gather_codes
from bitnet.gathered import codes_of_gathered, quantized
from bitnet.model import KVCache, Transformer, check_divides
from bitnet.qat import Recipe, prepare
from bitnet.quant import absmean_ternary, dequantize, quantize_input
from bitnet.schema import UserError
from bitnet.sharded import Recipe as WeightRecipe
from bitnet.sharded import quantize_weights
from bitnet.training.tensor_parallel import (
    ColwiseBitLinear,
    RowwiseBitLinear,
    tensor_parallel,
)
from bitnet_kernels import reference
from tests.helpers.fast_paths import counting
from tests.helpers.ranks import on_ranks
from tests.helpers.small_training import batch, small

UNIT = 2.0**-24
"""Rounding of fp32: two orders of one sum of n terms differ by at most 2 n UNIT sum |term|."""
FOUR_WAYS: dict[str, Any] = {"n_kv_heads": 4, "d_ff": 48}
"""Divides over 4 ranks; 2 layers of 4 heads."""
MODELS: dict[str, dict[str, Any]] = {
    "sub_norm": {"n_kv_heads": 2, "d_ff": 44},  # 44 / 2 = 22 channels
    "pre_norm": {"norm_placement": "pre_norm", "n_kv_heads": 2, "qk_norm": True},
    "in_linear": {"norm_placement": "in_linear", **FOUR_WAYS},
    "untied, silu": {"tie_embeddings": False, "activation": "silu", **FOUR_WAYS},
    "row": {"granularity": "row", "qk_norm": True, **FOUR_WAYS},
    "masked": {"grad_mask": "clip", **FOUR_WAYS},
}


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("shard", "tensor")[-len(shape) :])


def divided(tensor: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    return tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()


def gathered(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The columns of all ranks."""
    return DTensor.from_local(tensor, mesh, [Shard(tensor.dim() - 1)]).full_tensor()


@contextmanager
def accumulators() -> Iterator[list[Tensor]]:
    """Collects the int32 sums of each ternary layer: after the reduction of a row-parallel one."""
    seen: list[Tensor] = []
    linear, reduce = bitnet_kernels.int8_linear, dist.all_reduce

    def seen_linear(x_q: Tensor, s_x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
        seen.append(reference.int8_matmul(x_q, codes))
        return linear(x_q, s_x, codes, *rest)

    def seen_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = reduce(tensor, *args, **kwargs)
        if tensor.dtype == torch.int32:
            seen.append(tensor.clone())
        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitnet_kernels, "int8_linear", seen_linear)
        patch.setattr(dist, "all_reduce", seen_reduce)
        yield seen


def assert_same_sums(ours: list[Tensor], whole: list[Tensor], mesh: DeviceMesh) -> None:
    """q, k, v, o, gate, up, down of each layer; a column-parallel one has some columns."""
    assert len(ours) == len(whole) > 0
    for part, expected in zip(ours, whole, strict=True):
        if part.shape != expected.shape:
            part = gathered(part, mesh)
        assert torch.equal(part, expected)


# -- One layer -------------------------------------------------------------------------------------

SHAPES = [(4, 4, 1), (8, 12, 5), (20, 36, 7), (64, 128, 3), (4, 260, 2)]
"""N, K, tokens."""


def one_layer(granularity: Any, bias: bool) -> None:
    mesh = mesh_of(dist.get_world_size())
    generator = torch.Generator().manual_seed(1)
    for n, k, m in SHAPES:
        layer = BitLinear(k, n, bias, granularity=granularity)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n, k, generator=generator) * torch.logspace(-3, 2, k))
        x = torch.randn(m, k, generator=generator) * torch.logspace(2, -4, m)[:, None]
        dy = torch.randn(m, n, generator=generator)
        codes, gamma = absmean_ternary(layer.weight, granularity)
        for style, dim in ((ColwiseBitLinear(), 0), (RowwiseBitLinear(), 1)):
            ours = BitLinear(k, n, bias, granularity=granularity)
            ours.load_state_dict(layer.state_dict())
            parallelize_module(ours, mesh, style)
            weight = ours.weight
            assert isinstance(weight, DTensor)
            (part,) = quantize_weights([weight], [WeightRecipe(granularity)])
            assert torch.equal(part.codes, divided(codes, dim, mesh))
            rows = granularity == "row" and dim == 0
            assert torch.equal(part.gamma, divided(gamma, 0, mesh) if rows else gamma)

            whole_x = x.clone().requires_grad_()
            with accumulators() as expected_sums:
                expected = layer(whole_x)
            layer.weight.grad = None
            expected.backward(dy)
            part_x = (divided(x, 1, mesh) if dim else x.clone()).requires_grad_()
            with accumulators() as sums:
                y = ours(part_x)
            y.backward(dy if dim else divided(dy, 1, mesh))
            assert_same_sums(sums, expected_sums, mesh)
            assert torch.equal(y if dim else gathered(y, mesh), expected)

            assert whole_x.grad is not None
            assert part_x.grad is not None
            w_hat, tokens = dequantize(codes, gamma), quantize_input(x)
            x_hat = tokens.codes * tokens.scale[:, None]
            bound = 2 * (n + 2) * UNIT * (dy.abs() @ w_hat.abs())
            dx = gathered(part_x.grad, mesh) if dim else part_x.grad
            assert ((dx - whole_x.grad).abs() <= bound).all()
            assert isinstance(ours.weight.grad, DTensor)
            assert layer.weight.grad is not None
            bound = 2 * (m + 2) * UNIT * (dy.abs().t() @ x_hat.abs())
            assert ((ours.weight.grad.full_tensor() - layer.weight.grad).abs() <= bound).all()
            if bias:
                db, mine = torch.autograd.grad(layer(x), layer.bias, dy)[0], ours.bias.grad
                assert isinstance(mine, DTensor)
                assert ((mine.full_tensor() - db).abs() <= 2 * m * UNIT * dy.abs().sum(0)).all()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_is_that_of_one_process(granularity: str, ranks: int, tmp_path: Path) -> None:
    on_ranks(one_layer, ranks, tmp_path, granularity, ranks == 2)


def groups_and_styles() -> None:
    """Columns of groups are whole in a column-parallel layer; torch's styles divide, too."""
    mesh = mesh_of(dist.get_world_size())
    layer, x = BitLinear(24, 8, granularity="group", group_size=10), torch.randn(3, 24)
    expected = layer(x)
    parallelize_module(layer, mesh, ColwiseBitLinear())
    assert torch.equal(gathered(layer(x), mesh), expected)

    model = replace_linear(
        nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5, bias=False))
    )
    expected = model(x)
    expected.sum().backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with weights_quantized(model):
        y = model(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), whole[name])


def test_groups_of_whole_columns_and_torchs_own_styles(tmp_path: Path) -> None:
    on_ranks(groups_and_styles, 2, tmp_path)


def not_finite() -> None:
    """What is NaN or infinite on one rank is NaN on all."""
    mesh = mesh_of(dist.get_world_size())
    layer = parallelize_module(BitLinear(8, 4, bias=False), mesh, RowwiseBitLinear())
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(3, 4)
        if mesh.get_local_rank() == 1:
            x[1, 2] = bad
        assert torch.equal(layer(x).isnan().any(1), torch.tensor([False, True, False]))
        for style in (ColwiseBitLinear(), RowwiseBitLinear()):
            weak = BitLinear(8, 4, bias=False)
            with torch.no_grad():
                weak.weight[3, 7] = bad
            weak = parallelize_module(weak, mesh, style)
            k = 8 if isinstance(style, ColwiseBitLinear) else 4
            assert weak(torch.ones(1, k)).isnan().all()


def test_nan_and_infinity_reach_every_rank(tmp_path: Path) -> None:
    on_ranks(not_finite, 2, tmp_path)


# -- The whole model -------------------------------------------------------------------------------


def forward_and_gradients(options: dict[str, Any]) -> None:
    mesh = mesh_of(dist.get_world_size())
    whole, ours = small(**options), tensor_parallel(small(**options), mesh)
    tokens = batch(0)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with accumulators() as expected_sums:
        expected = whole(inputs)
    with accumulators() as sums:
        logits = ours(inputs)
    assert_same_sums(sums, expected_sums, mesh)
    assert torch.equal(logits, expected)
    with torch.no_grad():
        assert torch.equal(ours(inputs[:1, :1]), whole(inputs[:1, :1]))  # fewer tokens than ranks
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(inputs), whole(inputs))
    expected_loss = whole(inputs, targets)
    expected_loss.backward()
    with weights_quantized(ours):
        loss = ours(inputs, targets)
        loss.backward()
    assert torch.equal(loss, expected_loss)
    for (name, mine), theirs in zip(ours.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(mine.grad, DTensor)
        assert theirs.grad is not None
        assert mine.grad.placements == mine.placements
        scale = theirs.grad.abs().max()
        error = (mine.grad.full_tensor() - theirs.grad).abs().max()
        # errors of a sum over 32 tokens and at most 44 channels, through the four products above it
        assert error <= 2 * (32 + 44) * 4 * UNIT * scale, name
    state = get_model_state_dict(ours, options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    assert torch.equal(pack(whole)(inputs), logits)


@pytest.mark.parametrize(
    ("name", "ranks"), [*((name, 2) for name in MODELS), ("in_linear", 4), ("row", 4)]
)
def test_a_model_is_that_of_one_process(name: str, ranks: int, tmp_path: Path) -> None:
    on_ranks(forward_and_gradients, ranks, tmp_path, MODELS[name])


def full_precision() -> None:
    mesh = mesh_of(dist.get_world_size())
    whole = small(linear="fp", **FOUR_WAYS)
    ours = tensor_parallel(small(linear="fp", **FOUR_WAYS), mesh)
    tokens = batch(0)
    torch.testing.assert_close(ours(tokens[:, :-1]), whole(tokens[:, :-1]))


def test_the_full_precision_baseline(tmp_path: Path) -> None:
    on_ranks(full_precision, 2, tmp_path)


STEPS, MANY_STEPS = 8, 30
"""In any run, and among the slow tests."""
LR = 3e-4
"""At 1e-3 the first code of this model flips after 20 steps: gradients differ in their last bits,
and AdamW moves a weight whose gradient is next to nothing by LR in any direction."""


def shard_data(model: Transformer, mesh: DeviceMesh, as_codes: bool) -> None:
    for block in model.layers:
        gather_codes(block, as_codes)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def codes_of(model: Transformer, state: dict[str, Any]) -> list[Tensor]:
    return [absmean_ternary(state[f"{n}.weight"])[0] for n in matrices(model)]


def matrices(model: Transformer) -> list[str]:
    config = model.config
    return [f"layers.{i}.{name}" for i in range(config.n_layers) for name in config.matrices()]


def train_beside_one_process(
    dp: int, tp: int, as_codes: bool, options: dict[str, Any], steps: int
) -> int:
    """Train on dp x tp ranks and on one process, from the same weights.

    Each forward is compared, to the bit, with one process that has the weights of that step. The
    losses of the two trainings stay within 1e-4 while their codes are the same. Returns for how
    many steps they were.
    """
    mesh = mesh_of(dp, tp)
    rank = mesh.get_local_rank("shard")
    alone, ours = small(**options), tensor_parallel(small(**options), mesh["tensor"])
    if dp > 1:
        shard_data(ours, mesh["shard"], as_codes)
    beside, same = small(**options), steps
    optimizers = [torch.optim.AdamW(m.parameters(), LR, fused=True) for m in (alone, ours)]
    whole_state = StateDictOptions(full_state_dict=True)
    for step in range(steps):
        tokens = torch.cat([batch(2 * step), batch(2 * step + 1)])
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        state = get_model_state_dict(ours, options=whole_state)
        pairs = zip(codes_of(ours, state), codes_of(ours, alone.state_dict()), strict=True)
        if same == steps and not all(torch.equal(*pair) for pair in pairs):
            same = step
        beside.load_state_dict(state)
        expected = alone(inputs, targets)
        expected.backward()
        mine = slice(rank * 4 // dp, (rank + 1) * 4 // dp)
        with accumulators() as whole_sums, torch.no_grad():
            exact = beside(inputs[mine], targets[mine])
        with weights_quantized(ours), accumulators() as sums:
            loss = ours(inputs[mine], targets[mine])
        loss.backward()
        assert_same_sums(sums, whole_sums, mesh["tensor"])
        assert torch.equal(loss, exact)
        total = loss.detach().clone()
        dist.all_reduce(total, group=mesh.get_group("shard"))
        if same == steps:
            # fp32 trainings drift: an activation on the edge of two codes turns on some CPUs
            assert abs(float(total) / dp - float(expected.detach())) <= 1e-4
        norm = nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        expected_norm = nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        if same == steps:
            assert isinstance(norm, DTensor)
            torch.testing.assert_close(norm.full_tensor(), expected_norm, rtol=1e-3, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return same


@pytest.mark.parametrize(
    ("dp", "tp", "as_codes", "name", "steps"),
    [
        (1, 2, False, "sub_norm", STEPS),
        (2, 2, True, "sub_norm", STEPS),
        pytest.param(1, 2, False, "sub_norm", MANY_STEPS, marks=pytest.mark.slow),
        pytest.param(2, 2, True, "sub_norm", MANY_STEPS, marks=pytest.mark.slow),
        pytest.param(2, 2, False, "sub_norm", MANY_STEPS, marks=pytest.mark.slow),
        pytest.param(2, 2, True, "row", MANY_STEPS, marks=pytest.mark.slow),
        pytest.param(1, 4, False, "row", MANY_STEPS, marks=pytest.mark.slow),
        pytest.param(2, 2, True, "in_linear", MANY_STEPS, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_process(
    dp: int, tp: int, as_codes: bool, name: str, steps: int, tmp_path: Path
) -> None:
    options = MODELS[name] | {"n_layers": 1}
    same = on_ranks(train_beside_one_process, dp * tp, tmp_path, dp, tp, as_codes, options, steps)
    # All ranks see the first code that flips at the same step. Which one depends on the CPU, whose
    # sums decide the last bits of the gradients: none of 30 on some, the 16th on another.
    assert len(set(same)) == 1
    assert same[0] >= STEPS


def hostile_scales() -> int:
    """Scales of parts of hostile matrices that FSDP2 divides once more, against the whole matrix:
    uneven rows, and fewer rows than processes."""
    mesh, compared = mesh_of(2, 2), 0
    rank = mesh["tensor"].get_local_rank()
    for fill, granularity, n in product(
        (0.0, 3e38, math.nan, math.inf), ("tensor", "row"), (10, 2)
    ):
        layers = [BitLinear(6, n, granularity=granularity, bias=False) for _ in range(2)]
        with torch.no_grad():
            layers[0].weight[0, 0] = fill
            layers[1].weight[n - 1, 5] = fill
        expected = [layer.quantize() for layer in layers]
        for dim, layer in enumerate(layers):
            style = RowwiseBitLinear() if dim else ColwiseBitLinear()
            parallelize_module(layer, mesh["tensor"], style)
            gather_codes(layer, as_codes=True)
            fully_shard(layer, mesh=mesh["shard"])
        with quantized([layer.weight for layer in layers]):
            for dim, (layer, (codes, gamma)) in enumerate(zip(layers, expected, strict=True)):
                assert isinstance(layer, FSDPModule)
                layer.unshard()
                found = codes_of_gathered(layer.weight)
                assert found is not None
                assert torch.equal(found.codes, codes.chunk(2, dim)[rank])
                mine = gamma if gamma.dim() == 0 or dim else gamma.chunk(2)[rank]
                torch.testing.assert_close(found.gamma, mine, rtol=0, atol=0, equal_nan=True)
                compared += 1
                layer.reshard()
    return compared


def test_scales_of_hostile_parts(tmp_path: Path) -> None:
    assert on_ranks(hostile_scales, 4, tmp_path) == [32] * 4


# -- What is shared, and what is refused -----------------------------------------------------------


def few_messages() -> None:
    """Scales of all weights in two reductions per step. Inputs are quantized once, and in the
    backward the gradients of layers that share one are added over the ranks once."""
    mesh = mesh_of(dist.get_world_size())
    model = tensor_parallel(small(norm_placement="pre_norm", **FOUR_WAYS), mesh)
    tokens = batch(0)
    reduce, reduced = dist.all_reduce, list[torch.dtype]()

    def seen(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.dtype)
        return reduce(tensor, *args, **kwargs)

    functional, gradients = funcol.all_reduce, list[torch.Size]()

    def seen_gradient(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        gradients.append(tensor.shape)
        return functional(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, counting() as calls:
        patch.setattr(dist, "all_reduce", seen)
        patch.setattr(funcol, "all_reduce", seen_gradient)
        with weights_quantized(model):
            assert reduced == [torch.float32, torch.int64]
            model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert reduced[2:] == 4 * [torch.float32, torch.int32]  # o and down: maxima, sums
    assert calls["inputs quantized"] == 2 * 2  # of attention and MLP; o and down share theirs
    assert gradients == 4 * [(2, 16, 24)]  # once for attention and once for the MLP of each layer
    layer = model.layers[0].self_attn.q_proj  # type: ignore[union-attr]

    def change_inside() -> None:
        with weights_quantized(model), torch.no_grad():
            layer.weight.mul_(2)

    with pytest.raises(RuntimeError, match=r"q_proj\.weight: changed inside"):
        change_inside()


def test_ranks_exchange_little(tmp_path: Path) -> None:
    on_ranks(few_messages, 2, tmp_path)


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"n_kv_heads": 2}, 4, "tensor_parallel = 4 does not divide model.n_kv_heads = 2; for"),
        ({"n_kv_heads": 2}, 4, "it can be 2 or a divisor"),
        (
            {"n_heads": 6},
            4,
            "tensor_parallel = 4 does not divide model.n_heads = 6; for this model",
        ),
        ({"n_kv_heads": 4, "d_ff": 42}, 4, "does not divide model.d_ff = 42"),
        (
            {"linear": "fp", "norm_placement": "in_linear"},
            2,
            "cannot divide the full-precision matrices",
        ),
        ({"granularity": "group"}, 2, 'cannot divide the columns of model.granularity = "group"'),
    ],
)
def test_a_model_that_does_not_divide(options: dict[str, Any], size: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_divides(small(**options).config, size)
    assert "\n" not in str(caught.value)


def test_layers_that_cannot_be_divided(alone: DeviceMesh) -> None:
    quantized = small(linear="fp")
    prepare(quantized, Recipe(weights="int", keep_first_last=False))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj is a QATLinear; only"):
        tensor_parallel(quantized, alone)
    for style in (ColwiseBitLinear(), RowwiseBitLinear()):
        with pytest.raises(ValueError, match="expected a BitLinear, got Linear"):
            parallelize_module(nn.Linear(4, 4), alone, style)
    with pytest.raises(ValueError, match="columns of 'group' cannot be divided"):
        parallelize_module(BitLinear(4, 4, granularity="group"), alone, RowwiseBitLinear())
    row = parallelize_module(BitLinear(4, 4), alone, RowwiseBitLinear())
    with pytest.raises(TypeError, match="a row-parallel layer takes the scale of a token over all"):
        row(quantize_input(torch.ones(2, 4)))
    whole = BitLinear(4, 4)
    whole.weight = nn.Parameter(distribute_tensor(whole.weight.detach(), alone, [Replicate()]))
    with pytest.raises(
        ValueError, match=r"weight: expected a DTensor with Shard\(0\) or Shard\(1\)"
    ):
        whole(torch.ones(2, 4))


def test_packing_says_to_gather(alone: DeviceMesh) -> None:
    model = tensor_parallel(small(), alone)
    with pytest.raises(ValueError, match=r"is sharded over ranks \(a DTensor\); gather first"):
        pack(model)


def uneven_layers() -> None:
    mesh = mesh_of(dist.get_world_size())
    with pytest.raises(ValueError, match="out_features: 5 cannot be divided over 2 ranks equally"):
        parallelize_module(BitLinear(4, 5), mesh, ColwiseBitLinear())
    with pytest.raises(ValueError, match="in_features: 5 cannot be divided over 2 ranks equally"):
        parallelize_module(BitLinear(5, 4), mesh, RowwiseBitLinear())
    model = tensor_parallel(small(), mesh)
    with pytest.raises(ValueError, match="cache: has 2 key-value heads, and this layer 1"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=KVCache(model.config, 1, 4))


def test_unequal_shares_and_caches_are_refused(tmp_path: Path) -> None:
    on_ranks(uneven_layers, 2, tmp_path)
