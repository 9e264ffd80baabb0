"""Static activation ranges where several processes train: those of all that they see together."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bitnet.qat.observers import Observer, make_observer
from bitnet.qat.prepare import prepare
from bitnet.qat.recipe import ObserverKind, Recipe

RANKS = 2
KINDS: list[ObserverKind] = ["minmax", "moving_average", "percentile", "mse"]


def observer_of(kind: ObserverKind) -> Observer:
    return make_observer(
        Recipe(weights="int", activations="static", observer=kind, percentile=90.0)
    )


def batches(rank: int) -> list[Tensor]:
    """Of rank 1 larger values; an empty batch and one that is not finite, each of one rank."""
    generator = torch.Generator().manual_seed(rank)
    seen = [(1 + 3 * rank) * torch.randn(12, 4, generator=generator) for _ in range(4)]
    seen[1] = seen[1][:0] if rank else seen[1]
    seen[2][0, 0] = torch.nan if rank else 1
    return seen


def a_model() -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe(weights="int", activations="static", observer="minmax", keep_first_last=False)
    return prepare(nn.Sequential(nn.Linear(4, 3)), recipe)


def work(rank: int, folder: Path, wrapped: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    states = {}
    for kind in KINDS:
        observer = observer_of(kind)
        for x in batches(rank):
            observer.observe(x)
        states[kind] = observer.state_dict()
    model = a_model()
    parallel = DistributedDataParallel(model) if wrapped else model
    for x in (batches(rank)[0], batches(rank)[3]):
        parallel(x).sum().backward()
    states["model"] = model[0].input_observer.state_dict()
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrapped",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # which imports the compiler
)
def test_ranges_are_those_of_all_ranks(tmp_path: Path, wrapped: bool) -> None:
    fork = multiprocessing.get_context("fork")  # torch is imported already
    processes = [  # daemons: a rank that waits for the other for ever ends with the tests
        fork.Process(target=work, args=(rank, tmp_path, wrapped), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * RANKS
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    together = [torch.cat(parts) for parts in zip(*map(batches, range(RANKS)), strict=True)]
    for kind in KINDS:
        first, second = (state[kind] for state in states)
        assert all(torch.equal(first[name], second[name]) for name in first), kind
        assert first["n_seen"] == 3
        assert first["bad"] == 1
        alone = observer_of(kind)
        if kind in ("minmax", "mse"):
            for x in together:
                alone.observe(x)
            low, high = alone.low, alone.high
        else:  # means of the ranks' ranges, averaged with a momentum of 0.99
            ranges = []
            for parts in zip(*map(batches, range(RANKS)), strict=True):
                of_ranks = []
                for x in parts:
                    one = observer_of(kind)
                    one.observe(x)
                    if one.n_seen:
                        of_ranks.append(torch.stack(one.range()))
                if all(x.isfinite().all() for x in parts):
                    ranges.append(torch.stack(of_ranks).mean(0))
            average = ranges[0]
            for new in ranges[1:]:
                average = 0.99 * average + (1 - 0.99) * new
            low, high = average
        torch.testing.assert_close(first["low"], low)
        torch.testing.assert_close(first["high"], high)
    model = a_model().train()
    for x in (together[0], together[3]):
        model(x)
    for name, value in model[0].input_observer.state_dict().items():
        assert all(torch.equal(state["model"][name], value) for state in states), name
