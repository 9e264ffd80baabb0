"""A model's weights as a step reads them: matrices and norms, fused where several share an input.

    Ternary   TernaryLinear, or BitLinear with the codes of its weight now: codes and one scale per
              row. On a CPU the codes are unpacked once to int8: torch's int8 product reads them
              directly, and is three to thirteen times as fast as an fp32 product of the same size.
              On CUDA they stay packed.
    Dense     nn.Linear, the full-precision baseline: one weight.
    Modules   any other layer (scales per group, a norm inside, a bias, layers of QAT, adapters):
              called as a module, one by one, allocating memory. A BitLinear among them is packed
              first, so that no call quantizes its weight again.

A fused matrix (q, k and v; gate and up) has one scale per row, so each projection in it keeps its
own scale. Nothing is estimated again.

N out_features, K in_features.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, RMSNorm, TernaryLinear
from bitnet.model import MLP, Attention, Block, Transformer
from bitnet.modules import computed_parameter, hooked
from bitnet.qat.integer import IntEmbedding
from bitnet.qat.layers import QATEmbedding
from bitnet_kernels import bit_planes, pack_ternary
from bitnet_kernels.cpu.int_mm import int_mm_takes_any_int8
from bitnet_kernels.reference import absmax_int8


class Norm(NamedTuple):
    """An RMSNorm: its weight ``[K]``, fp32, and its eps."""

    weight: Tensor
    eps: float


class Ternary(NamedTuple):
    """A ternary matrix: ``weight`` int8 codes ``[N, K]`` on a CPU, uint8 packed
    ``[N, ceil(K/64)*16]`` on CUDA; ``scale`` fp32 ``[N]``; ``planes`` the packed codes as bit
    planes, for the kernel that reads those."""

    weight: Tensor
    scale: Tensor
    planes: Tensor | None = None


class Dense(NamedTuple):
    """A float matrix ``[N, K]``."""

    weight: Tensor


class Modules(NamedTuple):
    """Layers called as modules; their outputs stand side by side."""

    modules: tuple[nn.Module, ...]


class Int8(NamedTuple):
    """An 8-bit head: codes int8 ``[N, K]`` and one absmax scale per row, fp32 ``[N]``."""

    weight: Tensor
    scale: Tensor


Matrix = Ternary | Dense | Int8 | Modules
_M = TypeVar("_M", bound=nn.Module)


class _Fuse(Protocol):
    """Fuses the children of a module, whose name is a prefix of theirs."""

    def __call__(self, name: str, parent: nn.Module, *children: str) -> Matrix: ...


@dataclass(frozen=True)
class LayerWeights:
    """One layer. A norm is None if the model has none in its place."""

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
class ModelWeights:
    """A whole model. ``embedding`` is the model's own tensor ``[V, D]``, and so is a dense head
    tied to it; a quantized embedding is dequantized once, and takes the memory of a float one."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Matrix

    @staticmethod
    @torch.no_grad()
    def of(model: Transformer, packed: bool, planes: bool = False) -> "ModelWeights":
        """Read a model's weights as they are now.

        Arguments:
            model: a Transformer whose embedding, layers, attention and MLP are the classes of
                torch and :mod:`bitnet.model`; the linear modules inside may be any.
            packed: keep ternary weights packed (for CUDA) instead of as int8 codes (for a CPU).
            planes: keep packed weights as bit planes as well.
        Raises:
            ValueError: a module (named) whose arithmetic a step does not know, or whose dtype is
                not the embedding's.
        """
        _require("model", model, Transformer)
        embedding = embedding_of(model)

        def fuse(name: str, parent: nn.Module, *children: str) -> Matrix:
            modules = [getattr(parent, child) for child in children]
            for child, module in zip(children, modules, strict=True):
                if type(module) is nn.Linear and module.weight.dtype != embedding.dtype:
                    raise ValueError(
                        f"{name}{child}: expected {embedding.dtype}, the dtype of "
                        f"embed_tokens, got {module.weight.dtype}"
                    )
            return _fuse(modules, packed, planes)

        layers = tuple(
            _layer(f"layers.{i}", block, model.config.activation, fuse)
            for i, block in enumerate(model.layers)
        )
        norm = _norm("norm", model.norm)
        if norm is None:
            raise ValueError("norm: expected an RMSNorm, got Identity")
        head = fuse("", model, "lm_head")
        return ModelWeights(embedding, layers, norm, head)

    def modules(self) -> tuple[nn.Module, ...]:
        """The layers called as modules."""
        matrices = [m for layer in self.layers for m in vars(layer).values()] + [self.head]
        return tuple(one for m in matrices if isinstance(m, Modules) for one in m.modules)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads."""
        parts = [part for layer in self.layers for part in vars(layer).values()]
        parts += [self.norm, self.head]
        return [self.embedding, *(tensor for part in parts for tensor in tensors_of(part))]


class Versions:
    """Detects whether a model has changed since it was read.

    torch counts each tensor's changes in place, except those past autograd (``weight.data``), of
    tensors made in inference mode, and by fused optimizers. A step of a fused optimizer shows in
    the vectors, of which this keeps copies.

    :class:`ModelWeights` shares some of a model's tensors and copies others, so after a change it
    is neither the old model nor the new. The copied ones are watched by weak references: the model
    may be dropped.
    """

    def __init__(self, model: nn.Module, weights: ModelWeights) -> None:
        # A layer called as a module may change its own buffers in every call.
        free = {id(buffer) for module in weights.modules() for buffer in module.buffers()}
        packed = [module for module in model.modules() if isinstance(module, TernaryLinear)]
        originals = [*model.parameters(), *(t for module in packed for t in module.buffers())]
        self._watched = [
            (tensor, tensor._version)
            for tensor in weights.tensors()
            if id(tensor) not in free and not tensor.is_inference()
        ]
        self._copied = [(weakref.ref(t), t._version) for t in originals if not t.is_inference()]
        self._vectors = [
            (weakref.ref(p), p.detach().clone()) for p in model.parameters() if p.dim() == 1
        ]

    def copies(self) -> list[Tensor]:
        """The copies that this keeps."""
        return [before for _, before in self._vectors]

    def changed(self) -> bool:
        """Whether any has changed."""
        alive = [
            (tensor, version) for ref, version in self._copied if (tensor := ref()) is not None
        ]
        if any(tensor._version != version for tensor, version in self._watched + alive):
            return True
        return any(
            (vector := ref()) is not None  # bits: a NaN that is there differs from itself
            and not torch.equal(vector.detach().view(torch.uint8), before.view(torch.uint8))
            for ref, before in self._vectors
        )


def embedding_of(model: Transformer) -> Tensor:
    """The embedding's rows ``[V, D]``: the weight itself of a plain embedding; of a quantized one a
    copy of the rows that its forward gives now.

    Raises:
        ValueError: it is neither an nn.Embedding nor one that a recipe has quantized.
    """
    embedding = model.embed_tokens
    if type(embedding) in (QATEmbedding, IntEmbedding) and not hooked(embedding):
        tokens = torch.arange(
            model.config.vocab_size, dtype=torch.int64, device=model.norm.weight.device
        )
        return cast(Tensor, embedding(tokens)).detach()
    if type(embedding) is not nn.Embedding or hooked(embedding) or embedding.max_norm is not None:
        raise ValueError(
            "embed_tokens: expected a plain nn.Embedding without hooks (nor torch's for all "
            f"modules), parametrization and max_norm, got {type(embedding).__name__}"
        )
    return embedding.weight.detach()


def tensors_of(matrix: Matrix | Norm | None) -> list[Tensor]:
    """The tensors of a matrix or norm."""
    if isinstance(matrix, Modules):
        return [t for module in matrix.modules for t in (*module.parameters(), *module.buffers())]
    return [] if matrix is None else [part for part in matrix if isinstance(part, Tensor)]


def _require(name: str, module: nn.Module, kind: type[_M]) -> _M:
    """The module; raises ValueError if its forward is not that of ``kind``, or it has hooks."""
    same = isinstance(module, kind) and all(
        getattr(type(module), name, None) is getattr(kind, name, None) and name not in vars(module)
        for name in ("__call__", "forward", "hidden")
    )
    if not isinstance(module, kind) or not same or hooked(module):
        raise ValueError(
            f"{name}: expected a {kind.__name__} with its own forward and hidden and no hooks "
            f"(nor torch's for all modules), whose arithmetic a step repeats; "
            f"got {type(module).__name__}"
        )
    return module


def _layer(name: str, block: nn.Module, activation: str, fuse: _Fuse) -> LayerWeights:
    block = _require(name, block, Block)
    attention = _require(f"{name}.self_attn", block.self_attn, Attention)
    mlp = _require(f"{name}.mlp", block.mlp, MLP)
    if mlp.activation != activation:
        raise ValueError(
            f"{name}.mlp.activation: expected {activation!r}, the model's, got {mlp.activation!r}"
        )
    return LayerWeights(
        input_norm=_norm(f"{name}.input_layernorm", block.input_layernorm),
        qkv=fuse(f"{name}.self_attn.", attention, "q_proj", "k_proj", "v_proj"),
        q_norm=_norm(f"{name}.self_attn.q_norm", attention.q_norm),
        k_norm=_norm(f"{name}.self_attn.k_norm", attention.k_norm),
        attn_norm=_norm(f"{name}.self_attn.attn_sub_norm", attention.attn_sub_norm),
        o=fuse(f"{name}.self_attn.", attention, "o_proj"),
        mlp_norm=_norm(f"{name}.post_attention_layernorm", block.post_attention_layernorm),
        gate_up=fuse(f"{name}.mlp.", mlp, "gate_proj", "up_proj"),
        ffn_norm=_norm(f"{name}.mlp.ffn_sub_norm", mlp.ffn_sub_norm),
        down=fuse(f"{name}.mlp.", mlp, "down_proj"),
    )


def _norm(name: str, module: nn.Module | None) -> Norm | None:
    if module is None or type(module) is nn.Identity:
        return None
    if type(module) is not RMSNorm or hooked(module):
        raise ValueError(f"{name}: expected an RMSNorm without hooks, got {type(module).__name__}")
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    return Norm(module.weight.detach().float(), eps)


def _fuse(modules: Sequence[nn.Module], packed: bool, planes: bool) -> Matrix:
    """Fuse layers that read the same input into one matrix."""
    if all(_is_matrix(module) for module in modules):
        ternary = [part for module in modules if (part := _ternary(module, packed)) is not None]
        if len(ternary) == len(modules):
            weights, scales = zip(*ternary, strict=True)
            weight = _stack(weights)
            return Ternary(weight, _stack(scales), bit_planes(weight) if planes else None)
        dense = [module.weight.detach() for module in modules if type(module) is nn.Linear]
        if len(dense) == len(modules):
            return Dense(_stack(dense))
    return Modules(tuple(_constant(module) for module in modules))


def _is_matrix(module: nn.Module) -> bool:
    """Whether a layer of a known class does nothing beyond its weight: no bias, no hooks."""
    bare = getattr(module, "bias", None) is None and not computed_parameter(module)
    return bare and not hooked(module)


def _constant(module: nn.Module) -> nn.Module:
    """A BitLinear packed, with equal outputs to the last bit; any other module itself.

    Unpacked, a BitLinear would quantize its weight in every call, or use codes that
    ``weights_quantized`` holds for a while: a CUDA graph would go on reading those.
    """
    if type(module) is not BitLinear or hooked(module) or computed_parameter(module):
        return module
    codes, scale = module.quantize()
    layer = TernaryLinear.from_codes(
        codes, scale, module.bias, granularity=module.granularity, group_size=module.group_size
    )
    layer.rms_norm = module.rms_norm
    return layer.eval()


def _ternary(module: nn.Module, packed: bool) -> tuple[Tensor, Tensor] | None:
    """Codes and one scale per row, of a layer that has them; else None."""
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
    return weight, scale.expand(module.out_features)


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate to one contiguous tensor. A single one is shared with the model, not copied."""
    return rows[0].contiguous() if len(rows) == 1 else torch.cat(list(rows))


def quantized_head(head: Matrix, dtype: Literal["bf16", "int8"]) -> Matrix:
    """A dense output head in fewer bits: bf16, or int8 with one absmax scale per row.

    Raises:
        ValueError: the head is no plain nn.Linear, or the CPU has no exact int8 product.
    """
    if not isinstance(head, Dense):
        raise ValueError(f"head: {dtype!r} needs a lm_head that is a plain nn.Linear; use 'auto'")
    if dtype == "bf16":
        return Dense(head.weight.bfloat16())
    if head.weight.device.type == "cpu" and not int_mm_takes_any_int8():
        raise ValueError("head: 'int8' needs a CPU with AVX-512 VNNI; use 'float' or 'bf16'")
    return Int8(*absmax_int8(head.weight))
