"""Tensor parallelism: the forward of a ternary layer whose weight is divided over processes.

The weight is a DTensor (torch.distributed.tensor). Its placement says how the layer is divided:

    Shard(0)  column-parallel: a rank has some of the rows N. It takes the whole input and gives its
              own columns of the output. The backward adds the ranks' gradients of the input.
    Shard(1)  row-parallel: a rank has some of the columns K. It takes those columns of the input.
              The ranks add their int32 sums, so that each has the whole output. The backward needs
              no communication.

The forward gives the same bits as one process. Scales are computed over the whole tensor: a maximum
does not depend on the order, and the mean of the magnitudes is a sum of integers
(:func:`bitnet_kernels.reference.clamped_mean`). int32 sums are exact. But the ranks add the input
gradients of a column-parallel layer as floats, so their rounding differs from one process.

Importing this module imports torch.distributed.tensor, which takes most of a second. Other modules
import it inside a function, after they find a DTensor (:func:`bitnet.modules.is_dtensor`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from bitnet.gathered import Parts
from bitnet.quant import (
    GradMask,
    Granularity,
    Int8Backward,
    QuantizedInput,
    TernaryWeight,
    quantize_input,
    quantize_weight,
    ternary_linear_ste,
    weight_magnitude,
)
from bitnet_kernels.reference import absmax, int8_codes, mean_of_units, sum_of_units


class Recipe(NamedTuple):
    """How a weight is quantized: the options of :func:`bitnet.quant.quantize_weight`."""

    granularity: Granularity = "tensor"
    group_size: int = 128
    int8_backward: Int8Backward = "none"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiable; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicated(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """Turn a tensor that all ranks have, or a DTensor, into a DTensor that is whole on each rank.
    The gradients of all its uses are added over the ranks in one step."""
    if not isinstance(x, DTensor):
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    # even an idle redistribution would add the gradients, once per use
    return x if x.placements[0].is_replicate() else x.redistribute(placements=[Replicate()])


def entering(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Pass a value that all ranks have to uses that differ by rank. The backward adds the ranks'
    gradients, for all uses of a DTensor together."""
    return replicated(x, mesh).to_local(grad_placements=[Partial()])


@torch.no_grad()
def quantize_weights(weights: Sequence[DTensor], recipes: Sequence[Recipe]) -> list[TernaryWeight]:
    """Quantize this rank's part of each weight by the scale of the whole weight, with the same bits
    as :func:`bitnet.quant.quantize_weight` of the whole: codes int8 of the shape of the part, and
    gamma fp32 ``[]``, or ``[n]`` or ``[n, G]`` for the n rows of the part.

    All ranks call it with the same weights. It communicates at most twice for all weights together:
    the largest magnitudes, then the sums.

    Arguments:
        weights: matrices ``[N, K]``, all on one mesh.
    Raises:
        ValueError: :func:`placement_of` rejects a weight, or a weight with one scale per group of
            columns is divided by columns.
    """
    means = [_DividedMean.of(*pair) for pair in zip(weights, recipes, strict=True)]
    divided = [mean for mean in means if mean is not None]
    tops = [mean.magnitude.amax(-1).float() for mean in divided]
    # NaN becomes infinity, since a maximum over ranks may lose a NaN
    tops = [torch.where(top.isfinite(), top, torch.inf) for top in tops]
    _reduce(tops, dist.ReduceOp.MAX, weights)
    totals = [
        sum_of_units(mean.magnitude, top, mean.n) for mean, top in zip(divided, tops, strict=True)
    ]
    _reduce(totals, dist.ReduceOp.SUM, weights)
    found = iter(
        mean_of_units(total, top, mean.n).reshape(mean.shape)
        for mean, top, total in zip(divided, tops, totals, strict=True)
    )
    return [
        quantize_weight(
            local(weight).detach(), *recipe, gamma=None if mean is None else next(found)
        )
        for weight, recipe, mean in zip(weights, recipes, means, strict=True)
    ]


class _DividedMean(NamedTuple):
    """Mean magnitudes of a weight; each rank has some of the terms."""

    magnitude: Tensor
    """``[R, T]``: T terms on this rank for each of R means"""
    n: int
    """terms of a mean on all ranks together"""
    shape: tuple[int, ...]
    """shape of the scale"""

    @classmethod
    def of(cls, weight: DTensor, recipe: Recipe) -> "_DividedMean | None":
        """The means of a weight; None if this rank has all terms of its scales."""
        placement = placement_of(weight)
        by_tensor = recipe.granularity == "tensor"
        if not (by_tensor or placement.is_shard(1)):
            return None
        if recipe.granularity == "group":
            raise ValueError(
                "granularity: 'group' rescales each group of columns and adds in fp32, so ranks "
                "with some of the columns each cannot give the bits of one process; use 'tensor' "
                "or 'row'"
            )
        magnitude = weight_magnitude(local(weight).detach())
        if by_tensor:
            return cls(magnitude.reshape(1, -1), weight.numel(), ())
        return cls(magnitude, weight.shape[1], (len(magnitude),))


def placement_of(weight: DTensor) -> Placement:
    """How a layer's weight is divided: Shard(0) or Shard(1).

    Raises ValueError for any other DTensor, such as a parameter of FSDP outside a forward.
    """
    placement = weight.placements[0]
    if weight.device_mesh.ndim > 1 or not placement.is_shard():
        raise ValueError(
            "weight: expected a DTensor with Shard(0) or Shard(1) on a mesh of one dimension, got "
            f"{list(weight.placements)}"
        )
    return placement


def parts_of(weight: DTensor) -> Parts:
    """The group by which FSDP2, dividing this rank's part of a weight, finds the other parts."""
    return Parts(weight.device_mesh.get_group(), placement_of(weight).is_shard(1))


def _reduce(
    values: Sequence[Tensor], op: dist.ReduceOp.RedOpType, weights: Sequence[DTensor]
) -> None:
    """Reduce vectors over the ranks of the weights, in place and all at once."""
    if values:
        packed = torch.cat(list(values))
        dist.all_reduce(packed, op, weights[0].device_mesh.get_group())
        for value, whole in zip(values, packed.split([len(v) for v in values]), strict=True):
            value.copy_(whole)


def shared_by_ranks(x: Tensor, weights: Sequence[Tensor]) -> Tensor | QuantizedInput:
    """:func:`bitnet.bitlinear.shared_input` for layers with these weights: quantized once if all
    are column-parallel on one mesh, else x itself."""
    first = weights[0]
    if isinstance(x, DTensor) or not isinstance(first, DTensor):
        return x
    for weight in weights:
        if not isinstance(weight, DTensor) or not placement_of(weight).is_shard(0):
            return x
        if weight.device_mesh != first.device_mesh:
            return x
    return quantize_input(x)._replace(values=replicated(x, first.device_mesh))


def sharded_linear(
    x: Tensor | QuantizedInput,
    weight: DTensor,
    bias: Tensor | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    mask: GradMask = "none",
    mask_c: float = 1.0,
    *,
    quantized: TernaryWeight | None = None,
    int8_backward: Int8Backward = "none",
) -> Tensor:
    """:func:`bitnet.quant.ternary_linear_ste` with a weight divided over ranks.

    Arguments:
        x: for a column-parallel weight the whole input, float ``[..., K]``; for a row-parallel
            weight the input columns that match the rank's part of the weight. A DTensor is
            converted to that form. A result of :func:`bitnet.quant.quantize_input` is valid only
            as the whole input.
        weight: ``[N, K]``, see :func:`placement_of`. bias: ``[N]``, a DTensor whose placement fits.
        quantized: the result of :func:`quantize_weights` for this weight.
        Others: as in :func:`bitnet.quant.ternary_linear_ste`.
    Returns:
        The rank's columns of the output of a column-parallel weight; else the whole output. A
        DTensor if x is one.
    """
    mesh, placement = weight.device_mesh, placement_of(weight)
    if quantized is None:
        (quantized,) = quantize_weights([weight], [Recipe(granularity, group_size, int8_backward)])
    if placement.is_shard(1):
        tokens = _quantize_columns(x, mesh)
    elif isinstance(x, QuantizedInput):
        tokens = x._replace(values=entering(x.values, mesh))
    else:
        tokens = quantize_input(entering(x, mesh))
    y = ternary_linear_ste(
        tokens,
        local(weight),
        None if bias is None else local(bias),
        granularity,
        group_size,
        mask,
        mask_c,
        quantized=quantized,
        int8_backward=int8_backward,
        group=mesh.get_group() if placement.is_shard(1) else None,
    )
    if not isinstance(x, DTensor):
        return y
    form = Shard(y.dim() - 1) if placement.is_shard(0) else Replicate()
    return DTensor.from_local(y, mesh, [form], run_check=False)


def whole_input(x: Tensor | QuantizedInput, weight: DTensor) -> Tensor | QuantizedInput:
    """The input of a layer with this weight, as one process would have it. For a row-parallel layer
    it gathers all columns. Not differentiable. All ranks call it."""
    if isinstance(x, QuantizedInput) or not placement_of(weight).is_shard(1):
        return x
    form = [Shard(x.dim() - 1)]
    return DTensor.from_local(x, weight.device_mesh, form, run_check=False).full_tensor()


def _quantize_columns(x: Tensor | QuantizedInput, mesh: DeviceMesh) -> QuantizedInput:
    """Quantize this rank's columns of each token by the maximum over all columns of the token."""
    if isinstance(x, QuantizedInput):
        raise TypeError(
            "input: expected a tensor, since a row-parallel layer takes the scale of a token over "
            "all ranks"
        )
    values = local(x.redistribute(placements=[Shard(x.dim() - 1)]) if isinstance(x, DTensor) else x)
    with torch.no_grad():
        wide = values.float()
        top = absmax(wide)
        top = torch.where(top.isfinite(), top, torch.inf)  # a maximum over ranks may lose a NaN
        dist.all_reduce(top, dist.ReduceOp.MAX, mesh.get_group())
        return QuantizedInput(values, *int8_codes(wide, top))
