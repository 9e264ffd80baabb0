"""Two processes train as one: DDP, FSDP2 with latent weights and with 2-bit codes, AdamW and Muon.

Real processes on gloo. The same codes and, to the order of sums, the same losses. In fp32 gradients
differ by some 1e-7 of their size, which soon turns a code of an activation, and then the runs
differ: there each step begins with the weights of one process. In fp64 no code turns in 30 steps.
"""

import dataclasses
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import bitnet.model
from bitnet.bitlinear import BitLinear, gather_codes, weights_quantized
from bitnet.gathered import GatheredWeight, quantized, shard_of
from bitnet.model import ModelConfig, Transformer
from bitnet.training.distributed import World, parallel, place, recompute, whole
from bitnet.training.muon import Muon, ShardedMuon
from bitnet.training.optim import OptimConfig, build_optimizer
from bitnet.training.step import split, train_step
from tests.helpers.double import rotary64
from tests.helpers.ranks import on_ranks, world_of

CPU = torch.device("cpu")
STEPS = 6
"""Of a case in make test; each takes every path, and the optimizers have their momentum."""
MANY_STEPS = 30
"""Of a case in fp64 among the slow tests."""
SHAPE: dict[str, Any] = {"d_model": 24, "n_layers": 3, "n_heads": 2, "d_ff": 41, "vocab_size": 51}
"""41 and 51 rows: two processes have different numbers of them."""


def small(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{"max_seq_len": 16, **SHAPE, **options}))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    for ours, theirs in zip(source.parameters(), target.parameters(), strict=True):
        weight: Any = ours.detach()
        to: Any = theirs.detach()
        if hasattr(to, "full_tensor"):
            weight = distribute_tensor(weight, to.device_mesh, to.placements).to_local()
            to = to.to_local()
        to.copy_(weight)


def watch_codes(model: Transformer) -> list[list[tuple[Tensor, Tensor]]]:
    """What the layers of each block compute with: filled by the next forwards in training."""
    seen: list[list[tuple[Tensor, Tensor]]] = []

    def note(block: nn.Module, *_: Any) -> None:
        layers = [layer for layer in block.modules() if isinstance(layer, BitLinear)]
        found = []
        for layer in layers:
            weight = layer.weight
            if isinstance(weight, GatheredWeight):
                found.append((weight.quantized.codes.clone(), weight.quantized.gamma.clone()))
            else:
                found.append(layer.quantize())
        seen.append(found)

    for block in model.layers:
        block.register_forward_pre_hook(note)
    return seen


def compare(
    strategy: str,
    optimizer: str,
    as_codes: bool,
    every: int,
    double: bool,
    steps: int,
    **options: Any,
) -> Counter:
    """Train one model in this process and another together with the others, in fp32 from the same
    weights in each step. Counts what was compared."""
    world, config = world_of(strategy), OptimConfig(lr=4e-3, muon_lr=0.02, optimizer=optimizer)  # type: ignore[arg-type]
    alone, ours = World(CPU), small(**options)
    together = small(**options)
    if double:
        ours.double()
        together.double()
    recompute(together.layers, every)
    place(together, together.layers, world, lambda block: gather_codes(block, as_codes))
    stepped = parallel(together, world)
    optimizers = build_optimizer(ours, config), build_optimizer(together, config)
    ours_seen, seen = watch_codes(ours), watch_codes(together)
    counts = Counter[str]()
    for step in range(steps):
        if not double:
            with torch.no_grad():
                copy_weights(ours, together)
        batch = torch.randint(51, (8, 17), generator=torch.Generator().manual_seed(step))
        results = []
        for model, all_of, part in ((ours, optimizers[0], alone), (stepped, optimizers[1], world)):
            tokens, targets = part.share(batch[:, :-1]), part.share(batch[:, 1:])
            micro_batches = split(tokens, targets, 2)
            when = step, steps, config
            results.append(train_step(model, all_of, micro_batches, *when, nullcontext(), part))
        close = 1e-8 if double else 1e-5
        assert results[1].loss == pytest.approx(results[0].loss, abs=close, rel=0), step
        assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4), step
        for mine, theirs in zip(ours_seen[:3], seen[:3], strict=True):
            for (codes, gamma), (other_codes, other_gamma) in zip(mine, theirs, strict=True):
                assert torch.equal(codes, other_codes), step
                assert double or torch.equal(gamma, other_gamma), step
                counts["weights"] += 1
        ours_seen.clear()
        seen.clear()
    local = shard_of(together.layers[0].mlp.down_proj.weight)
    counts["gathered as codes"] = int(local is not None and local.gathering.as_codes)
    return counts


CASES = {
    "ddp": ("ddp", "adamw", False, 0, {}),
    "ddp, muon": ("ddp", "muon", False, 0, {}),
    "fsdp, codes": ("fsdp", "adamw", True, 0, {}),
    "fsdp, codes, muon, checkpointing": ("fsdp", "muon", True, 2, {}),
    "fsdp, codes, rows": ("fsdp", "adamw", True, 0, {"granularity": "row"}),
    "fsdp, codes, groups": ("fsdp", "adamw", True, 1, {"granularity": "group", "group_size": 7}),
    "fsdp, weights": ("fsdp", "adamw", False, 0, {}),
    "fsdp, mask": ("fsdp", "adamw", True, 0, {"grad_mask": "clip"}),
}


IN_FP64 = ("ddp, muon", "fsdp, codes, muon, checkpointing")
"""Of the cases, those that make test also runs in fp64."""


@pytest.mark.parametrize(
    ("case", "double", "steps"),
    [
        *((case, False, STEPS) for case in CASES),
        *((case, True, STEPS) for case in IN_FP64),
        *(pytest.param(case, True, MANY_STEPS, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_two_processes_train_as_one(
    case: str, double: bool, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, optimizer, as_codes, every, options = CASES[case]
    if double:
        monkeypatch.setattr(bitnet.model, "rotary", rotary64)

    def work() -> Counter:
        return compare(strategy, optimizer, as_codes, every, double, steps, **options)

    first, second = on_ranks(work, 2, tmp_path)
    assert first == second
    assert first["weights"] == 7 * 3 * steps
    assert first["gathered as codes"] == (as_codes and "mask" not in case)


def test_one_process_has_shards_too(tmp_path: Path) -> None:
    """Whose scales, one per row, FSDP2 does not gather."""
    (counts,) = on_ranks(
        lambda: compare("fsdp", "adamw", True, 0, False, STEPS, granularity="row"), 1, tmp_path
    )
    assert counts["weights"] == 7 * 3 * STEPS


@pytest.mark.slow  # four processes
def test_copies_of_a_divided_model(tmp_path: Path) -> None:
    def work() -> Counter:
        return compare("hsdp", "muon", True, 0, False, MANY_STEPS)

    counts = on_ranks(work, 4, tmp_path)
    assert all(count == counts[0] for count in counts)
    assert counts[0]["weights"] == 7 * 3 * MANY_STEPS


def bytes_gathered(as_codes: bool) -> tuple[int, int]:
    """Bytes that all processes give to the gathers of a step of two micro-batches, and the number
    of weights in ternary layers."""
    gathered, plain = [0], dist.all_gather_into_tensor
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    plain = getattr(dist, name)

    def counting(output: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        gathered[0] += output.nbytes
        return plain(output, given, *args, **kwargs)

    world = world_of("fsdp")
    model = small(d_model=64, d_ff=128, n_heads=4)
    n_weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, BitLinear))
    others = sum(p.numel() for b in model.layers for p in b.parameters()) - n_weights
    root = sum(p.numel() for p in model.parameters()) - n_weights - others
    place(model, model.layers, world, lambda block: gather_codes(block, as_codes))
    tokens = torch.randint(51, (4, 17), generator=torch.Generator().manual_seed(0))
    setattr(dist, name, counting)
    with weights_quantized(model):
        for part in tokens.chunk(2):
            model(part[:, :-1], part[:, 1:]).backward()
    setattr(dist, name, plain)
    fp32 = 2 * 4 * (2 * others + root)  # norms in each forward and backward, the head once
    rows_of_head = 2 * 4 * 64  # 51 rows, padded to 52
    return gathered[0] - fp32 - rows_of_head, 2 * 2 * n_weights


@pytest.mark.parametrize(("as_codes", "bits"), [(True, 2), (False, 32)])
def test_the_bytes_that_are_gathered(as_codes: bool, bits: int, tmp_path: Path) -> None:
    for gathered, n_weights in on_ranks(lambda: bytes_gathered(as_codes), 2, tmp_path):
        assert gathered == n_weights * bits / 8
        if as_codes:
            assert gathered <= 0.15 * 2 * n_weights, "of what bf16 would take"


def orthogonalize() -> list[tuple[Tensor, Tensor]]:
    """Three updates of matrices by ShardedMuon and by Muon on one process: their values."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (12, 12), (3, 9), (1, 4), (2, 2)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    plain = [nn.Parameter(value.clone()) for value in values]
    sharded = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "original"}
    optimizers = Muon(plain, **options), ShardedMuon(sharded, **options)
    for step in range(3):
        for p, s in zip(plain, sharded, strict=True):
            if step == 1 and p.shape == (12, 12):
                p.grad = s.grad = None  # a matrix that takes no part in a step
                continue
            p.grad = torch.randn(p.shape, generator=generator)
            s.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    return [(p.detach(), whole(s.detach())) for p, s in zip(plain, sharded, strict=True)]


@pytest.mark.parametrize("n_ranks", [2, 3])  # more than some matrices have rows
def test_divided_muon_has_the_bits_of_one_process(n_ranks: int, tmp_path: Path) -> None:
    for values in on_ranks(orthogonalize, n_ranks, tmp_path):
        for plain, sharded in values:
            assert torch.equal(plain, sharded)


def scales() -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of hostile weights, quantized alone and together."""
    world = world_of("fsdp")
    found = []
    for fill in (0.0, 1e-12, 3e38, float("nan"), float("inf")):
        torch.manual_seed(1)
        model = nn.Sequential(BitLinear(6, 5), BitLinear(6, 1))
        with torch.no_grad():
            model[0].weight[0, 0] = fill
            model[1].weight.fill_(fill)
        expected = [layer.quantize() for layer in model]
        place(model, model, world, lambda layer: gather_codes(layer, True))
        weights = [layer.weight for layer in model]
        with quantized(weights):
            for weight, (_, gamma) in zip(weights, expected, strict=True):
                shard = shard_of(weight)
                assert shard is not None
                ready = shard.gathering.ready
                assert ready is not None
                assert torch.equal(ready.gamma, gamma) or bool(ready.gamma.isnan() & gamma.isnan())
        for layer, (codes, gamma) in zip(model, expected, strict=True):
            layer.unshard()
            found.append((layer.weight.quantized.codes.clone(), codes))
            read = F.linear(torch.eye(6), layer.weight)  # any other reader sees the same values
            found.append((read.nan_to_num(), (codes * gamma).t().nan_to_num()))
            layer.reshard()
    return found


def test_scales_of_hostile_weights(tmp_path: Path) -> None:
    for values in on_ranks(scales, 2, tmp_path):
        assert len(values) == 20
        for together, alone in values:
            assert torch.equal(together, alone)


def test_one_process_is_the_identity() -> None:
    world, model = World(CPU), small()
    assert parallel(model, world) is model
    assert world.maximum(3) == 3
    assert world.from_main("x") == "x"
    value = torch.tensor(2.0)
    assert world.mean(value) is value
    assert dataclasses.replace(world, rank=1).is_main is False
