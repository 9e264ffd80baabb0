"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the activations' outliers into the weights.

A token's largest channel sets its int8 scale, and in language models a few channels are tens of
times larger than the rest. Dividing channel j of the input by

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)                                      (eq. 4)

and multiplying column j of the weights by it leaves the product unchanged; alpha = 0.5 splits the
difficulty evenly. w_j are the columns of all matrices that read the input. 1/s is folded into the
norm that produces the input, so smoothing costs nothing at inference. An input that no norm
produces (o_proj and down_proj without sub norms) is not smoothed, as in the paper. Then everything
is rounded to nearest. The method is meant for 8-bit weights and activations; with fewer bits it
shows how much of the loss comes from the activations.

Statistics come from the full-precision model. A channel or column of zeros keeps s = 1, and s is
clamped to 1e-5 .. 1e5.

K in_features, N out_features.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet.elementwise import RMSNorm
from bitnet.model import Transformer
from bitnet.qat.ptq import OnLayer, Walk, blocks, check_model, round_to_nearest, sites
from bitnet.qat.recipe import Recipe

_BOUND = 1e5


def smoothquant(
    model: Transformer,
    recipe: Recipe,
    calibration: Tensor,
    alpha: float = 0.5,
    on_layer: OnLayer | None = None,
) -> Transformer:
    """A copy of the model, smoothed and rounded to nearest, in eval mode.

    Arguments:
        model: full precision; not changed.
        recipe: any weights and activations.
        calibration: int64 ``[S, T]``, token windows.
        alpha: the share of the difficulty that moves into the weights, 0 to 1.
        on_layer: called after each layer with the numbers of done and of all layers.
    Raises:
        ValueError: as ``ptq.check_model``, ``ptq.check_calibration`` and ``prepare``; an invalid
            alpha.
    """
    return round_to_nearest(smooth(model, calibration, alpha, on_layer), recipe, calibration)


@torch.no_grad()
def smooth(
    model: Transformer, calibration: Tensor, alpha: float = 0.5, on_layer: OnLayer | None = None
) -> Transformer:
    """A copy of the model, in eval mode, that computes the same from smoother activations."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    check_model(model)
    work = copy.deepcopy(model).eval()
    walk = Walk(work, calibration)
    for done, block in enumerate(blocks(work), 1):
        for site, inputs in zip(sites(block), walk.statistics(block, False), strict=True):
            if isinstance(site.producer, RMSNorm):
                weights = [linear.weight for linear in site.linears(block)]
                site.fold(block, smoothing_scales(inputs.peak, weights, alpha))
        walk.advance(block)
        if on_layer is not None:
            on_layer(done, len(work.layers))
    return work


def smoothing_scales(peak: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s of eq. 4: fp32 ``[K]``, positive.

    Arguments:
        peak: fp32 ``[K]``, max|x_j|. weights: float ``[N, K]``, the matrices that read x; N may
            differ.
    """
    columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    scales = peak**alpha / columns ** (1 - alpha)
    usable = (peak > 0) & (columns > 0)
    return torch.where(usable, scales.clamp(1 / _BOUND, _BOUND), 1.0)
