"""Plan which process writes which parts of which tensors, and read the parts back.

With several processes, a tensor of the model may be whole on each (DDP, buffers), or a DTensor of
which each holds a part (FSDP2, tensor parallelism). PyTorch's distributed checkpoint (DCP) plans
the writing: every part once, the whole tensors divided evenly. The format is ours: safetensors and
a list of their contents (:data:`Contents`). DCP's own list is a pickle, and loading it executes
code. DCP's safetensors storage has no such list, so a missing part leaves a tensor unchanged; it
also casts dtypes silently and rejects strided tensors.

Reading follows the list. It gives each process the parts that it holds now, for any number of
processes and any sharding at the time of writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from torch import Tensor, nn

from bitnet.schema import STRICT, Count

Groups = Mapping[str, Mapping[str, Tensor]]
"""Group (an identifier: it names files) -> name -> tensor."""
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of dtypes."""


@dataclass(frozen=True, config=STRICT)
class Chunk:
    """A part of a tensor, under the tensor's name in a file."""

    file: str
    offsets: list[Count]
    """Where the part begins in the whole tensor."""
    sizes: list[Count]


@dataclass(frozen=True, config=STRICT)
class Stored:
    """A tensor on disk."""

    dtype: str
    """safetensors' name, a key of :data:`_DTYPES`."""
    shape: list[Count]
    chunks: list[Chunk]

    def zeros(self, like: Tensor | None) -> Tensor:
        """Memory to read the tensor into: sharded like ``like`` if that has the same shape, else
        whole, on the CPU."""
        dtype = _DTYPES[self.dtype]
        if like is not None and self.shape and list(like.shape) == self.shape:
            return torch.zeros_like(like, dtype=dtype, requires_grad=False)
        return torch.zeros(self.shape, dtype=dtype, device="cpu")


Contents = dict[str, dict[str, Stored]]
"""Group -> name -> where the tensor is."""
Headers = dict[str, dict[str, tuple[str, list[int]]]]
"""File -> name -> dtype and shape in the file."""


class Plan(NamedTuple):
    """The tensors that a save writes."""

    mine: dict[str, dict[str, Tensor]]
    """Group -> name -> the plain tensor that this process writes; it may be memory in use."""
    contents: Contents
    """The contents of all processes."""


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor. Does not import DTensor, which takes a second."""
    return hasattr(tensor, "to_local")


def plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its class hides its memory (as one for FSDP's all-gather does)."""
    return tensor if type(tensor) in (Tensor, nn.Parameter) else copied(tensor)


def copied(tensor: Tensor) -> Tensor:
    """A plain copy in CPU memory."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())


def local_parts(groups: Groups) -> dict[str, dict[str, Tensor]]:
    """The parts that the only process of a run writes: every tensor, whole."""
    return {
        group: {name: plain(t.to_local() if is_sharded(t) else t) for name, t in named.items()}
        for group, named in groups.items()
    }


def file_name(group: str, rank: int) -> str:
    """The name of the file for one process's parts of ``group``, among several processes."""
    return f"{group}.{rank:05d}.safetensors"


def plan(groups: Groups, rank: int, exchange: Callable[[Any], list[Any]]) -> Plan:
    """Divide the writing among the processes. All of them call it.

    A tensor that is not a DTensor must be equal on all processes; any of them may write it.

    Arguments:
        exchange: gives the values of all processes, by rank, to each process.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    flat = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(flat, is_coordinator=rank == 0)
    plans, _ = planner.create_global_plan(exchange(planner.create_local_plan()))
    names = {dtype: name for name, dtype in _DTYPES.items()}
    contents: Contents = {group: {} for group in groups}
    for writer, part in enumerate(plans):
        for item in part.items:
            group, _, name = item.index.fqn.partition("/")
            data = item.tensor_data
            assert data is not None, "only tensors are planned"
            stored = contents[group].setdefault(
                name, Stored(names[data.properties.dtype], list(data.size), [])
            )
            sizes = list(data.chunk.sizes)
            chunk = Chunk(file_name(group, writer), list(data.chunk.offsets), sizes)
            stored.chunks.append(chunk)
    mine: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for item in planner.finish_plan(plans[rank]).items:
        group, _, name = item.index.fqn.partition("/")
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        mine[group][name] = plain(tensor)
    return Plan(mine, contents)


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and shape of the tensors in a safetensors file, without reading their values.

    Raises:
        SafetensorError, OSError: unreadable, or not a safetensors file (the file must hold exactly
            what its header declares).
    """
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def whole_files(groups: Mapping[str, str], headers: Headers) -> Contents:
    """The contents of files that hold whole tensors.

    Arguments:
        groups: group -> its file.
    """
    return {
        group: {
            name: Stored(dtype, shape, [Chunk(file, [0] * len(shape), shape)])
            for name, (dtype, shape) in headers[file].items()
        }
        for group, file in groups.items()
    }


def check(contents: Contents, headers: Headers) -> None:
    """Compare a list of contents with the files.

    This ensures that no tensor is larger than the data in the files, and none misses a part.

    Raises:
        ValueError: they differ.
    """
    for group, named in contents.items():
        for name, stored in named.items():
            if stored.dtype not in _DTYPES:
                raise ValueError(f"{group}: {name!r}: unknown dtype {stored.dtype!r}")
            shape, found = stored.shape, 0
            for chunk in stored.chunks:
                if headers.get(chunk.file, {}).get(name) != (stored.dtype, chunk.sizes):
                    raise ValueError(f"{group}: {name!r}: is not in {chunk.file!r} as described")
                if len({len(shape), len(chunk.offsets), len(chunk.sizes)}) > 1 or any(
                    offset + size > whole
                    for offset, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
                ):
                    raise ValueError(f"{group}: {name!r}: a part lies outside of it")
                found += prod(chunk.sizes)
            if found != prod(shape) or not stored.chunks:
                raise ValueError(f"{group}: {name!r}: {found} of {prod(shape)} numbers are there")


@torch.no_grad()
def read_into(
    folder: Path, stored: Mapping[str, Stored], targets: Iterable[tuple[str, Tensor]]
) -> None:
    """Fill tensors in place, on each process its own parts, without communication.

    Arguments:
        targets: (name in the files, tensor) pairs; whole or sharded, on any device.
    Raises:
        ValueError: a tensor is missing, or has another shape or dtype.
        SafetensorError, OSError: a file has changed.
    """
    pieces: dict[str, list[tuple[str, tuple[slice, ...], Tensor]]] = {}
    for name, target in targets:
        if name not in stored:
            raise ValueError(f"{name!r} is not in it")
        there = stored[name].dtype, stored[name].shape
        if (_DTYPES[there[0]], there[1]) != (target.dtype, list(target.shape)):
            raise ValueError(
                f"{name!r} is {there[0]} {there[1]} there and {target.dtype} "
                f"{list(target.shape)} here"
            )
        for file, part, into in _pieces(name, stored[name], target):
            pieces.setdefault(file, []).append((name, part, into))
    for file, parts in pieces.items():
        with safe_open(folder / file, "pt") as opened:
            for name, part, into in parts:
                into.copy_(opened.get_slice(name)[part])


def _pieces(
    name: str, stored: Stored, target: Tensor
) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """Yield the file, the slice of its part, and the slice of ``target`` that it fills."""
    if not is_sharded(target):
        for chunk in stored.chunks:
            if prod(chunk.sizes):
                where = _slices(chunk.offsets, chunk.sizes)
                yield chunk.file, _slices([0] * len(where), chunk.sizes), target.detach()[where]
        return

    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks = [c for c in stored.chunks if prod(c.sizes)]
    saved = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks]
    properties = TensorProperties(dtype=target.dtype)
    metadata = Metadata({name: TensorStorageMetadata(properties, target.shape, saved)})
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({name: target}, metadata)
    for item in planner.create_local_plan().items:
        index = item.storage_index.index
        assert index is not None
        into = planner.resolve_tensor(item).detach()
        yield chunks[index].file, _slices(item.storage_offsets, item.lengths), into


def _slices(offsets: list[int] | torch.Size, sizes: list[int] | torch.Size) -> tuple[slice, ...]:
    return tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))
