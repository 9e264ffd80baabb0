"""AWQ (Lin et al., arXiv 2306.00978): finer quantization steps for the weights of large inputs.

A few input channels carry most of a layer's output. Multiplying column j of W by s_j > 1 and
dividing input channel j by it leaves the product unchanged. The rounding error of that column
becomes about 1/s_j as large, but the scale gets coarser if the column sets it. The paper searches
one ratio per layer,

    s_j = mean|x_j|^ratio,   ratio in {0, 1/20, ..., 19/20}
    minimizing |Q(W diag(s)) diag(s)^-1 X - W X|^2                                   (eqs. 4, 5)

summed over the matrices that read the input. It needs no pass over the tokens: the sum over tokens
is tr(dW X^T X dW^T). Ratio 0 is rounding to nearest, so on the calibration inputs of a layer AWQ is
never worse. s is divided by sqrt(max s * min s), as in the paper's code, so that inputs keep their
magnitude.

1/s is folded into the producer of the input (``ptq.sites``): a norm's weight, up_proj's rows for
down_proj, v_proj's rows for o_proj if each head has its own values. If there is no producer (o_proj
after grouped queries without a sub norm), weights are rounded to nearest. A channel that was always
0 keeps s = 1. Means below 1e-4 of the largest are raised to that value, to bound the growth of a
channel that other text may use. The paper also searches for a clipped weight range, which is left
out here. Ternary weights gain little: their codes clip the enlarged columns, so the search often
ends at ratio 0.

K in_features, N out_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet.model import Block, Transformer
from bitnet.qat.grid import Codes, dequantize
from bitnet.qat.ptq import (
    OnLayer,
    Walk,
    check_rounding,
    layer_by_layer,
    quantized_linears,
    sites,
)
from bitnet.qat.recipe import Recipe

_SMALLEST = 1e-4


def awq(
    model: Transformer,
    recipe: Recipe,
    calibration: Tensor,
    *,
    n_grid: int = 20,
    on_layer: OnLayer | None = None,
) -> Transformer:
    """A copy of the model, rescaled by AWQ and rounded to nearest, in eval mode.

    Arguments:
        model: full precision; not changed.
        recipe: weights "int" or "absmean"; the search considers only weights.
        calibration: int64 ``[S, T]``, token windows.
        n_grid: number of ratios to try.
        on_layer: called after each layer with the numbers of done and of all layers.
    Raises:
        ValueError: as ``ptq.layer_by_layer``; any other weights.
    """
    check_rounding("awq", recipe)

    def method(block: Block, walk: Walk) -> dict[str, Codes]:
        layers = quantized_linears(block)
        found = list(zip(sites(block), walk.statistics(block, True), strict=True))
        # consumers first, so that v_proj and up_proj are searched with their final rows
        for site, inputs in reversed(found):
            weights = [layers[name].weight for name in site.consumers if name in layers]
            if site.producer is not None and weights:
                scales = awq_scales(weights, inputs.gram, inputs.mean, recipe, n_grid)
                site.fold(block, scales)
        return {name: recipe.quantizer.quantize(layer.weight) for name, layer in layers.items()}

    return layer_by_layer(model, recipe, calibration, method, on_layer)


@torch.no_grad()
def awq_scales(
    weights: Sequence[Tensor], gram: Tensor, mean: Tensor, recipe: Recipe, n_grid: int = 20
) -> Tensor:
    """The best s in the grid: fp32 ``[K]``, positive.

    Arguments:
        weights: float ``[N, K]``, the matrices that read the input; N may differ.
        gram: fp32 ``[K, K]``, X^T X times any positive factor. mean: fp32 ``[K]``, of |x_j|.
    """
    if n_grid < 1:
        raise ValueError(f"n_grid: expected >= 1, got {n_grid}")
    best, least = torch.ones_like(mean), float("inf")
    for i in range(n_grid):
        scales = ratio_scales(mean, i / n_grid)
        loss = 0.0
        for weight in weights:
            w = weight.float()
            w_hat = dequantize(*recipe.quantizer.quantize(w * scales), recipe.group_size) / scales
            loss += float((((w_hat - w) @ gram) * (w_hat - w)).sum())
        if loss < least:
            best, least = scales, loss
    return best


def ratio_scales(mean: Tensor, ratio: float) -> Tensor:
    """mean^ratio / sqrt(max * min), or 1 where the mean is 0: fp32 ``[K]``."""
    live = mean > 0
    if not bool(live.any()):
        return torch.ones_like(mean)
    scales = mean.clamp(min=_SMALLEST * float(mean.max())) ** ratio
    middle = (scales[live].max() * scales[live].min()).sqrt()
    return torch.where(live, scales / middle, 1.0)
