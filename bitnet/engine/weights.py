"""A model's weights in the form that a step reads: matrices and norms.

    Ternary   TernaryLinear: packed codes, and one scale per matrix or per row.
    Dense     nn.Linear, the full-precision baseline: one weight.
    Modules   any other layer (scales per group, a norm inside, a bias, layers of QAT, adapters):
              called as a module.

A BitLinear is first packed, once (:func:`packed_copy`), so that no step quantizes its weight. No
scale is estimated again.

On a CPU each matrix is the layer's own tensor, not a copy. On CUDA the matrices that share an input
(q, k and v; gate and up) are fused into one. It has one scale per row, so each projection keeps its
own scale.

N out_features, K in_features.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, RMSNorm, TernaryLinear
from bitnet.model import MLP, Attention, Block, ModelConfig, Transformer
from bitnet.modules import computed_parameter, hooked
from bitnet.qat.integer import IntEmbedding
from bitnet.qat.layers import QATEmbedding
from bitnet_kernels import bit_planes
from bitnet_kernels.cpu import int_mm
from bitnet_kernels.reference import absmax_int8, rescale


class Norm(NamedTuple):
    """An RMSNorm: its weight ``[K]``, fp32, and its eps."""

    weight: Tensor
    eps: float


class Ternary(NamedTuple):
    """A ternary matrix: ``packed`` uint8 ``[N, ceil(K/64)*16]``
    (:func:`bitnet_kernels.pack_ternary`); ``scale`` fp32 ``[]`` or ``[N]``; ``planes`` the same
    codes as bit planes (:func:`bitnet_kernels.bit_planes`), for the kernel that reads those. On a
    CPU either ``packed`` or ``planes`` is None."""

    packed: Tensor | None
    scale: Tensor
    planes: Tensor | None = None


class Dense(NamedTuple):
    """A float matrix ``[N, K]``."""

    weight: Tensor


class Modules(NamedTuple):
    """Layers called as modules; their outputs are concatenated."""

    modules: tuple[nn.Module, ...]


class Int8(NamedTuple):
    """An 8-bit head: codes int8 ``[N, K]`` and one absmax scale per row, fp32 ``[N]``."""

    weight: Tensor
    scale: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Float ``[B, K]`` -> fp32 ``[B, N]``; each row of ``x`` is quantized too."""
        codes, scale = absmax_int8(x)
        acc = int_mm.int8_matmul(codes, self.weight)
        return rescale(acc, scale, self.scale, None, torch.float32)


Matrix = Ternary | Dense | Int8 | Modules
_M = TypeVar("_M", bound=nn.Module)


class _Read(Protocol):
    """Reads children of a module that share an input; the module's name is a prefix of theirs."""

    def __call__(self, name: str, parent: nn.Module, *children: str) -> tuple[Matrix, ...]: ...


@dataclass(frozen=True)
class LayerWeights:
    """One layer. A norm that the model does not have is None."""

    input_norm: Norm | None
    qkv: tuple[Matrix, ...]
    """Matrices of H query, G key and G value heads; if fused, one matrix with all their rows."""
    q_norm: Norm | None
    k_norm: Norm | None
    attn_norm: Norm | None
    o: Matrix
    mlp_norm: Norm | None
    gate_up: tuple[Matrix, ...]
    """The gate and ``up``, of F rows each; if fused, one matrix of 2F rows."""
    ffn_norm: Norm | None
    down: Matrix

    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices, in the order in which a step reads them."""
        return *self.qkv, self.o, *self.gate_up, self.down

    def norms(self) -> tuple[Norm, ...]:
        """The norms that the model has."""
        outer = self.input_norm, self.attn_norm, self.mlp_norm, self.ffn_norm
        return tuple(norm for norm in (*outer, self.q_norm, self.k_norm) if norm is not None)


@dataclass(frozen=True)
class ModelWeights:
    """A whole model. ``embedding`` is the model's own tensor ``[V, D]``, and so is a dense head
    tied to it. A quantized embedding is dequantized once, and takes the memory of a float one."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Matrix

    @staticmethod
    @torch.no_grad()
    def of(model: Transformer, fused: bool, planes: bool = False) -> "ModelWeights":
        """Read a model's weights as they are now.

        Arguments:
            model: a :func:`packed_copy` of a Transformer whose embedding, layers, attention and MLP
                are classes of torch and :mod:`bitnet.model`. The linear modules inside may be of
                any class.
            fused: fuse matrices that share an input (for CUDA), instead of sharing the model's own
                tensors (for a CPU).
            planes: keep ternary weights as bit planes; fused ones packed, too.
        Raises:
            ValueError: a module, which the message names, has arithmetic that a step does not know,
                or another shape or dtype than the model.
        """
        config, embedding = _require("model", model, Transformer).config, embedding_of(model)
        shapes = config.matrices() | {"lm_head": (config.vocab_size, config.d_model)}
        if list(embedding.shape) != list(shapes["lm_head"]):
            raise ValueError(
                f"embed_tokens: expected {list(shapes['lm_head'])}, got {list(embedding.shape)}"
            )

        def read(name: str, parent: nn.Module, *children: str) -> tuple[Matrix, ...]:
            modules = [getattr(parent, child) for child in children]
            for child, module in zip(children, modules, strict=True):
                path = f"{name}{child}"
                shape = next(shape for key, shape in shapes.items() if path.endswith(key))
                _check_matrix(path, module, shape, embedding.dtype)
            groups = [modules] if fused else [[module] for module in modules]
            return tuple(_matrix(group, planes, fused) for group in groups)

        layers = tuple(
            _layer(f"layers.{i}", block, config, read) for i, block in enumerate(model.layers)
        )
        norm = _norm("norm", model.norm, config.d_model)
        if norm is None:
            raise ValueError("norm: expected an RMSNorm, got Identity")
        (head,) = read("", model, "lm_head")
        return ModelWeights(embedding, layers, norm, head)

    def modules(self) -> tuple[nn.Module, ...]:
        """The layers called as modules."""
        matrices = [m for layer in self.layers for m in layer.matrices()] + [self.head]
        return tuple(one for m in matrices if isinstance(m, Modules) for one in m.modules)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads."""
        parts = [part for one in self.layers for part in (*one.matrices(), *one.norms())]
        parts += [self.norm, self.head]
        return [self.embedding, *(tensor for part in parts for tensor in tensors_of(part))]


class Versions:
    """Detects whether a model has changed since it was read.

    torch counts each tensor's in-place changes, except changes that bypass autograd
    (``weight.data``), changes of tensors made in inference mode, and changes by fused optimizers.
    A step of a fused optimizer shows in the vectors, of which this class keeps copies.

    :class:`ModelWeights` shares some of a model's tensors and copies others, so after a change it
    is neither the old model nor the new one. The copied tensors are watched by weak references, so
    that the model may be dropped.
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
        """The copies that this object keeps."""
        return [before for _, before in self._vectors]

    def changed(self) -> bool:
        """Whether any tensor has changed."""
        alive = [
            (tensor, version) for ref, version in self._copied if (tensor := ref()) is not None
        ]
        if any(tensor._version != version for tensor, version in self._watched + alive):
            return True
        return any(
            (vector := ref()) is not None  # compare bits: a NaN is not equal to itself
            and not torch.equal(vector.detach().view(torch.uint8), before.view(torch.uint8))
            for ref, before in self._vectors
        )


_CONTAINERS = (Transformer, nn.ModuleList, Block, Attention, MLP)


def replaced(model: Transformer, convert: Callable[[nn.Module], nn.Module | None]) -> Transformer:
    """A Transformer with some layers replaced. All the rest, including tensors, is the model's own.

    Arguments:
        convert: called with each module inside that is not from :mod:`bitnet.model`. Returns its
            replacement, or None to keep it.
    """
    return cast(Transformer, _replaced(model, convert, {}))


def _replaced(
    module: nn.Module, convert: Callable[[nn.Module], nn.Module | None], made: dict[int, nn.Module]
) -> nn.Module:
    """A module's replacement. ``made`` has the replacements by the id of the old module, so that a
    module that occurs twice stays one. (A function inside :func:`replaced` would form a reference
    cycle that keeps the model alive.)"""
    if id(module) not in made:
        if isinstance(module, _CONTAINERS):
            new = made[id(module)] = copy.copy(module)
            new._modules = {
                name: None if child is None else _replaced(child, convert, made)
                for name, child in module._modules.items()
            }
        else:
            made[id(module)] = convert(module) or module
    return made[id(module)]


def packed_copy(model: Transformer) -> Transformer:
    """A model with each BitLinear packed, whose outputs are the same to the last bit.

    An unpacked BitLinear would quantize its weight in every call, or use codes that
    ``weights_quantized`` holds temporarily, which a CUDA graph would continue to read.
    """

    def pack(module: nn.Module) -> nn.Module | None:
        if type(module) is not BitLinear or hooked(module) or computed_parameter(module):
            return None
        codes, scale = module.quantize()
        layer = TernaryLinear.from_codes(
            codes, scale, module.bias, granularity=module.granularity, group_size=module.group_size
        )
        layer.rms_norm = module.rms_norm
        return layer.eval()

    return replaced(model, pack)


def embedding_of(model: Transformer) -> Tensor:
    """The embedding's rows ``[V, D]``: for a plain embedding its weight itself, for a quantized one
    a copy of the rows that its forward gives now.

    Raises:
        ValueError: it is neither an nn.Embedding nor an embedding that a recipe has quantized.
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


def _layer(name: str, block: nn.Module, config: ModelConfig, read: _Read) -> LayerWeights:
    block = _require(name, block, Block)
    attention = _require(f"{name}.self_attn", block.self_attn, Attention)
    mlp = _require(f"{name}.mlp", block.mlp, MLP)
    if mlp.activation != config.activation:
        raise ValueError(
            f"{name}.mlp.activation: expected {config.activation!r}, the model's, "
            f"got {mlp.activation!r}"
        )
    d, e, f = config.d_model, config.head_dim, config.d_ff
    (o,) = read(f"{name}.self_attn.", attention, "o_proj")
    (down,) = read(f"{name}.mlp.", mlp, "down_proj")
    return LayerWeights(
        input_norm=_norm(f"{name}.input_layernorm", block.input_layernorm, d),
        qkv=read(f"{name}.self_attn.", attention, "q_proj", "k_proj", "v_proj"),
        q_norm=_norm(f"{name}.self_attn.q_norm", attention.q_norm, e),
        k_norm=_norm(f"{name}.self_attn.k_norm", attention.k_norm, e),
        attn_norm=_norm(f"{name}.self_attn.attn_sub_norm", attention.attn_sub_norm, d),
        o=o,
        mlp_norm=_norm(f"{name}.post_attention_layernorm", block.post_attention_layernorm, d),
        gate_up=read(f"{name}.mlp.", mlp, "gate_proj", "up_proj"),
        ffn_norm=_norm(f"{name}.mlp.ffn_sub_norm", mlp.ffn_sub_norm, f),
        down=down,
    )


def _norm(name: str, module: nn.Module | None, features: int) -> Norm | None:
    if module is None or type(module) is nn.Identity:
        return None
    if type(module) is not RMSNorm or hooked(module):
        raise ValueError(f"{name}: expected an RMSNorm without hooks, got {type(module).__name__}")
    if module.weight.shape != (features,):
        raise ValueError(f"{name}: expected {features} features, got {list(module.weight.shape)}")
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    return Norm(module.weight.detach().float().contiguous(), eps)


def _check_matrix(name: str, module: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise ValueError if a layer of a known class does not have the model's shape or dtype."""
    if type(module) not in (nn.Linear, TernaryLinear):
        return
    assert isinstance(module, nn.Linear | TernaryLinear)
    got = module.out_features, module.in_features
    if isinstance(module, nn.Linear):
        got = module.weight.shape[0], module.weight.shape[1]
    if got != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(got)}")
    if isinstance(module, nn.Linear) and module.weight.dtype != dtype:
        raise ValueError(
            f"{name}: expected {dtype}, the dtype of embed_tokens, got {module.weight.dtype}"
        )


def _matrix(modules: Sequence[nn.Module], planes: bool, both: bool) -> Matrix:
    """Layers that read the same input, as one matrix; a single layer shares its tensors.
    ``planes``: as bit planes; ``both``: packed, too."""
    if all(_is_matrix(module) for module in modules):
        ternary = [module for module in modules if isinstance(module, TernaryLinear)]
        if len(ternary) == len(modules):
            scales = [one.scale for one in ternary]
            if len(modules) > 1:
                scales = [one.scale.expand(one.out_features) for one in ternary]
            packed, scale = _stack([one.packed for one in ternary]), _stack(scales)
            if not planes:
                return Ternary(packed, scale)
            made = ternary[0].planes if len(modules) == 1 else None
            made = bit_planes(packed) if made is None else made
            return Ternary(packed if both else None, scale, made)
        dense = [module.weight.detach() for module in modules if isinstance(module, nn.Linear)]
        if len(dense) == len(modules):
            return Dense(_stack(dense))
    return Modules(tuple(modules))


def _is_matrix(module: nn.Module) -> bool:
    """Whether a layer is plain or packed ternary, only multiplies by its weight, and has no scales
    per group."""
    if type(module) not in (nn.Linear, TernaryLinear) or hooked(module):
        return False
    if getattr(module, "bias", None) is not None or computed_parameter(module):
        return False
    ternary = isinstance(module, TernaryLinear)
    return not (ternary and (module.granularity == "group" or module.rms_norm is not None))


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate to one contiguous tensor. A single one is shared with the model, not copied."""
    return rows[0].contiguous() if len(rows) == 1 else torch.cat(list(rows))


def quantized_head(head: Matrix, dtype: Literal["bf16", "int8"]) -> Matrix:
    """A dense output head in fewer bits: bf16, or int8 with one absmax scale per row.

    Raises:
        ValueError: the head is not a plain nn.Linear.
    """
    if not isinstance(head, Dense):
        raise ValueError(f"head: {dtype!r} needs a lm_head that is a plain nn.Linear; use 'auto'")
    if dtype == "bf16":
        return Dense(head.weight.bfloat16())
    parts = [absmax_int8(part) for part in head.weight.split(1024)]  # to limit temporaries
    return Int8(*(torch.cat(same) for same in zip(*parts, strict=True)))


def one_embedding(weights: ModelWeights) -> ModelWeights:
    """The same model with the embedding in the head's own memory, if both hold the same numbers.

    They do if a bf16 head is tied to an fp32 embedding whose numbers fit in bf16, as in models that
    were published in bf16. The fp32 numbers are then no longer needed."""
    rows, head = weights.embedding, weights.head
    if not isinstance(head, Dense) or head.weight.shape != rows.shape:
        return weights
    pairs = zip(rows.split(1024), head.weight.split(1024), strict=True)
    if not all(torch.equal(a, b.to(a.dtype)) for a, b in pairs):
        return weights
    return replace(weights, embedding=head.weight)
