"""Low-rank adapters: train small matrices beside a model's own (LoRA, arXiv 2106.09685).

    y = base(x) + (alpha / rank) * B (A x)        A [r, K] Kaiming uniform, B [N, r] zero at first

    lora    the base stays an nn.Linear. In a prepared model it is a QATLinear (or BitLinear), which
            keeps quantizing: *LoRA-QAT*, adapters that learn to correct the quantization error
    qlora   the base is stored in NF4 or ternary codes and dequantized on use, so that only its
            codes and scales stay in memory (arXiv 2305.14314); it never changes

Merging adds s B A (s = alpha / rank) to the base's weight and removes the adapter. With a
full-precision base the outputs stay the same up to rounding. With a quantizer they change:
W + s B A is rounded again, and a small s B A may vanish below half a step. :func:`merge_adapters`
reports the weight's change for each layer. But the adapter's part of the output now comes from
quantized activations too, which the report omits: measure the loss before and after.

M tokens, K in_features, N out_features, r rank.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.dequantized import dequantized
from bitnet.linear import (
    BitLinear,
)
from bitnet.modules import (
    check_patterns,
    disable_nested_tensors,
    matches,
    replace_modules,
)
from bitnet.placement import CalledLayer, by_its_kind, is_unusual
from bitnet.qat.grid import dequantize
from bitnet.qat.layers import QATLinear
from bitnet.qat.nf4 import FrozenLinear, NF4Linear
from bitnet.qat.quantizers import Absmean
from bitnet.qat.recipe import Recipe
from bitnet.quant import absmean_ternary
from bitnet.quant import dequantize as dequantize_ternary
from bitnet.schema import STRICT, ListOf, Positive
from bitnet_kernels import pack_ternary, unpack_ternary
from bitnet_kernels.packing import packed_columns

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a Transformer's layers."""
BITNET = Recipe(weights="absmean", granularity="tensor")


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """The ``[adapter]`` section: low-rank adapters and their base layers."""

    kind: Literal["none", "lora", "qlora"] = "none"
    """"none"; "lora": adapters beside the model's layers, also quantized ones; "qlora": adapters
    beside a frozen low-bit base"""
    rank: Positive = 16
    """rank of the adapters; a rank above in_features or out_features is allowed but useless"""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """the adapters' outputs are multiplied by alpha / rank"""
    targets: Annotated[ListOf[str], Field(min_length=1)] = Field(
        default_factory=lambda: list(TARGETS)
    )
    """names, paths or patterns of the linear layers that get an adapter"""
    base: Literal["nf4", "ternary"] = "nf4"
    """format of a "qlora" base: 4.5 or 2 bits per weight"""
    train_base: bool = False
    """with "lora": train the rest of the model too; false: only the adapters"""


class FrozenTernaryLinear(FrozenLinear):
    """A frozen linear layer in packed ternary codes, 2 bits per weight.

    The codes are computed once, by absmean with the recipe's granularity and alpha. It stores the
    same as :class:`bitnet.TernaryLinear`, but does not quantize activations.

    State: ``packed`` uint8 ``[N, ceil(K/64)*16]``, ``scale`` fp32 ``[]``, ``[N]`` or ``[N, G]``,
    ``bias``. Raises ValueError if the weights are not finite.
    """

    SCALE = "scale"
    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, recipe: Recipe = BITNET) -> None:
        super().__init__(linear)
        self.recipe = recipe
        codes, scale = absmean_ternary(
            linear.weight.detach(), recipe.granularity, recipe.group_size, recipe.alpha
        )
        if codes.is_meta:  # no values to check and pack
            packed = codes.new_empty(len(codes), packed_columns(codes.shape[1]), dtype=torch.uint8)
        elif not bool(scale.isfinite().all()):
            raise ValueError("weight: holds NaN or infinity; such a weight has no ternary form")
        else:
            packed = pack_ternary(codes)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def codes(self) -> Tensor:
        """int8 -1, 0, 1 ``[N, K]``."""
        return unpack_ternary(self.packed, self.in_features)

    def dequantize(self) -> Tensor:
        """W_hat, fp32 ``[N, K]``."""
        return dequantize_ternary(self.codes(), self.scale, self.recipe.group_size)


def _frozen(linear: nn.Linear, ternary: Recipe | None) -> FrozenLinear:
    return NF4Linear(linear) if ternary is None else FrozenTernaryLinear(linear, ternary)


class LoRALinear(CalledLayer, nn.Module):
    """A linear layer and its adapter: ``y = base(x) + (alpha / rank) * (x A.T) B.T``.

    The adapter is fp32 and computes in the input's dtype, or in autocast's if that is on. It starts
    with B = 0, so the output is the base's.

    Arguments:
        base: an nn.Linear, QATLinear, BitLinear or FrozenLinear.
        rank, alpha: of the adapter.
    State:
        ``base.*``, ``lora_a`` fp32 ``[r, K]``, ``lora_b`` fp32 ``[N, r]``.
    """

    base: nn.Linear | FrozenLinear

    def __init__(self, base: nn.Linear | FrozenLinear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.rank, self.alpha = rank, alpha
        tensor = next(iter(base.state_dict().values()))
        a = torch.empty(rank, base.in_features, dtype=torch.float32, device=tensor.device)
        b = torch.zeros(base.out_features, rank, dtype=torch.float32, device=tensor.device)
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # U(-1, 1) / sqrt(K), LoRA's own code
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base weight's dtype, device and shape, for code that reads them. Reading values
        raises TypeError: a product with them would leave out the adapter, or its gradient."""
        base = self.base.weight

        def refuse() -> Tensor:
            raise TypeError(
                "weight: of a layer with an adapter it cannot be used by itself; "
                "merge_adapters() first"
            )

        return dequantized(refuse, base.shape, base.dtype, base.device)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def forward(self, input: Tensor) -> Tensor:
        """float ``[..., K]`` -> ``[..., N]``, differentiable."""
        if is_unusual(input):
            return by_its_kind(self, input)
        low = F.linear(input, self.lora_a.to(input.dtype))
        adapted = F.linear(low * self.scaling, self.lora_b.to(low.dtype))
        y: Tensor = self.base(input)
        return y + adapted

    @torch.no_grad()
    def delta(self) -> Tensor:
        """``(alpha / rank) * B A``, fp32 ``[N, K]``; merging adds it to the weight."""
        return self.scaling * (self.lora_b.float() @ self.lora_a.float())

    def extra_repr(self) -> str:
        """Rank and alpha."""
        return f"rank={self.rank}, alpha={self.alpha:g}"


def add_adapters(model: nn.Module, config: AdapterConfig, recipe: Recipe = BITNET) -> nn.Module:
    """Replace each target by a :class:`LoRALinear`, in place; return the model.

    Everything except the adapters is frozen (``requires_grad`` off, also for embeddings, norms and
    head), unless ``config.train_base``. A is drawn from torch's global generator, layer by layer.
    On the meta device only the structure is made, without values.

    Arguments:
        model: holds the targets: plain nn.Linear, or (lora) QATLinear or BitLinear, after prepare.
        config: what to add; kind "none" changes nothing.
        recipe: granularity, group size and alpha of a ternary base.
    Raises:
        ValueError: a pattern that matches no such layer (names the nearest); existing adapters; a
        target of another kind, with an inner norm, with a shared weight or with weights that are
        not finite (named); ``train_base`` with qlora; a recipe that is not absmean.
    """
    if config.kind == "none":
        return model
    quantized = config.kind == "qlora"
    if quantized and config.train_base:
        raise ValueError("train_base: the base of a qlora is stored in codes; use kind = 'lora'")
    absmean = recipe.enabled and isinstance(recipe.quantizer, Absmean)
    if quantized and config.base == "ternary" and not absmean:
        raise ValueError(
            f"recipe: a ternary base is quantized by 'absmean', not by {recipe.weights!r}"
        )
    if any(_adapted(model)):
        raise ValueError("model: already has adapters")
    targets = _targets(model, config)

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if module not in targets:
            return None
        assert isinstance(module, nn.Linear)
        try:
            base: nn.Linear | FrozenLinear = module
            if quantized:
                base = _frozen(module, None if config.base == "nf4" else recipe)
            elif not module.weight.is_meta and not bool(module.weight.isfinite().all()):
                raise ValueError("weight: holds NaN or infinity")
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from error
        return LoRALinear(base, config.rank, config.alpha)

    replace_modules(model, convert)
    disable_nested_tensors(model)
    if not config.train_base:
        model.requires_grad_(False)
        for _, layer in _adapted(model):
            layer.lora_a.requires_grad_(True)
            layer.lora_b.requires_grad_(True)
    return model


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _targets(model: nn.Module, config: AdapterConfig) -> set[nn.Module]:
    """The layers that the patterns match, each of a kind that can be adapted."""
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    check_patterns(model, config.targets, "targets")
    for pattern in config.targets:
        if not any(matches(name, [pattern]) for name in linear):
            raise ValueError(f"targets: {pattern!r} names no linear layer")
    chosen = {name: layer for name, layer in linear.items() if matches(name, config.targets)}
    kinds = (nn.Linear,) if config.kind == "qlora" else (nn.Linear, QATLinear, BitLinear)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        if layer is model:
            raise ValueError("model: is a linear layer itself; put it into a module")
        if type(layer) not in kinds or getattr(layer, "rms_norm", None) is not None:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"{name}: {config.kind} stands beside a {wanted} without a norm inside, "
                f"not {type(layer).__name__}"
            )
        if len(shared := owners.get(id(layer.weight), [])) != 1:
            how = f"shared by {', '.join(shared)}" if shared else "computed by a hook"
            raise ValueError(f"{name}: its weight is {how}; merging would change more than it")
    return set(chosen.values())


class LayerMerge(NamedTuple):
    """The effect of merging one layer."""

    error: float
    """``||Q(W + s B A) - (Q(W) + s B A)|| / ||Q(W) + s B A||`` (Frobenius): the change of the
    weight by rounding again. 0 for a full-precision base. A qlora base merges into full precision;
    the number is the change if the result *were* stored in the base's format again"""
    codes_changed: float
    """share of the codes that change by rounding again"""
    bytes_before: int
    """bytes of the base's weight: parameters, or codes and scales"""
    bytes_after: int
    """bytes of the merged weight"""


class MergeReport(NamedTuple):
    """The effect of merging, by layer; ``str()`` is one line."""

    layers: dict[str, LayerMerge]

    def __str__(self) -> str:
        """The mean over the layers, and the worst layer."""
        merges, n = list(self.layers.values()), len(self.layers)
        worst = max(self.layers, key=lambda name: self.layers[name].error)
        before, after = sum(m.bytes_before for m in merges), sum(m.bytes_after for m in merges)
        cost = (
            f"weights off by {sum(m.error for m in merges) / n:.2%} on average, "
            f"{self.layers[worst].error:.2%} at most ({worst}); "
            f"{sum(m.codes_changed for m in merges) / n:.2%} of the codes changed"
        )
        if after > before:  # a frozen base is decoded; nothing is rounded again
            return f"{n} layers merged exactly, {before:,} -> {after:,} bytes; rounded anew: {cost}"
        return f"{n} layers merged and rounded anew: {cost}"


@torch.no_grad()
def merge_adapters(model: nn.Module) -> MergeReport:
    """Add every adapter to its base and remove it, in place.

    The layers get their former types back. A lora base keeps its Parameters; a qlora base becomes
    an nn.Linear in its former dtype. ``requires_grad`` does not change.

    Raises:
        ValueError: no adapters; adapters or weights that are not finite, or a base that was packed
        or converted meanwhile (names the layer; nothing is merged).
    """
    layers = dict(_adapted(model))
    if not layers or "" in layers:
        raise ValueError("model: has no adapters" if not layers else "model: is an adapter itself")
    for name, layer in layers.items():
        if not isinstance(layer.base, nn.Linear | FrozenLinear):
            raise ValueError(
                f"{name}: its base is a {type(layer.base).__name__}, which takes no adapter in; "
                "merge_adapters() comes before pack() and convert()"
            )
        weight = layer.base.weight if isinstance(layer.base, nn.Linear) else layer.base.dequantize()
        if not bool((weight + layer.delta()).isfinite().all()):
            raise ValueError(f"{name}: its weight or adapter holds NaN or infinity")
    merges: dict[str, LayerMerge] = {}

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if name not in layers:
            return None
        merged, merges[name] = _merge(layers[name])
        return merged

    replace_modules(model, convert)
    return MergeReport(merges)


def _merge(layer: LoRALinear) -> tuple[nn.Linear, LayerMerge]:
    base, delta = layer.base, layer.delta()
    if isinstance(base, nn.Linear):
        merged, size = base, base.weight.nbytes
        codes, hat = _quantized(base)
        wanted = hat + delta
        base.weight.add_(delta)
        new_codes, new_hat = _quantized(base)
    else:
        size, codes, wanted = base.weight_bytes, base.codes(), base.dequantize() + delta
        merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(wanted.to(base.dtype), requires_grad=False)
        merged.register_parameter("bias", base.bias)
        merged.train(layer.training)
        again = _frozen(merged, getattr(base, "recipe", None))
        new_codes, new_hat = again.codes(), again.dequantize()
    off, norm = float((new_hat - wanted).norm()), float(wanted.norm())
    changed = float((new_codes != codes).float().mean())
    error = off / norm if norm else (math.inf if off else 0.0)
    return merged, LayerMerge(error, changed, size, merged.weight.nbytes)


def _quantized(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """The codes (in full precision a constant 0) and the fp32 weight of the forward."""
    if isinstance(linear, QATLinear):
        codes, scale, zero_point = linear.quantize()
        return codes, dequantize(codes, scale, zero_point, linear.recipe.group_size)
    if isinstance(linear, BitLinear):
        codes, scale = linear.quantize()
        return codes, dequantize_ternary(codes, scale, linear.group_size)
    return linear.weight.new_zeros(()), linear.weight.float()
