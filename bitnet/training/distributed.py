"""The processes that train one model: their ranks, and the operations that they do together.

torchrun starts them and sets each one's rank in the environment (:class:`Launch`). Each takes its
share of every batch. A wrapper around the model averages the gradients, and :class:`World` averages
the loss. Decisions (skip a step that is not finite, stop on a signal) use one number that is the
same on all processes. The main process, rank 0, prepares data and writes files.

With ``tensor_parallel = N``, groups of N processes act as one for the data: they divide the
matrices of each layer (:mod:`bitnet.training.tensor_parallel`) and take the same share of the
batch. The processes then form a mesh, data x tensor. Its last dimension holds neighbours by rank,
on one machine, where the exchanges of each layer are fast. FSDP2 averages the gradients of the
groups. For ddp FSDP2 divides nothing; it is used because DistributedDataParallel cannot take
weights that are already divided.

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
"""Seconds in which each process reports that it, too, waited for another without an answer."""
_MAIN_SPEAKS = 10.0
"""Seconds after which a process reports a mistake that the main one should have reported."""


@dataclass(frozen=True, config=STRICT)
class DistributedConfig:
    """The ``[distributed]`` section: how several processes train one model."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: a whole model per process; fsdp: weights, gradients and optimizer state divided over all
    processes; hsdp: divided within each machine, one copy per machine; auto: ddp up to 1B
    parameters, else fsdp"""
    shard_size: Count = 0
    """hsdp: processes over which one model is divided; 0 = the processes of a machine"""
    gather: Literal["codes", "weights"] = "codes"
    """what fsdp and hsdp gather for ternary weights: "codes" (2 bits per weight) or latent
    "weights" (32 bits); the results are the same"""
    tensor_parallel: Positive = 1
    """processes (neighbours by rank) per group that divides the matrices of each layer and takes
    the same sequences; strategy says how the groups train one model. Must divide the number of
    processes, model.n_heads, model.n_kv_heads and model.d_ff"""
    activation_checkpointing: Count = 0
    """every n-th block keeps only its input for the backward, which recomputes the rest; 0 = none,
    1 = all, which takes a third more time per step"""
    timeout: Annotated[int, Field(ge=1, le=365 * 24 * 3600)] = 600
    """seconds that a process waits for the others in a step before the run ends; at the start at
    least 600"""


class Launch(NamedTuple):
    """This process's place among all, as set by torchrun; without torchrun, the only process."""

    rank: int = 0
    """The number of this process in the run, from 0."""
    size: int = 1
    """The number of processes."""
    local_rank: int = 0
    """The number of this process on this machine, from 0."""
    local_size: int = 1
    """The number of processes on this machine."""

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

        Raises:
            UserError: some are missing, or one is not a number.
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
        """The command that started this run, for display.

        Arguments:
            words: the words after Python's name, ``sys.orig_argv[1:]``.
        """
        words = words[1:] if words[0] == "-u" else words  # torchrun adds it
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
            UserError: ``name`` is one GPU for several processes, or there are too few GPUs.
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
    """This process among all processes of a run.

    Several processes need an initialized process group of torch.distributed.
    """

    device: torch.device
    """The device of this process."""
    rank: int = 0
    """The number of this process, from 0."""
    size: int = 1
    """The number of processes."""
    mesh: "DeviceMesh | None" = None
    """The mesh of processes over which parameters are sharded; None if they are not. Its dimensions
    are some of "replicate" and "shard" (FSDP2), and "tensor" (tensor parallelism)."""
    store: Any = None
    """The key-value store of the process group (``torch.distributed.Store``)."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    @property
    def tensor_parallel(self) -> int:
        """How many processes divide the matrices of each layer and take the same sequences."""
        if self.mesh is None or TENSOR not in _dims(self.mesh):
            return 1
        return self.mesh.size(_dims(self.mesh).index(TENSOR))

    @property
    def data_size(self) -> int:
        """Number of shares of a batch: one per process, or per group of tensor parallelism."""
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
        """The sum over the shares of a batch, on each process. Processes with the same share have
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
        """The largest number of all processes, on each process."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self.device, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def from_main(self, value: _T) -> _T:
        """The main process's value (anything picklable), on each process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all processes call this, at most ``distributed.timeout`` seconds."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Run a block on the main process first, then on the others. They wait without a limit:
        preparing data may take hours.

        Arguments:
            what: the block's name, unique in the run.
        """
        if self.size > 1 and not self.is_main:
            while not self.store.check([what]):  # waiting in the store would block signals
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
    """Join the processes of a run in a process group for the block: NCCL on GPUs (and gloo for CPU
    tensors), gloo on CPUs. One process makes no group, unless its strategy divides weights.

    Arguments:
        strategy: the chosen one if ``config`` says "auto".
        facts: name -> value of everything that must be the same on all processes
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
    """All processes as the mesh of :class:`World`. fsdp: one dimension. hsdp: copies x parts of a
    copy. Tensor parallelism adds a last dimension. None: each process has a whole model."""
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
    """Name the missing processes after a failed exchange: those that do not report within
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
    """Report a mistake of all processes only once: the others wait a moment, in which torchrun ends
    them, before they report it with their rank."""
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
    """Move a model to this process's device: the whole model, or this process's part of it. The
    model is divided by tensor parallelism (only a :class:`bitnet.model.Transformer`), then FSDP2.

    Each block is gathered before it computes and freed after it, in the forward and again in the
    backward. Other parameters, such as embeddings, stay from the forward to the backward. Weights
    are gathered, and gradients averaged, in their own dtype. Autocast casts after the gather, so
    the numbers are the same as in one process.

    Arguments:
        blocks: the parts to gather one after the other.
        prepare: called on each block before it is divided.
    """
    if world.mesh is None:
        model.to(world.device)
        return
    if world.tensor_parallel > 1:
        from bitnet.model import as_transformer
        from bitnet.training.tensor_parallel import tensor_parallel

        # torch warns, on each process, of two exchanges where one would do
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
    """Return a model from :func:`place`, ready to train. If several processes each have it whole,
    it is wrapped so that each backward averages the gradients. Otherwise it is returned unchanged.

    Arguments:
        idle_parameters: some parameters may be missing from a step's graph, such as scales of
            quantizers that do not quantize yet.
    """
    if world.size == 1 or world.mesh is not None:
        return model
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=idle_parameters
    )


@contextmanager
def exchange(model: nn.Module, last: bool) -> Iterator[None]:
    """Wrap the forward and the backward of a micro-batch. The ``last`` micro-batch of a step
    averages gradients over the processes; the others only accumulate them."""
    if isinstance(model, DistributedDataParallel):
        with nullcontext() if last else model.no_sync():
            yield
        return
    if (set_sync := getattr(model, "set_requires_gradient_sync", None)) is not None:  # FSDP2
        set_sync(last)
    yield


def recompute(blocks: Iterable[nn.Module], every: int) -> None:
    """Make every n-th block, from the first on, keep only its input for the backward, which then
    recomputes the block; 0 = none. Call before :func:`place`."""
    for block in list(blocks)[::every] if every else ():
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is divided over processes, on each of them; return any other tensor
    unchanged. All processes call it."""
    if (gather := getattr(tensor, "full_tensor", None)) is None:
        return tensor
    gathered: Tensor = gather()
    return gathered
