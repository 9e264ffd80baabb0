"""A ternary weight whose rows FSDP2 divides over processes, gathered as codes.

A layer computes with codes, so processes exchange only codes: 2 bits per weight instead of the 32
of a latent weight. FSDP2 asks a tensor what to gather and how to rebuild the whole
(``fsdp_pre_all_gather``, ``fsdp_post_all_gather``). The tensors here are

    TernaryShard    a process's rows of the latent weight, which the optimizer updates. It gives
                    its packed codes, and builds from the codes of all processes a
    GatheredWeight  the whole weight as int8 codes and scale, while the layer computes. FSDP2 frees
                    it after the forward and gathers it again for the backward.

A scale is computed over the whole tensor, with the same bits as in one process: a maximum does not
depend on the order, and the mean of the magnitudes is a sum of integers. In a block of
:func:`bitnet.bitlinear.weights_quantized`, all scales together take two small reductions
(:func:`quantized`), and each process quantizes its rows once.

With tensor parallelism FSDP2 divides a part of a matrix. The scale is still that of the whole
matrix. The reductions go over the processes with the other rows of the part, then over the
processes with the other parts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from bitnet.quant import (
    Granularity,
    Int8Backward,
    TernaryWeight,
    dequantize,
    quantize_weight,
    weight_magnitude,
)
from bitnet_kernels import pack_ternary
from bitnet_kernels.packing import codes_of
from bitnet_kernels.reference import mean_of_units, sum_of_units


class Parts(NamedTuple):
    """The parts of a matrix in tensor parallelism, of equal size."""

    group: dist.ProcessGroup
    """The processes; each has one part."""
    by_columns: bool
    """Each part has some columns, with all rows; else some rows."""


@dataclasses.dataclass
class Gather:
    """How a weight is gathered; all views of its shard have the same Gather. With tensor
    parallelism, the weight is the part of a matrix that FSDP2 divides."""

    rows: int
    """Rows of the whole weight."""
    granularity: Granularity
    group_size: int
    int8_backward: Int8Backward
    as_codes: bool
    """Gather 2-bit codes; else gather latent weights, and each process computes all codes."""
    parts: Parts | None = None
    """The parts of the matrix; None: the weight is the whole matrix."""
    ready: TernaryWeight | None = None
    """In a block of :func:`quantized`: the packed codes of this process's rows, and the scale."""

    def recipe(self) -> tuple[Granularity, int, Int8Backward]:
        """The options of :func:`bitnet.quant.quantize_weight`."""
        return self.granularity, self.group_size, self.int8_backward


class TernaryShard(Tensor):
    """A process's rows of a latent weight: float ``[n, K]``, an ordinary tensor except for the two
    methods that FSDP2 calls. Only views that FSDP2 makes to divide a weight have this class.

    Before the division, it holds a whole weight: ``nn.Parameter(TernaryShard.of(weight, gather))``.
    """

    gathering: Gather

    @classmethod
    def of(cls, weight: Tensor, gather: Gather) -> "TernaryShard":
        """The same memory as a shard."""
        with torch._C._DisableTorchDispatch():
            shard = Tensor._make_subclass(cls, weight.detach())
        shard.gathering = gather
        return shard

    def plain(self) -> Tensor:
        """The same memory as a plain Tensor."""
        with torch._C._DisableTorchDispatch():
            return Tensor._make_subclass(Tensor, self)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C._DisableTorchDispatch():
            result = func(*args, **(kwargs or {}))
        return cls.of(result, args[0].gathering) if func in _DIVIDING else result

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return this process's contribution, with equal rows on each process, and what it keeps to
        build the whole weight: the scale of the tensor.

        Arguments:
            mesh: the processes that have the other rows.
        """
        local, gather = self.plain(), self.gathering
        missing = -(-gather.rows // mesh.size()) - len(local)
        if not gather.as_codes:
            return (pad(local, (0, 0, 0, missing)),), None
        packed, gamma, _ = gather.ready or _quantize([self], mesh.get_group())[0]
        packed = pad(packed, (0, 0, 0, missing))
        if gamma.dim() == 0 or mesh.size() == 1:  # in one process FSDP2 (2.13) takes one tensor
            return (packed,), gamma
        return (packed, pad(gamma, (*(0, 0) * (gamma.dim() - 1), 0, missing))), None

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        gamma: Tensor | None,
        param_dtype: torch.dtype,
        *,
        out: "GatheredWeight | None" = None,
    ) -> tuple["GatheredWeight", tuple[Tensor, ...]] | None:
        """Build the whole weight from the :meth:`fsdp_pre_all_gather` results of all processes.

        Arguments:
            out: the weight to fill again; FSDP2 has allocated its memory.
        Returns:
            The weight and the tensors that FSDP2 frees; with ``out``, None.
        """
        rows = [part[: self.gathering.rows] for part in gathered]
        if not self.gathering.as_codes:
            made = quantize_weight(rows[0], *self.gathering.recipe())
        else:
            codes = codes_of(rows[0], self.shape[1])
            transposed = None if self.gathering.int8_backward == "none" else codes.t().contiguous()
            gamma = rows[1].clone() if gamma is None else gamma.clone()
            made = TernaryWeight(codes, gamma, transposed)
        if out is None:
            weight = GatheredWeight(made, self.gathering.group_size, param_dtype)
            return weight, tuple(t for t in (made.codes, made.transposed) if t is not None)
        whole = codes_of_gathered(out)
        assert whole is not None
        for old, new in zip(whole, made, strict=True):
            if old is not None and new is not None:
                old.data.copy_(new)  # autograd keeps them for the backward, so hide the change
        return None


_aten = torch.ops.aten
_DIVIDING = {_aten.detach.default, _aten.new_zeros.default, _aten.slice.Tensor}
"""The operators by which FSDP2 makes the divided weight."""


class GatheredWeight(Tensor):
    """A whole weight stored only as codes and scale. To autograd it is a float ``[N, K]`` that gets
    a gradient like any weight. An operation that reads it gets ``codes * gamma``.
    """

    codes: Tensor
    gamma: Tensor
    transposed: Tensor | None
    group_size: int

    @staticmethod
    def __new__(
        cls: type["GatheredWeight"], quantized: TernaryWeight, group_size: int, dtype: torch.dtype
    ) -> "GatheredWeight":
        """Make a weight from its codes and scale; ``dtype``: of the latent weight."""
        codes = quantized.codes
        weight = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        weight.codes, weight.gamma, weight.transposed = quantized
        weight.group_size = group_size
        return weight

    @property
    def quantized(self) -> TernaryWeight:
        """The codes and scale that the layer computes with."""
        return TernaryWeight(self.codes, self.gamma, self.transposed)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        parts = ["codes", "gamma", *(["transposed"] if self.transposed is not None else [])]
        return parts, (self.group_size, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> "GatheredWeight":
        group_size, dtype = context
        made = TernaryWeight(parts["codes"], parts["gamma"], parts.get("transposed"))
        return GatheredWeight(made, group_size, dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0]
        same = func in _ITSELF or (
            func is _aten.view.default and list(args[1]) == list(first.shape)
        )
        if same and isinstance(first, GatheredWeight):
            return cls(first.quantized, first.group_size, first.dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(
            GatheredWeight, GatheredWeight.dequantized, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def dequantized(self) -> Tensor:
        """``codes * gamma``: float ``[N, K]``."""
        codes, gamma, _ = self.quantized
        return dequantize(codes, gamma, self.group_size).to(self.dtype)


_ITSELF = {_aten.as_strided.default, _aten.detach.default}
"""The operators by which FSDP2 makes the gathered weight a parameter; they keep the shape."""


def codes_of_gathered(weight: Any) -> TernaryWeight | None:
    """The codes of a gathered weight; for a DTensor (tensor parallelism), the codes of this
    process's part. None for any other weight."""
    local = getattr(weight, "_local_tensor", weight)
    return local.quantized if isinstance(local, GatheredWeight) else None


def _quantize(shards: Sequence[TernaryShard], group: dist.ProcessGroup) -> list[TernaryWeight]:
    """The packed codes of each shard, and the scale of its rows, computed over the whole matrix.
    All processes call it with their shards of the same weights.

    Arguments:
        group: the processes among which the rows are divided.
    """
    means = [_Mean.of(shard) for shard in shards]
    divided = [mean for mean in means if mean is not None]
    tops = [mean.largest() for mean in divided]
    _reduce(tops, dist.ReduceOp.MAX, divided, group)
    sums = [
        sum_of_units(weight_magnitude(mean.terms), top, mean.n)
        for mean, top in zip(divided, tops, strict=True)
    ]
    _reduce(sums, dist.ReduceOp.SUM, divided, group)
    found = iter(
        mean_of_units(total, top, mean.n).reshape(mean.shape)
        for mean, top, total in zip(divided, tops, sums, strict=True)
    )
    return [
        _packed(
            quantize_weight(
                shard.plain(),
                shard.gathering.granularity,
                shard.gathering.group_size,
                gamma=None if mean is None else next(found),
            )
        )
        for shard, mean in zip(shards, means, strict=True)
    ]


class _Mean(NamedTuple):
    """The mean magnitudes of a matrix. This process has some terms of each mean."""

    terms: Tensor
    """latent ``[R, T]``: this process's T terms of each of R means"""
    n: int
    """terms of a mean on all processes together"""
    shape: tuple[int, ...]
    """shape of the scale"""
    by_rows: bool
    """Whether the processes with other rows (by FSDP2) have other terms."""
    parts: Parts | None
    """If set, the processes with other parts of the matrix have other terms."""

    @classmethod
    def of(cls, shard: TernaryShard) -> "_Mean | None":
        """The means of a shard. None if this process has all terms: per row or group, unless the
        columns are divided."""
        latent, gather, parts = shard.plain(), shard.gathering, shard.gathering.parts
        n_parts = 1 if parts is None else parts.group.size()
        columns = latent.shape[1]
        if gather.granularity == "tensor":
            n = gather.rows * columns * n_parts
            return cls(latent.reshape(1, -1), n, (), by_rows=True, parts=parts)
        if parts is None or not parts.by_columns:
            return None
        assert gather.granularity == "row", "columns of groups are never divided"
        return cls(latent, columns * n_parts, (len(latent),), by_rows=False, parts=parts)

    def largest(self) -> Tensor:
        """``max|W|`` of the terms of each mean, fp32 ``[R]``, without copying them. 0 if there are
        none. Infinite for NaN, since a maximum over processes may lose a NaN."""
        if not self.terms.shape[1]:
            return self.terms.new_zeros(len(self.terms), dtype=torch.float32)
        top = torch.maximum(self.terms.amax(-1), -self.terms.amin(-1)).float()
        return torch.where(top.isfinite(), top, torch.inf)


def _reduce(
    values: Sequence[Tensor],
    op: dist.ReduceOp.RedOpType,
    means: Sequence[_Mean],
    group: dist.ProcessGroup,
) -> None:
    """Reduce vectors over the processes that have other terms, in place and all at once."""
    over: dict[dist.ProcessGroup, list[Tensor]] = {}
    for value, mean in zip(values, means, strict=True):
        if mean.by_rows:
            over.setdefault(group, []).append(value)
        if mean.parts is not None:
            over.setdefault(mean.parts.group, []).append(value)
    for members, theirs in over.items():
        packed = torch.cat(theirs)
        dist.all_reduce(packed, op, members)
        for value, whole in zip(theirs, packed.split([len(v) for v in theirs]), strict=True):
            value.copy_(whole)


def _packed(weight: TernaryWeight) -> TernaryWeight:
    return weight._replace(codes=pack_ternary(weight.codes))


def shard_of(weight: Any) -> TernaryShard | None:
    """This process's rows of a parameter that FSDP2 divides, if those are a TernaryShard."""
    local = getattr(weight, "_local_tensor", None)
    return local if isinstance(local, TernaryShard) else None


@contextmanager
def quantized(weights: Sequence[Any]) -> Iterator[None]:
    """Quantize the rows of each weight once for all gathers in the block. The weights are DTensors
    of FSDP2 and must not change in the block. Takes two small reductions for any number of weights.
    """
    found = [(weight, shard_of(weight)) for weight in weights]
    ours = [
        (weight, shard)
        for weight, shard in found
        if shard is not None and shard.gathering.as_codes and shard.gathering.ready is None
    ]
    try:
        with torch.no_grad():
            if ours:
                group = ours[0][0].device_mesh.get_group("shard")
                shards = [shard for _, shard in ours]
                for shard, ready in zip(shards, _quantize(shards, group), strict=True):
                    shard.gathering.ready = ready
        yield
    finally:
        for _, shard in ours:
            shard.gathering.ready = None
