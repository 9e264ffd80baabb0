"""Batch norms, folded into the layer before them: ``Conv + BatchNorm -> Conv``.

    fold_batch_norm(model.eval())       before prepare(), so that the folded weights are quantized

In eval mode a batch norm is an affine map of each channel. With running mean m and variance v, and
its weight g and bias c,

    W' = W * g / sqrt(v + eps)          b' = (b - m) * g / sqrt(v + eps) + c

computed in float64 and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import fx, nn

from bitnet.elementwise import RMSNorm
from bitnet.linear import BitLinear
from bitnet.modules import replace_modules
from bitnet.qat.prepare import QUANTIZED

_BATCH_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    BitLinear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, BitLinear | RMSNorm)  # their forwards branch on the input
        return leaf or super().is_leaf_module(m, module_qualified_name)


def batch_norm_pairs(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Find the batch norms that :func:`fold_batch_norm` can fold, by torch.fx symbolic tracing.

    If a BatchNorm1d follows a linear layer, the layer's output is assumed to be
    ``[batch, features]``.

    Returns:
        ``(layer, batch norm)`` names, and for each other batch norm the reason why it must stay.
    Raises:
        ValueError: the model cannot be traced (its forward branches on values, ...).
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the model's forward may raise anything on a tracer's proxies
        raise ValueError(
            "model: torch.fx cannot trace it; name what to fold: "
            f'fold_batch_norm(model, pairs=[("conv1", "bn1")]) ({error})'
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    n_calls: dict[int, int] = {}
    for node in calls:
        key = id(modules[node.target])
        n_calls[key] = n_calls.get(key, 0) + 1
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    pairs, left = [], {}
    for node in calls:
        norm = modules[node.target]
        if not isinstance(norm, tuple(_BATCH_NORMS.values())):
            continue
        before = node.args[0] if node.args else next(iter(node.kwargs.values()))
        called = isinstance(before, fx.Node) and before.op == "call_module"
        layer = modules[before.target] if called else None
        if type(layer) not in _BATCH_NORMS:
            left[node.target] = "what comes before it is not a linear layer or a convolution"
        elif n_calls[id(norm)] > 1 or n_calls[id(layer)] > 1:
            left[node.target] = f"{before.target} or it is called more than once"
        elif len(before.users) > 1:
            left[node.target] = f"the output of {before.target} is used elsewhere too"
        elif {f"{before.target}.weight", f"{before.target}.bias"} & read:
            left[node.target] = f"the weight of {before.target} is used elsewhere too"
        elif problem := _unfoldable(model, before.target, node.target):
            left[node.target] = problem
        else:
            pairs.append((before.target, node.target))
    return pairs, left


def _unfoldable(model: nn.Module, layer_name: str, norm_name: str) -> str:
    """The reason why a pair cannot be folded; "" if it can."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    if type(layer) not in _BATCH_NORMS or type(norm) is not _BATCH_NORMS[type(layer)]:
        return f"a {type(norm).__name__} does not fold into a {type(layer).__name__}"
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    if norm.running_mean is None:
        return "it has no running statistics"
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        return f"the weight of {layer_name} is computed by a hook"
    if norm.num_features != weight.shape[0]:
        return f"it has {norm.num_features} features, {layer_name} {weight.shape[0]}"
    users = [m for m in model.modules() for p in m._parameters.values() if p is weight]
    return "" if len(users) == 1 else f"the weight of {layer_name} is tied to another layer's"


@torch.no_grad()
def fold_batch_norm(model: nn.Module, pairs: Sequence[tuple[str, str]] | None = None) -> nn.Module:
    """Fold batch norms into the layer before them, in place; each becomes an ``nn.Identity``.

    In training mode the model then computes what it computed before in eval mode.

    The weights are the same whether ``replace_linear`` comes before or after. A BitLinear quantizes
    W' again and gets other codes, unless it has one scale per row (``granularity="row"``), so fold
    before training it.

    Arguments:
        model: float, or with BitLinears; before :func:`prepare`.
        pairs: names ``(layer, batch norm)``; None: all that :func:`batch_norm_pairs` finds.
    Returns:
        The model.
    Raises:
        ValueError: the model is prepared already, cannot be traced, or a pair cannot be folded.
    """
    if any(isinstance(module, QUANTIZED) for module in model.modules()):
        raise ValueError("model: is quantized already; fold batch norms before prepare()")
    if pairs is None:
        pairs, _ = batch_norm_pairs(model)
    names = dict(model.named_modules(remove_duplicate=False))
    for pair in pairs:
        for name in pair:
            if name not in names:
                raise ValueError(f"pairs: no module is named {name!r}")
        if problem := _unfoldable(model, *pair):
            raise ValueError(f"pairs: {pair[1]}: {problem}")
    flat = [id(names[name]) for pair in pairs for name in pair]
    if len(set(flat)) < len(flat):
        raise ValueError("pairs: a layer or batch norm is named twice")
    for layer_name, norm_name in pairs:
        _fold(names[layer_name], names[norm_name])
    folded = {id(names[norm_name]) for _, norm_name in pairs}
    return replace_modules(model, lambda _, m: nn.Identity() if id(m) in folded else None)


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    assert isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = layer.weight, layer.bias
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    start = 0.0 if bias is None else bias.double()
    shift = (start - norm.running_mean.double()) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        bias.copy_(shift)
