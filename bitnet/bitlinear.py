"""The ternary layer for training, and how a training step quantizes each tensor only once.

A BitLinear *is* an nn.Linear whose forward quantizes. Its state dict has the same names, so a
checkpoint fits both. Alone, it quantizes its input and its weight in every forward. A training
step would compute many of these codes twice; these functions compute them once, bit for bit equal:

    with weights_quantized(model):            # each weight once for all micro-batches
        x = shared_input(x, q, k, v)         # an input once for all layers that take it
        q(x), k(x), v(x)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from bitnet.elementwise import RMSNorm
from bitnet.gathered import Gather, TernaryShard, codes_of_gathered, quantized
from bitnet.modules import computed_parameter, is_dtensor, is_plain
from bitnet.placement import CalledLayer, by_its_kind, is_unusual
from bitnet.quant import (
    GradMask,
    Granularity,
    Int8Backward,
    QuantizedInput,
    TernaryWeight,
    absmean_ternary,
    check_granularity,
    check_int8_backward,
    check_mask,
    quantize_input,
    quantize_weight,
    ternary_linear_ste,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class BitLinear(CalledLayer, nn.Linear):
    """A drop-in for ``nn.Linear`` with ternary weights and int8 activations (BitNet b1.58).

    The forward is exact integer arithmetic and one fp32 rescale. The backward is
    straight-through. :mod:`bitnet.quant` has the formulas.

    Arguments:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``. Keep the latent weights
            fp32: at |w| ~ 0.02 bf16 loses updates below 6e-5. For bf16 use autocast.
        granularity: one weight scale per ``"tensor"`` (b1.58), ``"row"`` or ``"group"``.
        group_size: columns per group, for ``"group"``.
        norm: normalize the input with a learned RMSNorm first (as in Microsoft's "Training
            Tips"); the norm's weight is ``rms_norm.weight``.
        norm_eps: epsilon of that norm.
        grad_mask, grad_mask_c: which latent weights receive a gradient.
        int8_backward: compute gradients in int8, an approximation. These three options are
            explained in :func:`bitnet.quant.ternary_linear_ste`.
    Shapes:
        input ``[..., in_features]`` -> ``[..., out_features]``; empty batches included.
    Raises:
        TypeError, ValueError: the input is not floating point, or its last dimension is wrong.
        A NaN or infinity in a token raises nothing; it makes only that token's outputs NaN.
    """

    rms_norm: RMSNorm | None
    int8_backward: Int8Backward = "none"  # for layers pickled before this attribute existed
    _cached_codes: "_CachedCodes | None" = None
    called = False
    """Whether an eager forward has run; see :func:`bitnet.coverage`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        granularity: Granularity = "tensor",
        group_size: int = 128,
        norm: bool = False,
        norm_eps: float = 1e-5,
        grad_mask: GradMask = "none",
        grad_mask_c: float = 1.0,
        int8_backward: Int8Backward = "none",
    ) -> None:
        check_options(in_features, out_features, granularity, group_size)
        check_int8_backward(int8_backward, granularity)
        check_mask(grad_mask, grad_mask_c, "grad_")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.granularity: Granularity = granularity
        self.group_size = group_size
        self.grad_mask: GradMask = grad_mask
        self.grad_mask_c = grad_mask_c
        self.int8_backward = int8_backward
        self.rms_norm = RMSNorm(in_features, norm_eps, device=device, dtype=dtype) if norm else None

    def forward(self, input: Tensor | QuantizedInput) -> Tensor:
        """float ``[..., in_features]`` -> ``[..., out_features]``, differentiable.

        A layer without an inner norm also takes the result of :func:`bitnet.quant.quantize_input`.
        """
        if not torch.compiler.is_compiling() and not self.called:
            self.called = True
        if isinstance(input, Tensor) and is_unusual(input):
            return by_its_kind(self, input)
        if self.rms_norm is not None:
            if isinstance(input, QuantizedInput):
                raise TypeError(
                    "input: expected a tensor, since the layer's norm comes before quantization"
                )
            input = self.rms_norm(input)
        linear: Callable[..., Tensor] = ternary_linear_ste
        if is_dtensor(self.weight):  # tensor parallelism
            from bitnet.sharded import sharded_linear as linear
        return linear(
            input,
            self.weight,
            self.bias,
            self.granularity,
            self.group_size,
            self.grad_mask,
            self.grad_mask_c,
            quantized=self._valid_cached_codes(),
            int8_backward=self.int8_backward,
        )

    def _valid_cached_codes(self) -> TernaryWeight | None:
        """Return the codes that :func:`weights_quantized` cached for the weight of this forward.

        None for an exported or traced forward, which outlives the block.
        """
        if (gathered := codes_of_gathered(self.weight)) is not None:
            return gathered
        held = self._cached_codes
        if held is None or torch.compiler.is_exporting():
            return None
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            return None
        if held.weight is not self.weight:  # torch.func.functional_call passes another
            return None
        if not torch.compiler.is_compiling():
            held.check(self.weight)
        return held.quantized

    def __getstate__(self) -> dict[str, Any]:
        """Drop the cached codes: a copy made inside :func:`weights_quantized` has none."""
        return self.__dict__ | {"_cached_codes": None}

    @torch.no_grad()
    def quantize(self) -> tuple[Tensor, Tensor]:
        """Return the codes, int8 ``[N, K]``, and the scale that the forward uses now."""
        return absmean_ternary(self.weight, self.granularity, self.group_size)

    def extra_repr(self) -> str:
        """Show what ``nn.Linear`` shows, and the granularity."""
        return f"{super().extra_repr()}, granularity={self.granularity}"


class _CachedCodes(NamedTuple):
    """Codes of a layer's weight, and the state that shows whether the weight has changed since."""

    quantized: TernaryWeight
    layer_name: str
    weight: Tensor
    memory: Tensor
    """An alias of the weight; while it is kept, no other tensor can get the same address."""
    state: tuple[Any, ...]

    @classmethod
    def of(cls, layer: BitLinear, name: str, quantized: TernaryWeight) -> "_CachedCodes":
        weight = layer.weight
        return cls(quantized, name, weight, weight.detach(), _state(weight))

    def check(self, weight: Tensor) -> None:
        if weight is not self.weight or _state(weight) != self.state:
            raise RuntimeError(
                f"{self.layer_name or 'model'}.weight: changed inside weights_quantized(), so its "
                "cached codes are wrong; leave the block before an optimizer's step"
            )


def _state(weight: Tensor) -> tuple[Any, ...]:
    """Return values that differ after a change of the weight. The version counts in-place changes
    (tensors made in inference mode have none). ``model.bfloat16()`` and ``weight.data = ...``
    change dtype, device or address."""
    version = 0 if weight.is_inference() else weight._version
    return version, weight.dtype, weight.device, weight.data_ptr()


@contextmanager
def weights_quantized(model: nn.Module) -> Iterator[None]:
    """Quantize the weight of each BitLinear once for all forwards and backwards inside the block.

    Use it around the micro-batches of a step, eager or compiled. The results are the same to the
    last bit. The codes take one byte per weight.

        with weights_quantized(model):
            for inputs, targets in micro_batches:
                loss(model(inputs), targets).backward()
        optimizer.step()

    Blocks can be nested. Layers whose weight is computed (by a parametrization) are left out.

    Raises:
        RuntimeError: a weight (named) changed inside the block: the next eager forward or the end
            of the block raises. Or an optimizer of that weight is about to step, since a fused
            optimizer's changes cannot be detected. In-place changes of ``weight.data`` bypass
            autograd and are not detected.
    """
    entered: list[BitLinear] = []

    def refuse(optimizer: Optimizer, *_: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in entered:
            if layer._cached_codes is not None and id(layer.weight) in stepped:
                raise RuntimeError(
                    f"{layer._cached_codes.layer_name or 'model'}.weight: an optimizer's step "
                    "inside weights_quantized() makes the cached codes wrong; step after the block"
                )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        bare = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, BitLinear)
            and layer._cached_codes is None
            and not computed_parameter(layer)
        }
        gathered = _in_fsdp(model, bare)  # FSDP2 makes a new weight for each forward
        own = {name: layer for name, layer in bare.items() if layer not in gathered}
        for name, weight in _quantized(own):
            layer = own[name]
            layer._cached_codes = _CachedCodes.of(layer, name, weight)
            entered.append(layer)
        with quantized([layer.weight for layer in gathered]):
            yield
        for layer in entered:
            assert layer._cached_codes is not None
            layer._cached_codes.check(layer.weight)
    finally:
        hook.remove()
        for layer in entered:
            layer._cached_codes = None


def gather_codes(model: nn.Module, as_codes: bool) -> None:
    """Prepare the BitLinears of a model for FSDP2, before it divides their weights. FSDP2 then
    gathers packed codes, or latent weights from which codes are made (:mod:`bitnet.gathered`).

    If tensor parallelism has divided a matrix, FSDP2 divides and gathers this process's part. If
    it gathers latent weights, the layer itself makes the codes of that part
    (:mod:`bitnet.sharded`). A layer whose gradient mask needs the latent weights is left as it is,
    and FSDP2 gathers its latent weights."""
    for layer in model.modules():
        if not isinstance(layer, BitLinear) or layer.grad_mask != "none":
            continue
        recipe = _recipe(layer)
        if not is_dtensor(layer.weight):
            gather = Gather(len(layer.weight), *recipe, as_codes)
            layer.weight = nn.Parameter(TernaryShard.of(layer.weight, gather))
        elif as_codes:
            from bitnet.sharded import parts_of

            divided: Any = layer.weight.detach()
            part = divided._local_tensor
            gather = Gather(len(part), *recipe, as_codes, parts_of(divided))
            divided._local_tensor = TernaryShard.of(part, gather)
            layer.weight = nn.Parameter(divided)


def _in_fsdp(model: nn.Module, layers: dict[str, BitLinear]) -> list[BitLinear]:
    """The layers whose weights FSDP2 divides."""
    divided = [layer for layer in layers.values() if is_dtensor(layer.weight)]
    if not divided:
        return []
    from torch.distributed.fsdp import FSDPModule

    roots = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inside = {child for root in roots for child in cast("nn.Module", root).modules()}
    return [layer for layer in divided if layer in inside]


def _quantized(layers: dict[str, BitLinear]) -> Iterator[tuple[str, TernaryWeight]]:
    """Quantize the weight of each layer. All weights that tensor parallelism divides are quantized
    together."""
    divided = {name: layer for name, layer in layers.items() if is_dtensor(layer.weight)}
    for name, layer in layers.items():
        if name not in divided:
            yield name, quantize_weight(layer.weight, *_recipe(layer))
    if divided:
        from bitnet.sharded import Recipe, quantize_weights

        weights = [cast("DTensor", layer.weight) for layer in divided.values()]
        recipes = [Recipe(*_recipe(layer)) for layer in divided.values()]
        yield from zip(divided, quantize_weights(weights, recipes), strict=True)


def _recipe(layer: BitLinear) -> tuple[Granularity, int, Int8Backward]:
    return layer.granularity, layer.group_size, layer.int8_backward


def shared_input(x: Tensor, *layers: nn.Module) -> Tensor | QuantizedInput:
    """Return the input for calls of all ``layers``.

    If each layer is a plain BitLinear (:func:`is_plain`) without an inner norm, x is quantized here
    once. Otherwise the result is x itself, so that a hook or a subclass sees the same input as in
    an ``nn.Linear``.
    """
    weights = [
        layer.weight
        for layer in layers
        if is_plain(layer, BitLinear) and isinstance(layer, BitLinear) and layer.rms_norm is None
    ]
    if len(weights) < len(layers):
        return x
    if any(is_dtensor(weight) for weight in weights):  # tensor parallelism
        from bitnet.sharded import shared_by_ranks

        return shared_by_ranks(x, weights)
    return quantize_input(x)


def check_options(
    in_features: int, out_features: int, granularity: Granularity, group_size: int
) -> None:
    """Raise ValueError for invalid sizes or an invalid granularity of a ternary layer."""
    if in_features < 1 or out_features < 1:
        raise ValueError(
            f"in_features, out_features: expected >= 1, got {in_features}, {out_features}"
        )
    check_granularity(granularity, group_size)
