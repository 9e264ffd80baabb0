"""The processes that train one model: which one this is, and what they compute together.

torchrun starts them, and says in the environment which is which (:class:`Launch`). Each takes its
share of every batch. A wrapper around the model averages the gradients, and :class:`World` the
loss; what is decided by a number (a step that is not finite, a signal to stop) is decided from one
number that all of them have. The main process, of rank 0, prepares data and writes files.

With ``tensor_parallel = N``, N processes are one to the data: they divide the matrices of each
layer (:mod:`bitnet.training.tensor_parallel`) and take the same share of the batch. The processes
are then a mesh, data x tensor, whose last dimension are neighbours by rank: on one machine, where
the exchanges of each layer are fast. The gradients of the groups are averaged by FSDP2. For ddp it
divides nothing: DistributedDataParallel takes no weights that are divided already.

With one process, everything here is the identity and no process group is made.
"""

import dataclasses
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bitnet.schema import STRICT, Count, Positive, UserError
from bitnet.training import start
from bitnet.training.start import POLL

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_T = TypeVar("_T")
Strategy = Literal["ddp", "fsdp", "hsdp"]
TENSOR = "tensor"
"""The dimension of a mesh over which tensor parallelism divides the matrices."""
_ANSWER = 5.0
"""Seconds in which each process says that it, too, waited in vain for another."""
_MAIN_SPEAKS = 10.0
"""Seconds after which a process reports a mistake that the main one should have reported."""


@dataclass(frozen=True, config=STRICT)
class DistributedConfig:
    """The ``[distributed]`` section: how several processes train one model."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: a whole model per process; fsdp: weights, gradients and optimizer state divided over all
    processes; hsdp: divided over those of a machine, and so on each machine; auto: ddp up to 1B
    parameters, else fsdp"""
    shard_size: Count = 0
    """hsdp: processes over which one model is divided; 0 = those of a machine"""
    gather: Literal["codes", "weights"] = "codes"
    """what fsdp and hsdp gather of ternary weights: codes, 2 bits each, or latent weights, 32; the
    numbers are the same"""
    tensor_parallel: Positive = 1
    """processes, neighbours by rank, that divide the matrices of each layer and take the same
    sequences; strategy is how such groups train one model. Divides the number of processes,
    model.n_heads, model.n_kv_heads and model.d_ff"""
    activation_checkpointing: Count = 0
    """every n-th block keeps only its input for the backward, which computes the rest again; 0 =
    none, 1 = all, with a third more time per step"""
    timeout: Annotated[int, Field(ge=1, le=365 * 24 * 3600)] = 600
    """seconds that a process waits for the others in a step before the run ends; at the start it
    waits 600 if this is less"""


class Launch(NamedTuple):
    """What torchrun says of this process; without torchrun, that it is the only one."""

    rank: int = 0
    """Its number, from 0, among all of the run."""
    size: int = 1
    """The number of processes."""
    local_rank: int = 0
    """Its number among those of this machine."""
    local_size: int = 1
    """The number of processes of this machine."""

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

        Raises:
            UserError: some are missing, or one is no number.
        """
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        values = [os.environ.get(name) for name in names]
        if not any(value is not None for value in values[:2]):
            return cls()
        for name, value in zip(names, values, strict=True):
            if value is None or not value.isdecimal():
                raise UserError(
                    f"{name} = {value!r} in the environment: torchrun sets all of "
                    f"{', '.join(names)}; start train.py with it, or unset them"
                )
        return cls(*(int(value) for value in values if value is not None))

    def command(self, words: list[str]) -> str:
        """The command that started this run, to be shown.

        Arguments:
            words: after Python's name, ``sys.orig_argv[1:]``.
        """
        words = words[1:] if words[0] == "-u" else words  # torchrun's
        if Path(words[0]).name == "bitnet":
            return shlex.join(["bitnet", *words[1:]])
        start = ["python"]
        if self.size > 1:
            start = ["torchrun", "--nproc-per-node", str(self.local_size)]
            if (machines := self.size // self.local_size) > 1:
                start += ["--nnodes", str(machines)]
        return shlex.join([*start, *words])

    def device_name(self, name: str) -> str:
        """``train.device`` for this process: each process of a machine has its own GPU.

        Raises:
            UserError: ``name`` is one GPU for several processes, or there are fewer than processes.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise UserError(
                f"train.device = {name!r} is one device for {self.local_size} processes; "
                '"cuda" gives each its own'
            )
        if (n_gpus := torch.cuda.device_count()) < self.local_size:
            raise UserError(
                f"{self.local_size} processes on this machine, {n_gpus} GPUs: start torchrun with "
                f"--nproc-per-node {n_gpus}, or set train.device = cpu"
            )
        return f"cuda:{self.local_rank}"


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all of a run.

    More than one need an initialized process group of torch.distributed.
    """

    device: torch.device
    """The device of this process."""
    rank: int = 0
    """The number of this process, from 0."""
    size: int = 1
    """The number of processes."""
    mesh: "DeviceMesh | None" = None
    """The processes as a mesh, where parameters are sharded over it; else None. Its dimensions are
    named: "replicate" and "shard" (FSDP2), "tensor" (tensor parallelism), each if there."""
    store: Any = None
    """The key-value store of the process group (``torch.distributed.Store``)."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the console."""
        return self.rank == 0

    @property
    def tensor_parallel(self) -> int:
        """Processes that divide the matrices of each layer, and take the same sequences."""
        if self.mesh is None or TENSOR not in _dims(self.mesh):
            return 1
        return self.mesh.size(_dims(self.mesh).index(TENSOR))

    @property
    def data_size(self) -> int:
        """Shares of a batch: one for each process, or for each group of tensor parallelism."""
        return self.size // self.tensor_parallel

    @property
    def data_rank(self) -> int:
        """The share of this process, from 0."""
        return self.rank // self.tensor_parallel

    def share(self, batch: Tensor) -> Tensor:
        """The rows of a whole batch that this process trains on: ``[B, ...]`` ->
        ``[B / data_size, ...]``, on its device."""
        assert len(batch) % self.data_size == 0, "the processes' shares of a batch are equal"
        return batch.chunk(self.data_size)[self.data_rank].to(self.device)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the shares of a batch, on each process."""
        return value if self.data_size == 1 else self.sum(value) / self.data_size

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the shares of a batch, on each process. Those that have the same share have
        the same value, which counts once."""
        if self.data_size == 1:
            return value
        total = value.clone()
        if self.mesh is None or self.tensor_parallel == 1:
            dist.all_reduce(total)
        else:
            for name in data_dims(self.mesh):
                dist.all_reduce(total, group=self.mesh.get_group(name))
        return total

    def maximum(self, number: int) -> int:
        """The largest of the processes' numbers, on each of them."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self.device, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def from_main(self, value: _T) -> _T:
        """The main process's value (anything that pickles), on each process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all processes are here, at most ``distributed.timeout`` seconds."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Run a block on the main process, and after it on the others, which wait without a limit:
        preparing data may take hours.

        Arguments:
            what: names the block, once per run.
        """
        if self.size > 1 and not self.is_main:
            while not self.store.check([what]):  # waiting in the store would keep signals out
                time.sleep(POLL)
        yield
        if self.size > 1 and self.is_main:
            self.store.set(what, "done")


@contextmanager
def joined(
    config: DistributedConfig,
    strategy: Strategy,
    launch: Launch,
    device: torch.device,
    facts: Mapping[str, str],
) -> Iterator[World]:
    """The processes of a run within the block, in a process group: NCCL on GPUs (and gloo for what
    is on the CPU), gloo on CPUs. One process makes none, unless its strategy divides weights.

    Arguments:
        strategy: chosen, where ``config`` says "auto".
        facts: name -> value of what has to be the same on all processes
            (:func:`bitnet.training.start.facts_of`).
    Raises:
        UserError: the processes do not find each other or differ in a fact, or one ended or did not
            answer for ``timeout`` seconds; the error names it. (NCCL's watchdog ends a process
            itself.)
    """
    if launch.size == 1 and strategy == "ddp":
        yield World(device)
        return
    timeout = timedelta(seconds=config.timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store: Any = HashStore()
        rank, size = 0, 1
        if launch.size > 1:
            limit = max(start.LIMIT, config.timeout)
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=limit)))
            store = PrefixStore(start.name_start(store, rank, size, limit), store)
            start.agree(store, rank, size, facts, limit)
            store.set_timeout(timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(f"rank {launch.rank} of {launch.size} found no others: {error}") from error
    try:
        mesh = mesh_of(config, strategy, launch, device)
        world = World(device, rank, size, mesh, PrefixStore("run", store))
        yield world
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(f"{_missing(world)} ({str(error).splitlines()[0]})") from error
    finally:
        dist.destroy_process_group()


def mesh_of(
    config: DistributedConfig, strategy: Strategy, launch: Launch, device: torch.device
) -> "DeviceMesh | None":
    """All processes as the mesh of :class:`World`: for fsdp of one dimension, for hsdp of copies
    and parts of them, each with tensor parallelism as the last. None: whole models."""
    tensor = config.tensor_parallel
    data = launch.size // tensor
    shape = {"shard": data}
    if strategy == "hsdp":
        shard_size = config.shard_size or max(1, launch.local_size // tensor)
        if data % shard_size:
            groups = "processes" if tensor == 1 else f"groups of {tensor} processes"
            raise UserError(
                f"distributed.shard_size = {shard_size} does not divide {data} {groups}; the "
                f"nearest that does: {math.gcd(shard_size, data)}"
            )
        shape = {"replicate": data // shard_size, "shard": shard_size}
    elif strategy == "ddp":
        shape = {"replicate": data, "shard": 1} if data > 1 else {}
    if tensor > 1:
        shape |= {TENSOR: tensor}
    elif strategy == "ddp":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def _dims(mesh: "DeviceMesh") -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


def data_dims(mesh: "DeviceMesh") -> tuple[str, ...]:
    """The dimensions over which the batch is divided."""
    return tuple(name for name in _dims(mesh) if name != TENSOR)


def _missing(world: World) -> str:
    """Who is missing, in words, after an exchange failed: those that do not say within
    :data:`_ANSWER` seconds that it failed for them too."""
    deadline = time.monotonic() + _ANSWER
    world.store.set(f"failed/{world.rank}", "")
    missing = set(range(world.size)) - {world.rank}
    while missing and time.monotonic() < deadline:
        time.sleep(POLL)
        missing = {rank for rank in missing if not world.store.check([f"failed/{rank}"])}
    if not missing:
        return "an exchange between the processes failed, though all of them are there"
    names = ", ".join(map(str, sorted(missing)))
    return f"rank {names} of {world.size} ended or hangs: the others waited for it in vain"


@contextmanager
def one_report(launch: Launch) -> Iterator[None]:
    """Have a mistake that all processes find reported once: others than the main one wait a moment,
    in which torchrun ends them, and name their rank."""
    try:
        yield
    except UserError as error:
        if launch.rank == 0:
            raise
        time.sleep(_MAIN_SPEAKS)
        raise UserError(f"rank {launch.rank}: {error}") from error


def place(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    prepare: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Bring a model to the device of this process: whole, or this process's part of it (tensor
    parallelism, which needs a :class:`bitnet.model.Transformer`, then FSDP2).

    Each block is gathered before it computes and freed after it, in the forward and again in the
    backward. What is left, such as embeddings, stays from the forward to the backward. Weights are
    gathered in their own dtype and gradients averaged in it: autocast casts after the gather, so
    the numbers are those of one process.

    Arguments:
        blocks: the parts to gather one after the other.
        prepare: what to do to a block before it is divided.
    """
    if world.mesh is None:
        model.to(world.device)
        return
    if world.tensor_parallel > 1:
        from bitnet.model import as_transformer
        from bitnet.training.tensor_parallel import tensor_parallel

        # torch warns, on each process, of two exchanges where it takes one more than it might
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        tensor_parallel(as_transformer(model), world.mesh[TENSOR])
    if not (dims := data_dims(world.mesh)):
        model.to(world.device)
        return
    from torch.distributed.fsdp import fully_shard

    mesh = world.mesh[dims]
    for block in blocks:
        block.to(world.device)
        prepare(block)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallel(model: nn.Module, world: World, idle_parameters: bool = False) -> nn.Module:
    """The model to train, from :func:`place`: where it is whole on each of several processes,
    wrapped so that each backward averages the gradients; else itself.

    Arguments:
        idle_parameters: some may be in no step's graph, such as scales of quantizers that do not
            quantize yet.
    """
    if world.size == 1 or world.mesh is not None:
        return model
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=idle_parameters
    )


@contextmanager
def exchange(model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and the backward of a micro-batch: after the ``last`` of a step gradients
    are averaged over the processes, after others they only accumulate."""
    if isinstance(model, DistributedDataParallel):
        with nullcontext() if last else model.no_sync():
            yield
        return
    if (set_sync := getattr(model, "set_requires_gradient_sync", None)) is not None:  # FSDP2
        set_sync(last)
    yield


def recompute(blocks: Iterable[nn.Module], every: int) -> None:
    """Have every n-th block, from the first on, keep only its input for the backward, which then
    computes the block again; 0 = none. Call before :func:`place`."""
    for block in list(blocks)[::every] if every else ():
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is divided over processes, gathered on each; any other as it is. All processes
    call it."""
    if (gather := getattr(tensor, "full_tensor", None)) is None:
        return tensor
    gathered: Tensor = gather()
    return gathered
