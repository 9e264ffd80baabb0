"""TernaryLinear for inference, and what puts it and BitLinear into a model.

    layer = BitLinear(512, 2048)     # nn.Linear's arguments; latent fp32 weights, ternary maths
    model = replace_linear(model)    # every nn.Linear of any model -> BitLinear
    ...train...
    model = pack(model)              # every BitLinear -> TernaryLinear, 2 bits a weight

BitLinear stands in :mod:`bitnet.bitlinear`. A TernaryLinear has no latent weights; it holds packed
codes and an fp32 scale and gives the same outputs to the last bit, since both add the same
integers.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from bitnet.bitlinear import (
    BitLinear,
    check_options,
    computed_parameter,
    hooked,
    is_plain,
    shared_tokens,
    weights_quantized,
)
from bitnet.elementwise import RMSNorm
from bitnet.quant import Granularity, Tokens, output_dtype
from bitnet_kernels import bit_planes, pack_ternary, ternary_linear, unpack_ternary
from bitnet_kernels.packing import packed_columns

__all__ = [
    "BitLinear",
    "Kernel",
    "RMSNorm",
    "TernaryLinear",
    "check_patterns",
    "computed_parameter",
    "disable_fused_encoder",
    "hooked",
    "is_plain",
    "matches",
    "pack",
    "replace_linear",
    "replace_modules",
    "shared_tokens",
    "weights_quantized",
]

Kernel = Literal["auto", "addsub", "dot", "reference"]
DEFAULT_SKIP = ("lm_head",)


class TernaryLinear(nn.Module):
    """A packed ternary linear layer, for inference: 2 bits a weight and an fp32 scale.

    Arguments:
        in_features, out_features, bias: as ``nn.Linear``.
        granularity, group_size: of the scale.
        norm, norm_eps: an RMSNorm before the quantization, as in :class:`BitLinear`.
        kernel: ``"auto"`` by device and shape, or one family by name (``bitnet_kernels``).
    State:
        ``packed`` uint8 ``[N, ceil(K/64)*16]``, ``scale`` fp32 ``[]``, ``[N]`` or ``[N, G]``,
        ``bias``. The scale stays fp32 under ``.to(dtype)``: rounding it moves every logit.
        ``"addsub"`` keeps the codes a second time, as bit planes, and so twice the memory; they
        are made when weights are set or loaded, and never saved.
    """

    packed: Tensor
    planes: Tensor | None
    scale: Tensor
    bias: nn.Parameter | None
    rms_norm: RMSNorm | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        *,
        granularity: Granularity = "tensor",
        group_size: int = 128,
        norm: bool = False,
        norm_eps: float = 1e-5,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.granularity: Granularity = granularity
        self.group_size = group_size
        self.kernel: Kernel = kernel
        check_options(in_features, out_features, granularity, group_size)
        if kernel not in (kernels := get_args(Kernel)):
            raise ValueError(f"kernel: expected one of {', '.join(kernels)}, got {kernel!r}")
        if granularity == "group" and kernel not in ("auto", "reference"):
            raise ValueError(f"kernel: {kernel!r} has no group-wise scales; use 'auto'")
        shape = {
            "tensor": (),
            "row": (out_features,),
            "group": (out_features, -(-in_features // group_size)),
        }[granularity]
        zeros = torch.full(  # four weights of 0 in each byte
            (out_features, packed_columns(in_features)),
            0b01010101,
            dtype=torch.uint8,
            device=device,
        )
        self.register_buffer("packed", zeros)
        self.register_buffer("planes", None, persistent=False)
        self._lay_out()
        self.register_load_state_dict_post_hook(TernaryLinear._lay_out)
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float32, device=device))
        fp32 = torch.float32
        self.bias = (
            _constant(torch.zeros(out_features, dtype=fp32, device=device)) if bias else None
        )
        self.rms_norm = RMSNorm(in_features, norm_eps, device=device, dtype=fp32) if norm else None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        granularity: Granularity = "tensor",
        group_size: int = 128,
        kernel: Kernel = "auto",
    ) -> "TernaryLinear":
        """From int8 codes ``[N, K]`` and their fp32 scale, taken as they are: nothing is
        estimated again. Raises ValueError where a scale or its shape does not fit."""
        layer = cls(
            codes.shape[1],
            codes.shape[0],
            bias is not None,
            codes.device,
            granularity=granularity,
            group_size=group_size,
            kernel=kernel,
        )
        if scale.shape != layer.scale.shape or scale.dtype != torch.float32:
            raise ValueError(
                f"scale: expected float32 {list(layer.scale.shape)} for granularity "
                f"{granularity!r}, got {scale.dtype} {list(scale.shape)}"
            )
        layer.packed, layer.scale = pack_ternary(codes), scale.detach().clone()
        layer._lay_out()
        if layer.bias is not None and bias is not None:
            layer.bias = _constant(bias.detach().clone())
        return layer

    @classmethod
    def from_bitlinear(cls, linear: BitLinear, kernel: Kernel = "auto") -> "TernaryLinear":
        """The packed form of a trained layer; raises ValueError if its weights are not finite."""
        codes, scale = linear.quantize()
        if not bool(scale.isfinite().all()):
            raise ValueError("weight: holds NaN or infinity; such a layer has no ternary form")
        layer = cls.from_codes(
            codes,
            scale,
            linear.bias,
            granularity=linear.granularity,
            group_size=linear.group_size,
            kernel=kernel,
        )
        layer.rms_norm = linear.rms_norm
        return layer.train(linear.training)

    def _lay_out(self, *_: Any) -> None:
        """Make the second layout of the weights anew, where the kernel has one."""
        self.planes = bit_planes(self.packed) if self.kernel == "addsub" else None

    def codes(self) -> Tensor:
        """The unpacked codes, int8 ``[N, K]``."""
        return unpack_ternary(self.packed, self.in_features)

    def forward(self, input: Tensor | Tokens) -> Tensor:
        """float ``[..., in_features]`` -> ``[..., out_features]``; no gradient."""
        x = input.values if isinstance(input, Tokens) else input  # kernels find the same codes
        if x.dim() == 0 or x.shape[-1] != self.in_features:  # packed rows are padded
            raise ValueError(
                f"input: expected shape [..., {self.in_features}], got {list(x.shape)}"
            )
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        y = ternary_linear(
            x,
            self.packed,
            self.scale,
            self.bias,
            self.kernel,
            group_size=self.group_size,
            planes=self.planes,
        )
        return y.to(output_dtype(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TernaryLinear":
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # .to(dtype), .half(): move, but do not round
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, granularity, kernel, and the bytes that its layouts of the codes take."""
        planes = 0 if self.planes is None else self.planes.nbytes
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, granularity={self.granularity}, kernel={self.kernel}, "
            f"weight_bytes={self.packed.nbytes + planes}"
        )


def _constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that takes no gradient: packed layers have no backward."""
    return nn.Parameter(tensor, requires_grad=False)


def replace_linear(
    model: nn.Module, skip: str | Sequence[str] = DEFAULT_SKIP, **options: Any
) -> nn.Module:
    """Replace every ``nn.Linear`` by a :class:`BitLinear` with the same parameters, in place.

    Only plain ``nn.Linear`` modules are replaced: a subclass may use its weight in its own way
    (the output projection of ``nn.MultiheadAttention`` is never *called*, so a BitLinear there
    would change nothing). Hooks on a replaced module are not carried over. The fused inference
    path of ``nn.TransformerEncoder`` reads its layers' weights past their forward; it is switched
    off where a layer is replaced.

    Arguments:
        model: any module; an ``nn.Linear`` itself is replaced by the returned BitLinear.
        skip: names to leave in full precision: a module's own name, its path, or a pattern
            (``"lm_head"``, ``"layers.0.mlp.*"``, ``"*.gate"``).
        options: BitLinear's keywords (``granularity``, ``norm``, ...).
    Raises:
        ValueError: a name in ``skip`` that no module has; a layer whose weight or bias a hook or a
            parametrization computes.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if skip != DEFAULT_SKIP:
        check_patterns(model, skip, "skip")
    skipped = {  # under any of its names
        id(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if matches(name, skip)
    }

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        plain = type_before_parametrizations(module) is nn.Linear
        if not (isinstance(module, nn.Linear) and plain) or id(module) in skipped:
            return None
        if computed := computed_parameter(module):
            raise ValueError(f"{name}: its {computed} is computed by a hook (weight_norm, ...)")
        linear = BitLinear(
            module.in_features, module.out_features, module.bias is not None, "meta", **options
        )
        if linear.rms_norm is not None:
            linear.rms_norm = RMSNorm(
                module.in_features,
                linear.rms_norm.eps,
                device=module.weight.device,
                dtype=torch.float32,
            )
        linear.weight, linear.bias = module.weight, module.bias
        return linear.train(module.training)

    model = replace_modules(model, convert)
    disable_fused_encoder(model)
    return model


def pack(model: nn.Module, kernel: Kernel = "auto") -> nn.Module:
    """Replace every :class:`BitLinear` by its packed :class:`TernaryLinear`, in place.

    Arguments:
        model: any module; a BitLinear itself is replaced by the returned TernaryLinear.
        kernel: which kernel the packed layers use.
    Raises:
        ValueError: a layer whose weights are not finite (named).
    """

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BitLinear):
            return None
        try:
            return TernaryLinear.from_bitlinear(module, kernel)
        except ValueError as error:
            raise ValueError(f"{name or 'model'}.{error}") from error

    return replace_modules(model, convert)


def replace_modules(
    model: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Swap modules for what ``convert(name, module)`` returns (None: keep it), in place; a module
    used twice stays one module. Returns the model, or what it was itself replaced by."""
    replaced: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if (new := convert(name, module)) is not None:
            replaced[id(module)] = new
    if id(model) in replaced:
        return replaced[id(model)]
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replaced:
                setattr(parent, child_name, replaced[id(child)])
    return model


def disable_fused_encoder(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` from reading its layers' weights past their forward, as its
    fused inference path does."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused path runs only for 1 and 2
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's path, or its own name, is one of ``patterns``."""
    own_name = name.rpartition(".")[2]
    return any(fnmatch(name, pattern) or own_name == pattern for pattern in patterns)


def check_patterns(model: nn.Module, patterns: Sequence[str], key: str) -> None:
    """Raise ValueError, naming ``key`` and the nearest name, for a pattern that no module has."""

    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    known = {*paths, *(path.rpartition(".")[2] for path in paths)}
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in paths):
            near = get_close_matches(pattern, known, 1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"{key}: no module is named {pattern!r}{hint}")
