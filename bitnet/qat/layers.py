"""Layers for quantization-aware training: float weights, quantized arithmetic.

    layer = QATLinear.from_float(nn.Linear(64, 32), Recipe(weights="int", bits=4))

A QAT layer *is* the torch layer it replaces: the same Parameters under the same names, so
optimizers, checkpoints and tied weights keep working. Its forward depends on two plain numbers,

    lambda_w, lambda_a = 0, 0     the float layer
    in between                    the float operation on w + lambda_w (w_hat - w), x likewise
    1, 1 (from the start)         the values of the integer layer

which a schedule may change (schedule.py). With 1, 1 the *value* is the exact integer product of the
codes (product.py), so the converted layer (integer.py) gives the same outputs to the last bit. The
*gradient* is that of the float operation at x_hat and w_hat, passed straight-through. Without
quantized activations (``activations = "none"``) the value is the float operation on w_hat.

With BitNet's recipe a QATLinear equals a :class:`bitnet.BitLinear` to the last bit, including
gradients.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.placement import CalledLayer, by_its_kind, is_unusual
from bitnet.qat.activations import fake_quantize_activation, static_range
from bitnet.qat.grid import Codes
from bitnet.qat.observers import Observer, make_observer
from bitnet.qat.product import ConvOp, LinearOp, Op, exact_product
from bitnet.qat.recipe import Recipe
from bitnet.quant import output_dtype, ternary_linear_ste


class QATLayer(CalledLayer, nn.Module):
    """The base class of QAT layers; ``from_float`` makes them.

    Attributes:
        recipe: what is quantized, and how.
        lambda_w, lambda_a: how far weights and activations are quantized, 0 to 1.
        weight_step: the learned scale of "lsq" and "seq*", else None. Stays fp32 under
            ``.to(dtype)``.
        input_observer: the observer of static activations, else None. It observes in training
            mode until it is frozen.
    """

    recipe: Recipe
    lambda_w: float
    lambda_a: float
    weight: Tensor
    weight_step: nn.Parameter | None
    input_observer: Observer | None
    called = False
    """Whether an eager forward has run; see :func:`bitnet.coverage`."""

    def _mark_called(self) -> None:
        if not torch.compiler.is_compiling() and not self.called:
            self.called = True

    def _adopt(self, module: nn.Module, recipe: Recipe, observed: bool) -> Self:
        """Take over a module's weight, bias and mode."""
        for name, parameter in module.named_parameters(recurse=False):
            setattr(self, name, parameter)
        self.recipe, self.lambda_w, self.lambda_a = recipe, 1.0, 1.0
        step = None
        if recipe.quantizer.learned:
            matrix, quantizer = self.weight.flatten(1), recipe.quantizer
            meta = matrix.is_meta
            start = (
                quantizer.without_values(matrix).scale if meta else quantizer.initial_step(matrix)
            )
            step = nn.Parameter(start, requires_grad=self.weight.requires_grad)
        self.weight_step = step
        observed = observed and recipe.static
        self.input_observer = make_observer(recipe).to(self.weight.device) if observed else None
        return self.train(module.training)

    @torch.no_grad()
    def initialize_step(self) -> None:
        """Set the learned scale, if there is one, from the present weights, for a schedule that
        quantizes after a phase of full precision."""
        if self.weight_step is not None:
            self.weight_step.copy_(self.recipe.quantizer.initial_step(self.weight.flatten(1)))

    @torch.no_grad()
    def quantize(self) -> Codes:
        """Codes int8 ``[N, K]``, scale and zero point (or None) of the present weight. A
        convolution's weight is the matrix ``[out_channels, in_channels / groups * kernel]``."""
        matrix, quantizer = self.weight.flatten(1), self.recipe.quantizer
        if matrix.is_meta:
            return quantizer.without_values(matrix)
        return quantizer.quantize(matrix, self.weight_step)

    def input_range(self, check: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Scale fp32 ``[]`` and zero point (or None) of static activations; else (None, None).

        Raises ValueError if the observer has seen nothing, unless ``check`` is false. The check
        may wait for the device.
        """
        observer, recipe = self.input_observer, self.recipe
        if observer is None:
            return None, None
        if check and not observer.calibrated():
            raise ValueError(
                "input_observer: has seen no input; run calibrate(), or train with the observer "
                f"unfrozen, first (a {type(self).__name__} of weight {list(self.weight.shape)})"
            )
        if observer.n_seen.is_meta:  # a layer without memory: see WeightQuantizer.without_values
            scale = torch.empty((), dtype=torch.float32, device="meta")
            zero = torch.empty((), dtype=torch.int32, device="meta")
            return scale, None if recipe.activation_symmetric else zero
        low, high = observer.range()
        return static_range(low, high, recipe.activation_bits, recipe.activation_symmetric)

    def _fake_weight(self) -> tuple[Codes, Tensor]:
        """The codes, and the differentiable fp32 matrix that the forward uses."""
        w = self.weight.flatten(1).float()  # a bf16 w_hat would round its scale
        codes, scale, zero_point, hat = self.recipe.quantizer.fake_quantize(w, self.weight_step)
        return Codes(codes, scale, zero_point), _between(w, hat, self.lambda_w)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        step = self.weight_step
        before = None if step is None else step.data
        gradient = None if step is None or step.grad is None else step.grad.data
        super()._apply(fn, recurse)
        step = self.weight_step
        if step is not None and before is not None and step.dtype != before.dtype:
            step.data = before.to(step.device)  # .to(dtype), .half(): move, but do not round
            step.grad = None if gradient is None else gradient.to(step.device)
        return self

    def extra_repr(self) -> str:
        """Show what the torch layer shows, and the recipe."""
        return f"{super().extra_repr()}, recipe={self.recipe}"


def _between(value: Tensor, hat: Tensor, share: float) -> Tensor:
    if share in (0, 1):
        return hat if share else value
    return torch.lerp(value, hat.to(value.dtype), share)


class ProductLayer(QATLayer):
    """A linear layer or a convolution."""

    bias: Any  # nn.Parameter | None; torch's layers disagree on its type
    op: Op

    def forward(self, input: Tensor) -> Tensor:
        """The torch layer's forward, quantized; under autocast in autocast's dtype.

        NaN or infinity in a token (for convolutions, in a sample) makes only that token's outputs
        NaN; with static activations, the outputs of the whole batch.

        Raises:
            TypeError, ValueError: an input with a wrong dtype or shape; a static range that is not
            calibrated (in training mode only if its observer is frozen or disabled).
        """
        self._mark_called()
        if is_unusual(input):
            return by_its_kind(self, input)
        observer, recipe = self.input_observer, self.recipe
        if observer is not None and self.training:
            observer.observe(input.detach())
        if self.lambda_w == self.lambda_a == 0:
            return super().forward(input)
        exact = self.lambda_w == self.lambda_a == 1 and not recipe.weights_only
        if exact and recipe.is_bitnet and isinstance(self.op, LinearOp):
            return self._bitnet(input)
        x = self.op.batched(input)
        w, w_used = self._fake_weight()
        if recipe.weights_only or self.lambda_a == 0:
            y = self.op.floating(x, w_used, self.bias, output_dtype(x))
            return self.op.unbatched(y, input)
        moves = self.training and observer is not None and not observer.frozen
        scale, zero_point = self.input_range(check=not moves)
        codes, s_x, z_x, x_hat = fake_quantize_activation(
            x, recipe, scale, zero_point, self.op.per_sample
        )
        if exact:
            x_codes = Codes(codes, s_x, z_x)
            y = exact_product(self.op, x_codes, x_hat, w, w_used, self.bias, recipe.group_size)
        else:
            x_used = _between(x, x_hat, self.lambda_a)
            y = self.op.floating(x_used, w_used, self.bias, output_dtype(x))
        return self.op.unbatched(y, input)

    def _bitnet(self, x: Tensor) -> Tensor:
        """The same values by BitLinear's function. It saves codes, not floats, for the backward
        and rounds gradients in BitLinear's order."""
        recipe = self.recipe
        return ternary_linear_ste(
            x,
            self.weight,
            self.bias,
            recipe.granularity,
            recipe.group_size,
            recipe.grad_mask,
            recipe.grad_mask_c,
        )


class QATLinear(ProductLayer, nn.Linear):
    """``nn.Linear`` under fake quantization: float ``[..., K]`` -> ``[..., N]``."""

    @classmethod
    def from_float(cls, module: nn.Linear, recipe: Recipe) -> Self:
        """Make a QAT layer with the same Parameters; hooks are dropped."""
        bias = module.bias is not None
        layer = cls(module.in_features, module.out_features, bias, "meta")
        layer.op = LinearOp(module.in_features, module.out_features)
        return layer._adopt(module, recipe, observed=True)


class _QATConv(ProductLayer):
    @classmethod
    def from_float(cls, module: nn.Conv1d | nn.Conv2d, recipe: Recipe) -> Self:
        """Make a QAT layer with the same Parameters; hooks are dropped. Raises ValueError for
        padding that is not zeros."""
        if module.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode: only 'zeros' has an integer form here, got {module.padding_mode!r}"
            )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        options: dict[str, Any] = {name: getattr(module, name) for name in (*names, "groups")}
        layer = cls(**options, bias=module.bias is not None, device="meta")
        layer.op = ConvOp.of(module)
        return layer._adopt(module, recipe, observed=True)


class QATConv1d(_QATConv, nn.Conv1d):
    """``nn.Conv1d`` under fake quantization: ``[B, C, L]`` or ``[C, L]``."""


class QATConv2d(_QATConv, nn.Conv2d):
    """``nn.Conv2d`` under fake quantization: ``[B, C, H, W]`` or ``[C, H, W]``."""


class QATEmbedding(QATLayer, nn.Embedding):
    """``nn.Embedding`` of quantized rows: int ``[...]`` -> ``[..., K]`` in the weight's dtype."""

    @classmethod
    def from_float(cls, module: nn.Embedding, recipe: Recipe) -> Self:
        """Make a QAT layer with the same Parameter; hooks are dropped. Raises ValueError for
        ``max_norm``, which rewrites the weight in the forward, and for sparse gradients, which have
        no straight-through form here. "sign" and "seq" have no code for 0, so their padding row is
        not 0."""
        if module.max_norm is not None or module.sparse:
            raise ValueError("an nn.Embedding with max_norm or sparse gradients is not supported")
        layer = cls(
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq,
            device="meta",
        )
        return layer._adopt(module, recipe, observed=False)

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows of w_hat; ``lambda_a`` has no effect here."""
        self._mark_called()
        if self.lambda_w == 0:
            return super().forward(input)
        _, w = self._fake_weight()
        rows = F.embedding(input, w, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return rows.to(self.weight.dtype)
