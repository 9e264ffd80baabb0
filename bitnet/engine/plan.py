"""What a step reads: a model's modules as matrices and norms, fused where several share an input.

    Ternary   TernaryLinear, or BitLinear as it is now: codes and one scale a row. On CPU the codes
              are unpacked once to int8, which torch's int8 product reads as they are and three to
              thirteen times as fast as an fp32 product of the size; on CUDA they stay packed.
    Dense     nn.Linear, the full-precision twin: one weight.
    Modules   whatever else stands there (scales by group, a norm inside, a bias, layers of QAT,
              adapters): called as it is, one by one, allocating what it allocates.

Fused projections (q, k and v; gate and up) keep one scale an original projection, as quantization
demands: a fused matrix carries a scale a row. Nothing is estimated again from what was fused.

N out_features, K in_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, RMSNorm, TernaryLinear, computed_parameter
from bitnet.model import MLP, Attention, Block, Transformer
from bitnet_kernels import pack_ternary
from bitnet_kernels.reference import absmax_int8


class Norm(NamedTuple):
    """An RMSNorm: its weight ``[K]``, fp32, and its eps."""

    weight: Tensor
    eps: float


class Ternary(NamedTuple):
    """Ternary rows: ``weight`` int8 codes ``[N, K]`` on CPU, uint8 packed ``[N, ceil(K/64)*16]``
    on CUDA; ``scale`` fp32 ``[N]``."""

    weight: Tensor
    scale: Tensor


class Dense(NamedTuple):
    """A float matrix ``[N, K]``."""

    weight: Tensor


class Modules(NamedTuple):
    """Layers that are called as they are; their outputs stand side by side."""

    modules: tuple[nn.Module, ...]


class Int8(NamedTuple):
    """An 8-bit head: codes int8 ``[N, K]`` and their scales fp32 ``[N]``, absmax a row."""

    weight: Tensor
    scale: Tensor


Matrix = Ternary | Dense | Int8 | Modules
_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True)
class LayerPlan:
    """One layer; a norm is None where the model has none there."""

    input_norm: Norm | None
    qkv: Matrix
    """Rows: H query heads, then G key heads, then G value heads."""
    q_norm: Norm | None
    k_norm: Norm | None
    attn_norm: Norm | None
    o: Matrix
    mlp_norm: Norm | None
    gate_up: Matrix
    """Rows: the gate's F, then the F of ``up``."""
    ffn_norm: Norm | None
    down: Matrix


@dataclass(frozen=True)
class ModelPlan:
    """A whole model. ``embedding`` is the model's own tensor ``[V, D]``, and so is a dense head
    tied to it."""

    embedding: Tensor
    layers: tuple[LayerPlan, ...]
    norm: Norm
    head: Matrix

    @staticmethod
    @torch.no_grad()
    def of(model: Transformer, packed: bool) -> "ModelPlan":
        """Read a model as it is now.

        Arguments:
            model: a Transformer whose layers, attention and MLP are the classes of
                :mod:`bitnet.model`; the linear modules inside may be any.
            packed: keep ternary weights packed (CUDA) or as int8 codes (CPU).
        Raises:
            ValueError: a module in place of one whose arithmetic is fixed (named).
        """
        _require("model", model, Transformer)
        layers = []
        for i, block in enumerate(model.layers):
            name = f"layers.{i}"
            block = _require(name, block, Block)
            attention = _require(f"{name}.self_attn", block.self_attn, Attention)
            mlp = _require(f"{name}.mlp", block.mlp, MLP)
            layers.append(
                LayerPlan(
                    input_norm=_norm(f"{name}.input_layernorm", block.input_layernorm),
                    qkv=_fuse([attention.q_proj, attention.k_proj, attention.v_proj], packed),
                    q_norm=_norm(f"{name}.self_attn.q_norm", attention.q_norm),
                    k_norm=_norm(f"{name}.self_attn.k_norm", attention.k_norm),
                    attn_norm=_norm(f"{name}.self_attn.attn_sub_norm", attention.attn_sub_norm),
                    o=_fuse([attention.o_proj], packed),
                    mlp_norm=_norm(
                        f"{name}.post_attention_layernorm", block.post_attention_layernorm
                    ),
                    gate_up=_fuse([mlp.gate_proj, mlp.up_proj], packed),
                    ffn_norm=_norm(f"{name}.mlp.ffn_sub_norm", mlp.ffn_sub_norm),
                    down=_fuse([mlp.down_proj], packed),
                )
            )
        norm = _norm("norm", model.norm)
        if norm is None:
            raise ValueError("norm: expected an RMSNorm, got Identity")
        embedding = model.embed_tokens.weight.detach()
        return ModelPlan(embedding, tuple(layers), norm, _fuse([model.lm_head], packed))


def tensors_of(matrix: Matrix | Norm | None) -> list[Tensor]:
    """The tensors that a matrix or norm is made of."""
    if isinstance(matrix, Modules):
        return [t for module in matrix.modules for t in (*module.parameters(), *module.buffers())]
    return [] if matrix is None else [part for part in matrix if isinstance(part, Tensor)]


def _require(name: str, module: nn.Module, kind: type[_M]) -> _M:
    """The module, if its forward is that of ``kind`` and nothing is hooked to it."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward or _hooked(module):
        raise ValueError(
            f"{name}: expected a {kind.__name__} with its own forward and no hooks, whose "
            f"arithmetic a step repeats; got {type(module).__name__}"
        )
    return module


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or (isinstance(module, nn.Linear) and computed_parameter(module))
    )


def _norm(name: str, module: nn.Module | None) -> Norm | None:
    if module is None or type(module) is nn.Identity:
        return None
    if type(module) is not RMSNorm or _hooked(module):
        raise ValueError(f"{name}: expected an RMSNorm, got {type(module).__name__}")
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    return Norm(module.weight.detach().float(), eps)


def _fuse(modules: Sequence[nn.Module], packed: bool) -> Matrix:
    """The matrix of layers that read the same input."""
    if not any(_hooked(module) or getattr(module, "bias", None) is not None for module in modules):
        ternary = [part for module in modules if (part := _ternary(module, packed)) is not None]
        if len(ternary) == len(modules):
            weights, scales = zip(*ternary, strict=True)
            return Ternary(_stack(weights), _stack(scales))
        dense = [module.weight.detach() for module in modules if type(module) is nn.Linear]
        if len(dense) == len(modules):
            return Dense(_stack(dense))
    return Modules(tuple(modules))


def _ternary(module: nn.Module, packed: bool) -> Ternary | None:
    """The layer as codes and a scale a row, where it has this form."""
    if type(module) not in (BitLinear, TernaryLinear):
        return None
    assert isinstance(module, BitLinear | TernaryLinear)
    small = module.in_features < 2 and not packed  # torch's int8 product on CPU is wrong at K = 1
    if module.granularity == "group" or module.rms_norm is not None or small:
        return None
    if isinstance(module, BitLinear):
        codes, scale = module.quantize()
        weight = pack_ternary(codes) if packed else codes
    else:
        weight, scale = (module.packed if packed else module.codes()), module.scale
    return Ternary(weight, scale.expand(module.out_features))


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """One contiguous tensor; a single one is shared with the model, not copied."""
    return rows[0].contiguous() if len(rows) == 1 else torch.cat(list(rows))


def quantized_head(head: Matrix, dtype: Literal["bf16", "int8"]) -> Matrix:
    """A dense output head in fewer bits: bf16, or int8 by absmax a row.

    Raises:
        ValueError: the head is no plain nn.Linear; the CPU has no exact int8 product.
    """
    if not isinstance(head, Dense):
        raise ValueError(f"head: {dtype!r} needs a lm_head that is a plain nn.Linear; use 'auto'")
    if dtype == "bf16":
        return Dense(head.weight.bfloat16())
    # Without VNNI torch's product adds pairs of products in int16, which 8-bit codes overflow.
    if head.weight.device.type == "cpu" and not torch.cpu._is_vnni_supported():
        raise ValueError("head: 'int8' needs a CPU with AVX-512 VNNI; use 'float' or 'bf16'")
    return Int8(*absmax_int8(head.weight))
