"""Tensor parallelism: the matrices of each layer divided over the ranks of a mesh.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("shard", "tensor"))
    tensor_parallel(model, mesh["tensor"])     # in place; afterwards, over the other dimension:
    for block in model.layers:
        gather_codes(block, as_codes=True)     # 2-bit codes; without it fp32 weights are gathered
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])

With ``distributed.tensor_parallel = N`` train.py does this (:func:`bitnet.training.distributed
.place`). A rank has whole attention heads and some of the MLP's channels:

    q, k, v, gate, up   column-parallel: their rows are divided; the input is whole
    o, down             row-parallel: their columns are divided; the output is whole
    norms before those  (sub_norm, in_linear) have a rank's channels of all tokens, and need all
                        channels of a token: the ranks exchange, each normalizes some of the tokens,
                        and they exchange back
    the rest            the same on every rank: embedding, head, other norms, the residual stream

The forward gives the same bits as one process, for any number of ranks: products and scales are
exact (:mod:`bitnet.sharded`), and an exchange moves values without adding any. Gradients are added
over the ranks, so their rounding differs.

Every parameter becomes a DTensor on the mesh, even if each rank has all of it (``Replicate``):
an optimizer's fused step and the clipping of gradients cannot mix DTensors and plain tensors.

For another model, give the styles :class:`ColwiseBitLinear` and :class:`RowwiseBitLinear` to
torch's ``parallelize_module``. They install no hooks, so layers still share their quantized input.
torch's ``ColwiseParallel`` and ``RowwiseParallel`` divide a BitLinear without a norm too.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from bitnet.bitlinear import BitLinear
from bitnet.elementwise import RMSNorm, rms_norm
from bitnet.model import Transformer, check_divides
from bitnet.schema import UserError
from bitnet.sharded import entering


class ColwiseBitLinear(ParallelStyle):
    """Divide the rows of a BitLinear's weight, and its bias, over the ranks. The layer takes the
    whole input and gives the rank's columns of the output.

    Raises ValueError for any other module, or for rows that cannot be divided equally.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _bitlinear(module)
        _check_equal("out_features", layer.out_features, device_mesh)
        _distribute(layer, device_mesh, self.src_data_rank, weight=Shard(0), bias=Shard(0))
        if layer.rms_norm is not None:
            parallelize_module(layer.rms_norm, device_mesh, Replicated(WholeRMSNorm))
        return layer


class RowwiseBitLinear(ParallelStyle):
    """Divide the columns of a BitLinear's weight over the ranks. The layer takes the rank's columns
    of the input and gives the whole output.

    Raises ValueError for any other module, for columns that cannot be divided equally, or for
    granularity "group".
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _bitlinear(module)
        _check_equal("in_features", layer.in_features, device_mesh)
        if layer.granularity == "group":
            raise ValueError(
                "granularity: the columns of 'group' cannot be divided; use 'tensor' or 'row'"
            )
        _distribute(layer, device_mesh, self.src_data_rank, weight=Shard(1), bias=Replicate())
        if layer.rms_norm is not None:
            parallelize_module(layer.rms_norm, device_mesh, Replicated(ChannelRMSNorm))
        return layer


class Replicated(ParallelStyle):
    """Keep a module's parameters on every rank, as DTensors, but compute with plain tensors.

    Arguments:
        kind: the class that does so; the module's class is changed to it (as FSDP does).
    """

    def __init__(self, kind: "type[_Replica]") -> None:
        super().__init__()
        self.kind = kind

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not self.kind.computes_as:
            raise ValueError(
                f"expected {self.kind.computes_as.__name__}, got {type(module).__name__}"
            )
        _distribute(module, device_mesh, self.src_data_rank, weight=Replicate())
        module.__class__ = self.kind
        return module


class _Replica(nn.Module):
    """A module whose weight is a DTensor on every rank; its forward computes with plain tensors."""

    weight: DTensor
    computes_as: ClassVar[type[nn.Module]]
    """The class whose forward it runs."""

    def _whole_weight(self) -> Tensor:
        return self.weight.to_local()


class WholeEmbedding(_Replica, nn.Embedding):  # type: ignore[misc]
    """An embedding; all ranks have the same tokens."""

    computes_as = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """int64 ``[...]`` -> ``[..., embedding_dim]``."""
        return F.embedding(input, self._whole_weight())


class WholeLinear(_Replica, nn.Linear):  # type: ignore[misc]
    """A linear layer without bias; all ranks have the same input."""

    computes_as = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """float ``[..., in_features]`` -> ``[..., out_features]``."""
        return F.linear(input, self._whole_weight())


class WholeRMSNorm(_Replica, RMSNorm):  # type: ignore[misc]
    """A norm; all ranks have the same input."""

    computes_as = RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        """float ``[..., features]`` -> the same shape and dtype."""
        return rms_norm(x, self._whole_weight(), self.eps)


class HeadRMSNorm(WholeRMSNorm):
    """A norm per head; a rank has some heads. The backward adds the ranks' gradients."""

    def _whole_weight(self) -> Tensor:
        return entering(self.weight.to_local(), self.weight.device_mesh)


class ChannelRMSNorm(HeadRMSNorm):
    """A norm over channels; a rank has some channels.

    The ranks exchange channels for tokens: each gets all channels of its share of the tokens, so
    the norm has the same bits as in one process. A mean of squares from the ranks' partial sums
    would need no exchange, but its rounding, and so the activations' codes, would differ.
    """

    def forward(self, x: Tensor) -> Tensor:
        """float ``[..., features / ranks]`` -> the same shape and dtype."""
        mesh = self.weight.device_mesh
        channels = DTensor.from_local(x.flatten(0, -2), mesh, [Shard(1)], run_check=False)
        whole_shape, whole_stride = channels.shape, channels.stride()
        tokens = channels.redistribute(placements=[Shard(0)]).to_local()
        y = DTensor.from_local(
            super().forward(tokens),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=whole_shape,  # ranks may have unequal shares
            stride=whole_stride,
        )
        return y.redistribute(placements=[Shard(1)]).to_local().reshape(x.shape)


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Divide a model over the ranks of a one-dimensional mesh, in place.

    All ranks call it with the same model on their device; the first rank's weights are used. Apply
    FSDP or activation checkpointing afterwards, and make the optimizer from the resulting
    parameters.

    Raises:
        UserError: :func:`bitnet.model.check_divides` rejects the config, or a matrix of a layer is
            neither a BitLinear nor an nn.Linear.
    """
    config = model.config
    check_divides(config, mesh.size())
    plan: dict[str, ParallelStyle] = {}
    for i, block in enumerate(model.layers):
        for name in config.matrices():
            matrix = block.get_submodule(name)
            row = is_row_parallel(name)
            if type(matrix) is BitLinear:
                plan[f"layers.{i}.{name}"] = RowwiseBitLinear() if row else ColwiseBitLinear()
            elif type(matrix) is nn.Linear:
                plan[f"layers.{i}.{name}"] = RowwiseParallel() if row else ColwiseParallel()
            else:
                raise UserError(
                    f"distributed.tensor_parallel: layers.{i}.{name} is a "
                    f"{type(matrix).__name__}; only ternary and full-precision matrices can be "
                    "divided, without [quant], [adapter] or a norm inside in full precision"
                )
    for name, module in model.named_modules():
        if type(module) is RMSNorm and not name.endswith(".rms_norm"):  # rms_norm: in a matrix
            kind = name.rpartition(".")[2]
            plan[name] = Replicated(_NORMS.get(kind, WholeRMSNorm))
    parallelize_module(model, mesh, plan)
    parallelize_module(model.embed_tokens, mesh, Replicated(WholeEmbedding))
    if config.tie_embeddings:
        model.lm_head.register_parameter("weight", model.embed_tokens._parameters["weight"])
    parallelize_module(model.lm_head, mesh, Replicated(WholeLinear))
    return model


_NORMS: dict[str, type[_Replica]] = {
    "q_norm": HeadRMSNorm,
    "k_norm": HeadRMSNorm,
    "attn_sub_norm": ChannelRMSNorm,
    "ffn_sub_norm": ChannelRMSNorm,
}
"""Norms inside the divided part of a layer."""


def is_row_parallel(name: str) -> bool:
    """Whether the columns, not the rows, of a layer's matrix are divided."""
    return name.endswith(("o_proj", "down_proj"))


def _bitlinear(module: nn.Module) -> BitLinear:
    if not isinstance(module, BitLinear):
        raise ValueError(f"expected a BitLinear, got {type(module).__name__}; use torch's styles")
    return module


def _check_equal(name: str, features: int, mesh: DeviceMesh) -> None:
    if features % mesh.size():
        raise ValueError(f"{name}: {features} cannot be divided over {mesh.size()} ranks equally")


def _distribute(
    module: nn.Module, mesh: DeviceMesh, source: int | None, **placements: Placement
) -> None:
    """Turn parameters of a module into DTensors, with the values of rank ``source`` of the mesh."""
    for name, placement in placements.items():
        parameter = module._parameters.get(name)
        if parameter is not None and not isinstance(parameter, DTensor):
            divided = distribute_tensor(parameter, mesh, [placement], src_data_rank=source)
            module.register_parameter(name, nn.Parameter(divided, parameter.requires_grad))
