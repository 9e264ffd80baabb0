"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, and correct each column's error
in the columns that are not rounded yet.

A layer's output error over the calibration inputs is tr(dW H dW^T) with the Hessian H = 2 X^T X.
Rounding column j with the error e = w_j - w_hat_j costs least if the columns F not yet rounded move
by

    dW_F = -e / [H_F^-1]_jj * [H_F^-1]_j,F                                           (eq. 2)

(Optimal Brain Surgeon). All rows are rounded in the same order, so they share H_F. The required
rows of H_F^-1 equal, up to a factor, the rows of the upper Cholesky factor U of H^-1, U^T U = H^-1:
[H_F^-1]_j,F / [H_F^-1]_jj = U_j,F / U_jj. So

    e_j = (w_j - w_hat_j) / U_jj;   W_j+1: -= e_j U_j,j+1:

where columns beyond a block of 128 get the block's updates together, as one product ("lazy").

Choices. Damping is 1% of the mean diagonal, as in the paper. U is computed in fp64, the rest in
fp32. Scales per tensor or row are computed before rounding. The scale of a *group* is computed when
the group is reached, from weights updated by all earlier columns (blocks end where groups end). An
input channel that is always 0 in the calibration ("dead") does not count in H; its weights are
rounded to nearest. The paper's code sets them to 0, which ruins a channel that is 0 only in this
text. ``act_order`` rounds columns with a larger diagonal first; groups are still adjacent columns,
so their scales are then computed before rounding.

K in_features, N out_features.
"""

from itertools import pairwise

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


def gptq(
    model: Transformer,
    recipe: Recipe,
    calibration: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
    on_layer: OnLayer | None = None,
) -> Transformer:
    """A copy of the model with its matrices rounded by GPTQ, in eval mode.

    Arguments:
        model: full precision; not changed.
        recipe: weights "int" or "absmean"; activations are quantized by the recipe.
        calibration: int64 ``[S, T]``, token windows; the paper uses 128 windows of 2048.
        damping, act_order, block_size: see :func:`gptq_matrix`.
        on_layer: called after each layer with the numbers of done and of all layers.
    Raises:
        ValueError: as ``ptq.layer_by_layer``; any other weights.
    """
    check_rounding("gptq", recipe)

    def method(block: Block, walk: Walk) -> dict[str, Codes]:
        codes: dict[str, Codes] = {}
        layers = quantized_linears(block)
        for site, inputs in zip(sites(block), walk.statistics(block, True), strict=True):
            for name in site.consumers:
                if name in layers:
                    weight = layers[name].weight
                    codes[name] = gptq_matrix(
                        *(weight, inputs.gram, recipe, damping, act_order, block_size)
                    )
        return codes

    return layer_by_layer(model, recipe, calibration, method, on_layer)


@torch.no_grad()
def gptq_matrix(
    weight: Tensor,
    hessian: Tensor,
    recipe: Recipe,
    damping: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
) -> Codes:
    """GPTQ on one matrix.

    Arguments:
        weight: float ``[N, K]``; not changed.
        hessian: ``[K, K]``, X^T X times any positive factor.
        recipe: weights "int" or "absmean".
        damping: added to the diagonal, as a share of its mean over the live channels.
        act_order: round columns in order of decreasing diagonal.
        block_size: columns updated together; affects only speed and fp32 rounding.
    Returns:
        Codes int8 ``[N, K]``, scale, zero point, as ``WeightQuantizer.quantize``.
    Raises:
        ValueError: any other weights; a Hessian that is not finite, or not positive definite with
            this damping.
    """
    check_rounding("gptq", recipe)
    if block_size < 1 or damping < 0:
        raise ValueError(
            f"block_size, damping: expected >= 1 and >= 0, got {block_size}, {damping}"
        )
    w, quantizer = weight.float().clone(), recipe.quantizer
    columns = w.shape[1]
    order = torch.arange(columns, device=w.device, dtype=torch.int64)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], damping)

    by_group = recipe.granularity == "group"
    late = by_group and not act_order  # computes each group's scale when the group is reached
    grids = [] if late else _grids(*quantizer.scale(w))
    grid_of = (order // recipe.group_size).tolist() if by_group else [0] * columns
    w = w[:, order]
    codes = torch.empty_like(w, dtype=torch.int8)
    cuts = {*range(0, columns, block_size), columns}
    if late:
        cuts |= set(range(0, columns, recipe.group_size))
    for start, end in pairwise(sorted(cuts)):
        if late and start % recipe.group_size == 0:
            grids += _grids(*quantizer.scale(w[:, start : start + recipe.group_size]))
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            scale, zero = grids[grid_of[j]]
            column = w[:, j : j + 1]
            rounded = quantizer.codes(column, scale, zero)
            w_hat = dequantize(rounded, scale, zero, recipe.group_size)
            error = (column - w_hat) / upper[j, j]
            w[:, j + 1 : end].sub_(error * upper[j, j + 1 : end])
            codes[:, j : j + 1], errors[:, j - start : j - start + 1] = rounded, error
        w[:, end:].sub_(errors @ upper[start:end, end:])
    scale, zero = grids[0]
    if by_group:
        scale = torch.cat([scale for scale, _ in grids], 1)
        zero = (
            torch.cat([zero for _, zero in grids if zero is not None], 1)
            if quantizer.affine
            else None
        )
    return Codes(codes[:, order.argsort()].contiguous(), scale, zero)


def _grids(scale: Tensor, zero: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Scale and zero point; one pair per group if they are ``[N, G]``."""
    if scale.dim() < 2:
        return [(scale, zero)]
    scales = scale.split(1, 1)
    return list(
        zip(scales, [None] * len(scales) if zero is None else zero.split(1, 1), strict=True)
    )


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U as at the top of this file: fp32 ``[K, K]``, upper, U^T U = (H + damping)^-1."""
    h = hessian.double()
    diagonal = h.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise ValueError("hessian: holds NaN or infinity")
    live = diagonal > 0
    # the mean of no channels is NaN; without a live channel any positive number works
    mean = diagonal[live].mean() if bool(live.any()) else h.new_ones(())
    h = h + torch.diag(damping * mean + torch.where(live, 0.0, mean))
    factor, failed = torch.linalg.cholesky_ex(h)
    if not int(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(failed):
        raise ValueError(
            f"hessian: not positive definite with damping = {damping}; raise it, or calibrate on "
            "more tokens"
        )
    return upper.float()
