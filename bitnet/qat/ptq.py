"""Post-training quantization (PTQ): round a trained model, without training it further.

    quantized = round_to_nearest(model, recipe)          each weight on its own
    quantized = gptq(model, recipe, calibration)         gptq.py: rounding errors compensated
    quantized = awq(model, recipe, calibration)          awq.py: channels rescaled, by search
    quantized = smoothquant(model, recipe, calibration)  smoothquant.py: rescaled, by a formula

These are the baselines of quantization-aware training. All take a full-precision
:class:`bitnet.model.Transformer`, do not change it, and return a copy in eval mode whose selected
matrices are integer layers. The copy runs, is saved and reports sizes like a converted QAT model,
so methods differ only in codes and scales.

The methods share :func:`sites` (the matrices of a block that read the same input, with its
producer) and :class:`Walk`, which passes the calibration tokens through the layers and keeps the
inputs of one block at a time. The methods need only sums over a layer's inputs: mean and maximum of
|x_j|, and X^T X.

S windows, T tokens each, K in_features, N out_features.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet.elementwise import RMSNorm
from bitnet.model import Block, Transformer, as_transformer, rotary
from bitnet.qat.grid import Codes
from bitnet.qat.integer import integer_layer
from bitnet.qat.layers import QATLayer, QATLinear
from bitnet.qat.prepare import calibrate, convert, prepare
from bitnet.qat.quantizers import WEIGHT_QUANTIZERS
from bitnet.qat.recipe import Recipe

OnLayer = Callable[[int, int], None]
"""Called after each layer with the numbers of done and of all layers."""
_TOKENS_AT_ONCE = 8192


@torch.no_grad()
def round_to_nearest(
    model: Transformer, recipe: Recipe, calibration: Tensor | None = None
) -> Transformer:
    """Round every selected weight to its nearest code: ``convert(prepare(copy of model, recipe))``.

    Arguments:
        calibration: int64 ``[S, T]``; needed for static activations, else ignored.
    Raises:
        ValueError: as :func:`check_model`; no calibration although the activations need it.
    """
    check_model(model)
    work = as_transformer(prepare(copy.deepcopy(model), recipe))
    if recipe.static:
        if calibration is None:
            raise ValueError("calibration: static activations need some")
        check_calibration(model, calibration)
        calibrate(work, calibration.split(max(1, _TOKENS_AT_ONCE // calibration.shape[1])))
    return as_transformer(convert(work)).eval()


def check_model(model: Transformer) -> None:
    """Raise ValueError, with the reason, for a model that these methods cannot start from."""
    if model.config.norm_placement == "in_linear":
        raise ValueError(
            "model: norm_placement = 'in_linear' has its norms inside the linear layers, which "
            "post-training quantization here does not handle; use 'sub_norm' or 'pre_norm'"
        )
    for i, block in enumerate(blocks(model)):
        for name in model.config.matrices():
            layer = block.get_submodule(name)
            if type(layer) is not nn.Linear:
                raise ValueError(
                    f"model: layers.{i}.{name} is a {type(layer).__name__}; post-training "
                    "quantization starts from full precision (linear = 'fp')"
                )
            if not bool(layer.weight.isfinite().all()):
                raise ValueError(f"model: layers.{i}.{name}.weight holds NaN or infinity")


def check_calibration(model: Transformer, calibration: Tensor) -> None:
    """Raise ValueError for anything but int64 ``[S, T]`` of the model's tokens, S and T >= 1."""
    config = model.config
    if calibration.dim() != 2 or calibration.dtype != torch.int64 or calibration.numel() == 0:
        raise ValueError(
            "calibration: expected int64 [windows, tokens], neither of them 0, got "
            f"{calibration.dtype} {list(calibration.shape)}"
        )
    if calibration.shape[1] > config.max_seq_len:
        raise ValueError(
            f"calibration: windows of {calibration.shape[1]} tokens exceed the model's context of "
            f"{config.max_seq_len}"
        )
    low, high = int(calibration.min()), int(calibration.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"calibration: tokens {low}..{high} are not within the vocabulary of "
            f"{config.vocab_size}"
        )


def check_rounding(method: str, recipe: Recipe) -> None:
    """Raise ValueError for weights that a column-by-column method does not support."""
    if not recipe.quantizer.rounds_columns:
        taken = [repr(name) for name, kind in WEIGHT_QUANTIZERS.items() if kind.rounds_columns]
        raise ValueError(
            f"recipe.weights = {recipe.weights!r}: {method} rounds {' and '.join(taken)} weights"
        )


def blocks(model: Transformer) -> list[Block]:
    """The model's layers, typed as Blocks."""
    return [layer for layer in model.layers if isinstance(layer, Block)]


class Site(NamedTuple):
    """The linear layers of a block that read the same input."""

    consumers: tuple[str, ...]
    """Names of these layers in the block."""
    producer: nn.Module | None
    """The module that can rescale the input per channel without any other effect: an RMSNorm (its
    weight) or a linear layer (its rows). None: there is no such module."""

    def linears(self, block: Block) -> list[nn.Linear]:
        """The consumers as modules."""
        found = [block.get_submodule(name) for name in self.consumers]
        return [layer for layer in found if isinstance(layer, nn.Linear)]

    def fold(self, block: Block, scales: Tensor) -> None:
        """Divide the input by ``scales``, positive ``[K]``, and multiply the consumers by it.

        The block computes the same as before, up to rounding in the dtype of its weights.
        """
        assert isinstance(self.producer, RMSNorm | nn.Linear)
        for parameter in self.producer.parameters(recurse=False):  # weight, and a linear's bias
            per_channel = scales.view(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_(parameter.float() / per_channel)
        for linear in self.linears(block):
            linear.weight.copy_(linear.weight.float() * scales)


def sites(block: Block) -> list[Site]:
    """The four sites of a block, in the order of computation.

    Without a norm before an output projection, its input is linear in the rows of the previous
    matrix: down_proj's in up_proj's rows (act(gate) * up), and o_proj's in v_proj's rows (attention
    averages values) unless several query heads share them (grouped queries).
    """
    attention, mlp = block.self_attn, block.mlp
    value, sub_norm = attention.v_proj, attention.attn_sub_norm
    shared = len(value.get_parameter("weight")) < attention.o_proj.get_parameter("weight").shape[1]
    ffn_norm = mlp.ffn_sub_norm
    return [
        Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), block.input_layernorm),
        Site(
            ("self_attn.o_proj",),
            sub_norm if isinstance(sub_norm, RMSNorm) else None if shared else value,
        ),
        Site(("mlp.gate_proj", "mlp.up_proj"), block.post_attention_layernorm),
        Site(("mlp.down_proj",), ffn_norm if isinstance(ffn_norm, RMSNorm) else mlp.up_proj),
    ]


class Statistics:
    """Sums over the inputs of a site, over all calibration tokens.

    Attributes:
        mean, peak: mean and maximum of |x_j|, fp32 ``[K]``.
        gram: mean of x x^T over the tokens, fp32 ``[K, K]``; only if requested. It is GPTQ's
            Hessian (2 X^T X over all tokens) up to a factor. It also weights every squared output
            error: the mean of |dW x|^2 is the trace of dW gram dW^T.
    """

    def __init__(self, features: int, with_gram: bool, device: torch.device) -> None:
        self._tokens = 0
        self._total = torch.zeros(features, dtype=torch.float64, device=device)
        self.peak = torch.zeros(features, device=device, dtype=torch.float32)
        self._gram: Tensor | None = None
        if with_gram:
            self._gram = torch.zeros(features, features, device=device, dtype=torch.float32)

    def add(self, x: Tensor) -> None:
        """Add inputs, float ``[..., K]``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self._tokens += len(rows)
        self._total += rows.abs().sum(0)
        self.peak = torch.maximum(self.peak, rows.abs().amax(0))
        if self._gram is not None:
            self._gram.addmm_(rows.t(), rows)

    @property
    def mean(self) -> Tensor:
        """The mean of |x_j|."""
        return (self._total / self._tokens).float()

    @property
    def gram(self) -> Tensor:
        """The mean of x x^T."""
        assert self._gram is not None
        return self._gram / self._tokens


class Walk:
    """The hidden states of the calibration tokens, layer by layer.

    Arguments:
        model: on any device; used for its embedding and its config.
        calibration: int64 ``[S, T]``.
    """

    def __init__(self, model: Transformer, calibration: Tensor) -> None:
        check_calibration(model, calibration)
        device = model.embed_tokens.weight.device
        self._x_STD = model.embed_tokens(calibration.to(device))
        positions = torch.arange(calibration.shape[1], device=device, dtype=torch.int64)
        self._turn = rotary(positions, model.config.head_dim, model.config.rope_theta)
        self._rows = max(1, _TOKENS_AT_ONCE // calibration.shape[1])
        self._layer = 0

    def inputs(self) -> Iterator[tuple[object, ...]]:
        """Yield the arguments of the next block, for one portion of the windows after another."""
        for x_BTD in self._x_STD.split(self._rows):
            yield x_BTD, *self._turn, None, None

    def statistics(self, block: Block, with_gram: bool) -> list[Statistics]:
        """The statistics of the inputs of ``sites(block)``; ``block`` must be the next one.

        Raises ValueError, naming the layer, if an input is not finite.
        """
        found, handles = [], []
        for site in sites(block):
            first = site.linears(block)[0]
            one = Statistics(first.in_features, with_gram, self._x_STD.device)

            def hook(_: nn.Module, args: tuple[Tensor, ...], one: Statistics = one) -> None:
                one.add(args[0])

            handles.append(first.register_forward_pre_hook(hook))
            found.append(one)
        try:
            for args in self.inputs():
                block(*args)
        finally:
            for handle in handles:
                handle.remove()
        for site, one in zip(sites(block), found, strict=True):
            if not bool(one.peak.isfinite().all()):
                raise ValueError(
                    f"layers.{self._layer}.{site.consumers[0]}: its input holds NaN or infinity on "
                    "the calibration text"
                )
        return found

    def advance(self, block: Block) -> None:
        """Make the block's outputs the inputs of the next block."""
        for args in self.inputs():
            x_BTD = args[0]
            assert isinstance(x_BTD, Tensor)  # a view
            x_BTD.copy_(block(*args))
        self._layer += 1


def quantized_linears(block: nn.Module) -> dict[str, QATLinear]:
    """The matrices that prepare() selected, by name."""
    return {n: layer for n, layer in block.named_modules() if isinstance(layer, QATLinear)}


@torch.no_grad()
def layer_by_layer(
    model: Transformer,
    recipe: Recipe,
    calibration: Tensor,
    method: Callable[[Block, Walk], dict[str, Codes]],
    on_layer: OnLayer | None = None,
) -> Transformer:
    """Quantize a copy of the model block by block, on the outputs of the earlier quantized blocks.

    Arguments:
        calibration: int64 ``[S, T]``.
        method: takes a full-precision block, whose selected matrices are QATLinear, and the walk,
            positioned at that block. Returns the codes of each of these matrices. It may rescale
            the block's weights if the block still computes the same.
    Raises:
        ValueError: as :func:`check_model`, :func:`check_calibration` and prepare(); a module
            outside the layers (embedding, head) is selected.
    """
    check_model(model)
    walk = Walk(model, calibration)
    work = as_transformer(prepare(copy.deepcopy(model), recipe)).eval()
    for name, module in work.named_modules():
        if isinstance(module, QATLayer):
            if not (isinstance(module, QATLinear) and name.startswith("layers.")):
                raise ValueError(
                    f"recipe: selects {name}, but this method quantizes the matrices of the "
                    "layers; set keep_first_last = true or skip it"
                )
            module.lambda_w = module.lambda_a = 0.0  # full-precision arithmetic
    for done, block in enumerate(blocks(work), 1):
        codes = method(block, walk)
        layers = quantized_linears(block)
        if layers:
            calibrate(block, walk.inputs())
        for name, layer in layers.items():
            block.set_submodule(name, integer_layer(layer, codes[name]))
        walk.advance(block)
        if on_layer is not None:
            on_layer(done, len(work.layers))
    return work
