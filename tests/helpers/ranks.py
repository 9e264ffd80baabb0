"""Runs a function in several processes that form a gloo group. Not a test module."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DTensor imports it, which takes 3 s: once here, not in every process
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from bitnet.training.distributed import DistributedConfig, Launch, Strategy, World, mesh_of


def world_of(strategy: Strategy, tensor_parallel: int = 1) -> World:
    """This process of a group, with a strategy's mesh; hsdp: copies over two processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    config = DistributedConfig(
        shard_size=2 if strategy == "hsdp" else 0, tensor_parallel=tensor_parallel
    )
    device, launch = torch.device("cpu"), Launch(rank, size, rank, size)
    mesh = mesh_of(config, strategy, launch, device)
    return World(device, rank, size, mesh, _get_default_store())


def on_ranks(
    work: Callable[..., Any], n_ranks: int, folder: Path, *args: Any, timeout: float = 120
) -> list[Any]:
    """The results of ``work(*args)`` on each rank, in a group of ``n_ranks`` forked processes.

    They have one thread each. If one fails, its traceback is the error and the others are killed.
    After ``timeout`` seconds all are killed.
    """
    fork = multiprocessing.get_context("fork")  # torch is imported already
    processes = [
        fork.Process(target=_join, args=(work, rank, n_ranks, folder, args))
        for rank in range(n_ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in processes):
            failed = any(process.exitcode for process in processes)
            if failed or time.monotonic() > end:
                break
            processes[0].join(0.05)
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if errors := sorted(folder.glob("error-*")):
        raise AssertionError(errors[0].read_text())
    assert all(process.exitcode == 0 for process in processes), "a rank died or did not end"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def _join(
    work: Callable[..., Any], rank: int, n_ranks: int, folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork: it would wait for them
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), n_ranks),
            rank=rank,
            world_size=n_ranks,
            timeout=timedelta(seconds=60),
        )
        torch.save(work(*args), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        partial = folder / f"partial-{rank}"  # the others fail because this one did: say so first
        partial.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        partial.rename(folder / f"error-{time.monotonic_ns()}-{rank}")
        os._exit(1)
