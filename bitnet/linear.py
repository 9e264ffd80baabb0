"""TernaryLinear for inference, and the functions that put it and BitLinear into a model.

    layer = BitLinear(512, 2048)     # nn.Linear's arguments; fp32 latent weights, ternary forward
    model = replace_linear(model)    # every nn.Linear of any model -> BitLinear
    ...train...
    model = pack(model)              # every BitLinear -> TernaryLinear, 2 bits per weight

BitLinear is in :mod:`bitnet.bitlinear`. A TernaryLinear has no latent weights, only packed codes
and an fp32 scale. Its outputs equal those of the BitLinear to the last bit, since both layers add
the same integers.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from bitnet.bitlinear import (
    BitLinear,
    check_options,
    shared_input,
    weights_quantized,
)
from bitnet.dequantized import dequantized
from bitnet.elementwise import RMSNorm
from bitnet.modules import (
    GATHER,
    REPLACE_FIRST,
    check_forward,
    check_patterns,
    check_whole,
    computed_parameter,
    disable_nested_tensors,
    holders,
    is_conv1d,
    kept_weights,
    matches,
    plain_linear,
    replace_modules,
    warn_never_called,
    why_full_precision,
)
from bitnet.packed import packed_linear
from bitnet.placement import CalledLayer, by_its_kind, is_unusual
from bitnet.quant import Granularity, QuantizedInput, dequantize, output_dtype
from bitnet_kernels import bit_planes, pack_ternary, unpack_ternary
from bitnet_kernels.packing import codes_of, packed_columns

__all__ = [
    "BitLinear",
    "Kernel",
    "RMSNorm",
    "TernaryLinear",
    "pack",
    "replace_linear",
    "shared_input",
    "weights_quantized",
]

Kernel = Literal["auto", "addsub", "dot", "reference"]
DEFAULT_SKIP = ("lm_head",)


class TernaryLinear(CalledLayer, nn.Module):
    """A packed ternary linear layer for inference: 2 bits per weight and an fp32 scale.

    Arguments:
        in_features, out_features, bias: as for ``nn.Linear``.
        granularity, group_size: one scale per tensor, row or group of columns.
        norm, norm_eps: an RMSNorm before the quantization, as in :class:`BitLinear`.
        kernel: ``"auto"`` (by device and shape), or the name of a family (``bitnet_kernels``).
    State:
        ``packed`` uint8 ``[N, ceil(K/64)*16]``, ``scale`` fp32 ``[]``, ``[N]`` or ``[N, G]``,
        ``bias``. The scale stays fp32 under ``.to(dtype)``: rounding it would change every logit.
        ``"addsub"`` also keeps the codes as bit planes, which doubles the memory. The planes are
        made when weights are set or loaded, and never saved.
        Gradients flow through the layer to its input (:mod:`bitnet.packed`).
    Attributes:
        dtype: dtype of :attr:`weight`: the latent weight's, until ``.to(dtype)`` changes it.
    """

    dtype = torch.float32

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
        zeros = torch.full(  # each byte holds four weights of 0
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
        """Make a layer from int8 codes ``[N, K]`` and their fp32 scale; neither is computed again.
        Raises ValueError if the dtype or shape of the scale does not fit."""
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
        """Pack a trained layer. Raises ValueError if its weights are not finite."""
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
        layer.rms_norm, layer.dtype = linear.rms_norm, linear.weight.dtype
        return layer.train(linear.training)

    def _lay_out(self, *_: Any) -> None:
        """Update the second layout of the weights, if the kernel uses one."""
        self.planes = bit_planes(self.packed) if self.kernel == "addsub" else None

    def codes(self) -> Tensor:
        """Return the unpacked codes, int8 ``[N, K]``."""
        return unpack_ternary(self.packed, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dequantized ``[N, K]``, computed when its values are used
        (:mod:`bitnet.dequantized`)."""
        shape = self.out_features, self.in_features
        return dequantized(self._dequantize, shape, self.dtype, self.packed.device)

    def _dequantize(self) -> Tensor:
        # codes_of, unlike unpack_ternary, does not check the values: compiled code cannot
        codes = codes_of(self.packed, self.in_features)
        return dequantize(codes, self.scale, self.group_size)

    def forward(self, input: Tensor | QuantizedInput) -> Tensor:
        """float ``[..., in_features]`` -> ``[..., out_features]``, differentiable in the input."""
        if isinstance(input, Tensor) and is_unusual(input):
            return by_its_kind(self, input)
        # the kernel quantizes the values again, to the same codes
        x = input.values if isinstance(input, QuantizedInput) else input
        if x.dim() == 0 or x.shape[-1] != self.in_features:  # padding would hide a short row
            raise ValueError(
                f"input: expected shape [..., {self.in_features}], got {list(x.shape)}"
            )
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        y = packed_linear(
            x, self.packed, self.scale, self.bias, self.kernel, self.group_size, self.planes
        )
        return y.to(output_dtype(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TernaryLinear":
        scale = self.scale
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # .to(dtype), .half(): move, but do not round
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Show sizes, granularity, kernel, and the bytes of all layouts of the codes."""
        planes = 0 if self.planes is None else self.planes.nbytes
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, granularity={self.granularity}, kernel={self.kernel}, "
            f"weight_bytes={self.packed.nbytes + planes}"
        )


def _constant(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without a gradient: packed layers are not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def replace_linear(
    model: nn.Module,
    skip: str | Sequence[str] = DEFAULT_SKIP,
    *,
    also: type[nn.Linear] | Sequence[type[nn.Linear]] = (),
    **options: Any,
) -> nn.Module:
    """Replace every ``nn.Linear`` by a :class:`BitLinear` with the same parameters, in place.

    Only plain ``nn.Linear`` modules are replaced, since a subclass may use its weight differently:
    ``nn.MultiheadAttention`` never *calls* its output projection, so a BitLinear there would
    change nothing. The ``Conv1D`` of transformers (GPT-2) is replaced too, by a layer with the
    transposed weight; checkpoints saved before the replacement no longer fit.
    :func:`bitnet.coverage` lists the layers that were replaced and the rest. Hooks on a replaced
    module are dropped.

    Arguments:
        model: any module; an ``nn.Linear`` itself is replaced by the returned BitLinear.
        skip: modules to leave in full precision, by name, path or pattern (``"lm_head"``,
            ``"layers.0.mlp.*"``, ``"*.gate"``).
        also: subclasses of ``nn.Linear`` to replace as well; their own forward is lost.
        options: keyword arguments of BitLinear (``granularity``, ``norm``, ...).
    Raises:
        TypeError: ``also`` holds anything but subclasses of ``nn.Linear``.
        ValueError: nothing is replaced and the model has no ternary layer yet; a name in ``skip``
            matches no module; a layer is empty or lazy; a hook or a parametrization computes its
            weight or bias.
    Warns:
        UserWarning: more than half of the weights that could be ternary are not.
    """
    check_whole(model, REPLACE_FIRST)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if skip != DEFAULT_SKIP:
        check_patterns(model, skip, "skip")
    skipped = {  # a module may have several names
        id(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if matches(name, skip)
    }
    also = (also,) if isinstance(also, type) else tuple(also)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Linear) for kind in also):
        raise TypeError(f"also: expected subclasses of nn.Linear, got {also!r}")
    BitLinear(1, 1, device="meta", **options)  # wrong options raise here, without a layer's name
    kinds, transposed = (nn.Linear, *also), dict[int, nn.Parameter]()

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        replaceable = type_before_parametrizations(module) in kinds or is_conv1d(module)
        if id(module) in skipped:
            return None
        if isinstance(module, nn.LazyLinear):
            raise ValueError(f"{name or 'model'}: a LazyLinear {why_full_precision(module)}")
        if not replaceable:
            return None
        if computed := computed_parameter(module):
            raise ValueError(
                f"{name or 'model'}: its {computed} is computed by a hook "
                "(weight_norm, pruning, ...); remove the hook first"
            )
        module = plain_linear(module, transposed)
        try:
            linear = BitLinear(
                module.in_features, module.out_features, module.bias is not None, "meta", **options
            )
        except ValueError as error:
            raise ValueError(f"{name or 'model'}: {error}; leave it in skip") from error
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
    _check_replaced(model, skipped)
    disable_nested_tensors(model)
    return model


def _check_replaced(model: nn.Module, skipped: set[int]) -> None:
    """Raise ValueError if no layer is ternary. Warn if most weights are not ternary; modules in
    ``skip``, embeddings and convolutions do not count."""
    ternary = full = 0
    for _, module, weights in holders(model):
        if isinstance(module, BitLinear):
            ternary += weights
        elif id(module) not in skipped and not isinstance(module, nn.Embedding | _ConvNd):
            full += weights
    if not any(isinstance(module, BitLinear | TernaryLinear) for module in model.modules()):
        raise ValueError(f"model: no layer was replaced; it has {kept_weights(model)}")
    if 0 < ternary < full:
        warnings.warn(
            f"replace_linear: {ternary:,} weights are ternary, {full:,} others are not "
            "(print bitnet.coverage(model) to see why)",
            stacklevel=3,
        )


def pack(model: nn.Module, kernel: Kernel = "auto") -> nn.Module:
    """Replace every :class:`BitLinear` by its packed :class:`TernaryLinear`, in place.

    An already packed model, with no BitLinear left, is returned unchanged.

    Arguments:
        model: any module; a BitLinear itself is replaced by the returned TernaryLinear.
        kernel: which kernel the packed layers use.
    Raises:
        ValueError: the model has neither a BitLinear nor a TernaryLinear; a layer has weights that
            are not finite, or belongs to a subclass that overrides ``forward`` (named); FSDP or
            tensor parallelism has sharded the model.
    Warns:
        UserWarning: no forward has called a layer (named), but other layers were called.
    """
    check_whole(model, GATHER)
    if not any(isinstance(module, BitLinear | TernaryLinear) for module in model.modules()):
        raise ValueError(
            f"model: no layer was packed: it has no BitLinear, but {kept_weights(model)}; "
            "replace_linear() makes BitLinear layers (what prepare() made, convert() packs)"
        )
    warn_never_called(model, BitLinear)

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BitLinear):
            return None
        try:
            check_forward(module, BitLinear)
            return TernaryLinear.from_bitlinear(module, kernel)
        except ValueError as error:
            raise ValueError(f"{name or 'model'}.{error}") from error

    return replace_modules(model, convert)
