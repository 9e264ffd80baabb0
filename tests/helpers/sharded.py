"""Processes that hold parts of a small model, and its state in one piece. Not a test module."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from bitnet.training.checkpoint import Checkpoint, Groups
from bitnet.training.distributed import World
from bitnet.training.state import load_optimizer, optimizer_tensors


def run_ranks(n: int, work: Callable[..., None], folder: Path, *args: Any) -> list[int | None]:
    """Run ``work(world, *args)`` on ``n`` processes in a gloo group; returns their exit codes."""
    fork = multiprocessing.get_context("fork")  # torch is imported already
    store = folder / f"store-{time.monotonic_ns()}"
    processes = [
        fork.Process(target=_rank, args=(rank, n, store, work, args), daemon=True)
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _rank(rank: int, n: int, store: Path, work: Callable[..., None], args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), n), rank=rank, world_size=n)
    work(World(torch.device("cpu"), rank, n), *args)
    dist.destroy_process_group()


class Odd(nn.Module):
    """A language model whose dimensions no number of processes divides, with a matrix of one row
    (so that some processes hold none of it), a tied weight and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 1, bias=False)])
        self.norm = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm * (x + self.layers[1](self.layers[0](x).relu()))
        self.steps += 1
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


Trained = tuple[Odd, list[torch.optim.Optimizer]]


def build(prepare: Callable[[Odd], None] = lambda model: None) -> Trained:
    """The model, sharded by ``prepare``: Muon for the layers' matrices, AdamW for the rest."""
    torch.manual_seed(0)
    model = Odd()
    prepare(model)
    matrices = [layer.weight for layer in model.layers]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(
        [{"params": rest[:1]}, {"params": rest[1:], "weight_decay": 0.0}], lr=0.1, fused=True
    )
    return model, [adamw, torch.optim.Muon(matrices, lr=0.1)]


def step(trained: Trained, seed: int) -> None:
    """Two updates on random tokens."""
    model, optimizers = trained
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        tokens = torch.randint(0, 7, (4, 6), generator=generator)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def state(trained: Trained) -> tuple[Groups, list[Any]]:
    """Groups of tensors, and the optimizers' structures."""
    model, optimizers = trained
    groups: dict[str, dict[str, Tensor]] = {"model": model.state_dict(keep_vars=True)}
    structures = []
    for i, optimizer in enumerate(optimizers):
        groups[f"optimizer_{i}"], structure = optimizer_tensors(optimizer, model)
        structures.append(structure)
    return groups, structures


def restore(trained: Trained, saved: Checkpoint) -> None:
    model, optimizers = trained
    saved.read_into("model", model.state_dict())
    for i, optimizer in enumerate(optimizers):
        structure = saved.state["optimizers"][i]
        load_optimizer(optimizer, model, saved, f"optimizer_{i}", structure)


def whole(trained: Trained) -> dict[str, Any]:
    """The whole state by name, unsharded."""
    groups, structures = state(trained)
    tensors = {
        f"{group}.{name}": (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for group, named in groups.items()
        for name, t in named.items()
    }
    return tensors | {"structures": structures}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that both are equal to the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
