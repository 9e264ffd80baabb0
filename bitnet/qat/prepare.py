"""From a float model to a quantized one: prepare, calibrate, train, convert.

    fold_batch_norm(model)                     Conv + BatchNorm -> one Conv, before anything else
    model = prepare(model, Recipe(...))        selected layers become QAT layers, in place
    calibrate(model, batches)                  static activations: observe, no training
    ...train...                                or not: then this is post-training quantization
    model = convert(model)                     QAT layers become integer layers, in place

Only plain torch layers are replaced: a subclass may use its weight in its own way (the output
projection of ``nn.MultiheadAttention`` is never *called*, so a QAT layer there would change
nothing). Hooks on a replaced module are not carried over; Parameters are the same objects before
and after prepare. On the meta device prepare and convert build the structure of a quantized model,
state-dict names, shapes and dtypes, for a saved one to be loaded into.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from bitnet.elementwise import RMSNorm
from bitnet.linear import (
    BitLinear,
    TernaryLinear,
)
from bitnet.modules import (
    GATHER,
    REPLACE_FIRST,
    check_whole,
    computed_parameter,
    disable_nested_tensors,
    is_conv1d,
    plain_linear,
    replace_modules,
    warn_never_called,
)
from bitnet.qat.adapters import LoRALinear
from bitnet.qat.integer import IntLayer, integer_layer
from bitnet.qat.layers import QATConv1d, QATConv2d, QATEmbedding, QATLayer, QATLinear
from bitnet.qat.observers import Observer
from bitnet.qat.recipe import Recipe, select

_QUANTIZED = (QATLayer, IntLayer, TernaryLinear)
_BATCH_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    BitLinear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
}


def prepare(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the layers that a recipe selects by QAT layers with the same Parameters, in place.

    Selected are the kinds in ``recipe.modules``; of these, those that ``include`` matches (all, if
    it is empty) and ``skip`` does not. With ``keep_first_last`` the first and the last of *all*
    linear layers, convolutions and embeddings, in the order of registration, stay as they are; one
    that is registered twice counts in both places.
    Tied weights stay tied, and share a learned scale.

    Arguments:
        model: float; a layer itself is replaced by the returned one. Each layer keeps its train or
            eval mode.
    Returns:
        The model.
    Raises:
        ValueError: nothing is selected; the model has QAT or integer layers already; a pattern
            that no module's name matches, or one of ``include`` that selects nothing; a layer
            that has no quantized form: empty, or with a weight that a hook or a parametrization
            computes (named).
    """
    if not recipe.enabled:
        raise ValueError('recipe: weights = "none" quantizes nothing')
    check_whole(model, REPLACE_FIRST)
    for name, module in model.named_modules():
        if isinstance(module, _QUANTIZED):
            raise ValueError(
                f"model: already quantized: {name or 'it'} is a {type(module).__name__}"
            )
    selected = select(model, recipe)
    steps: dict[int, nn.Parameter | None] = {}
    transposed: dict[int, nn.Parameter] = {}

    def convert_one(name: str, module: nn.Module) -> nn.Module | None:
        if id(module) not in selected:
            return None
        if computed := computed_parameter(module):
            raise ValueError(
                f"{name or 'model'}: its {computed} is computed by a hook "
                "(weight_norm, pruning, ...); remove the hook first"
            )
        if is_conv1d(module):
            module = plain_linear(module, transposed)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if weight.numel() == 0:
            raise ValueError(
                f"{name or 'model'}: its weight {list(weight.shape)} is empty; skip the layer"
            )
        try:
            layer = _qat_layer(module, recipe)
        except ValueError as error:
            raise ValueError(f"{name or 'model'}: {error}") from error
        layer.weight_step = steps.setdefault(id(weight), layer.weight_step)
        return layer

    model = replace_modules(model, convert_one)
    disable_nested_tensors(model)
    return model


def _qat_layer(module: nn.Module, recipe: Recipe) -> QATLayer:
    if isinstance(module, nn.Linear):
        return QATLinear.from_float(module, recipe)
    if isinstance(module, nn.Conv1d):
        return QATConv1d.from_float(module, recipe)
    if isinstance(module, nn.Conv2d):
        return QATConv2d.from_float(module, recipe)
    assert isinstance(module, nn.Embedding)
    return QATEmbedding.from_float(module, recipe)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor | tuple[object, ...]]) -> None:
    """Show a prepared model data, so that its observers find the ranges of static activations.

    The model runs in eval mode and full precision (both lambdas 0), and is left in the modes it
    was in. What observers have seen before counts on. Without static activations there is nothing
    to find, and no batch is read.
    Where ``torch.distributed`` is initialized all ranks calibrate together, with as many batches
    each, and find one range.

    Arguments:
        batches: each a tensor, the model's input, or a tuple of its forward's arguments.
    Raises:
        TypeError: a tensor in place of the batches; a batch of another type, such as the lists
            ``[x, y]`` of a DataLoader.
        ValueError: the model is not prepared; no batch; a layer whose observer is frozen or
            disabled, that was never called, whose input held NaN or infinity, or whose inputs were
            all empty (named).
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches: expected a list of batches, got one Tensor; pass [tensor]")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QATLayer)}
    if not layers:
        raise ValueError("model: has no QAT layers; prepare it first")
    observers = {n: m.input_observer for n, m in layers.items() if m.input_observer is not None}
    if not observers:
        return
    for name, observer in observers.items():
        if not observer.moves:
            how = "frozen; unfreeze()" if observer.frozen else "disabled; enable()"
            raise ValueError(f"{name or 'model'}: its observer is {how} it before calibration")
    calls = dict.fromkeys(observers, 0)
    before = {name: (int(o.bad), int(o.n_seen)) for name, o in observers.items()}
    modes = [(module, module.training) for module in model.modules()]
    lambdas = [(layer, layer.lambda_w, layer.lambda_a) for layer in layers.values()]
    handles = []
    for name, observer in observers.items():

        def hook(
            _: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            name: str = name,
            observer: Observer = observer,
        ) -> None:
            observer.observe(args[0] if args else kwargs["input"])
            calls[name] += 1

        handles.append(layers[name].register_forward_pre_hook(hook, with_kwargs=True))
    n_batches = 0
    try:
        model.eval()
        for layer in layers.values():
            layer.lambda_w = layer.lambda_a = 0.0
        for batch in batches:
            n_batches += 1
            if not isinstance(batch, (Tensor, tuple)):
                raise TypeError(
                    "batches: a batch is a tensor or a tuple of the forward's arguments, got a "
                    f"{type(batch).__name__}; of a DataLoader's [x, y] pass x"
                )
            model(*batch) if isinstance(batch, tuple) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for layer, lambda_w, lambda_a in lambdas:
            layer.lambda_w, layer.lambda_a = lambda_w, lambda_a
    if n_batches == 0:
        raise ValueError("batches: the calibration set is empty")
    for name, observer in observers.items():
        if calls[name] == 0:
            raise ValueError(f"{name or 'model'}: was never called during calibration")
        bad, n_seen = before[name]
        if int(observer.bad) > bad:
            raise ValueError(
                f"{name or 'model'}: its input held NaN or infinity during calibration"
            )
        if int(observer.n_seen) == n_seen:
            raise ValueError(f"{name or 'model'}: its input was empty in every batch")


def convert(model: nn.Module) -> nn.Module:
    """Replace every QAT layer by its integer form, in place, with equal outputs to the last bit.

    Ternary linear layers with 8-bit dynamic activations become :class:`bitnet.TernaryLinear`; the
    others the ``Int`` form of their kind. Whatever the lambdas are, the integer form is that of
    full quantization. Tied layers get a copy of the codes each.

    Returns:
        The model; a QAT layer itself is replaced by the returned one.
    Raises:
        ValueError: the model has no QAT layers (not prepared, or converted already), or adapters;
            weights that are not finite, or static activations that nothing has calibrated (the
            layer named).
    """
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            raise ValueError(f"{name or 'model'}: has an adapter; merge_adapters() first")
    if not any(isinstance(module, QATLayer) for module in model.modules()):
        done = any(isinstance(module, (IntLayer, TernaryLinear)) for module in model.modules())
        raise ValueError(f"model: {'is converted already' if done else 'is not prepared'}")
    check_whole(model, GATHER)
    warn_never_called(model, QATLayer)

    def convert_one(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, QATLayer):
            return None
        try:
            return integer_layer(module, module.quantize())
        except ValueError as error:
            raise ValueError(f"{name or 'model'}.{error}") from error

    return replace_modules(model, convert_one)


def bitlinear_twin(model: nn.Module) -> nn.Module | None:
    """The same model with :class:`bitnet.BitLinear` for QATLinear, sharing its tensors; None where
    a QAT layer computes anything else than BitLinear, or there is none."""
    layers = [module for module in model.modules() if isinstance(module, QATLayer)]
    if not layers or not all(isinstance(m, QATLinear) and m.recipe.is_bitnet for m in layers):
        return None
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

    def convert_one(_: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, QATLinear):
            return None
        linear = BitLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            "meta",
            granularity=module.recipe.granularity,
            group_size=module.recipe.group_size,
            grad_mask=module.recipe.grad_mask,
            grad_mask_c=module.recipe.grad_mask_c,
        )
        for name, parameter in module.named_parameters(recurse=False):
            setattr(linear, name, parameter)
        return linear.train(module.training)

    return replace_modules(twin, convert_one)


class LayerSize(NamedTuple):
    """Bytes of one module's own tensors."""

    fp32: int
    """with every weight in fp32"""
    stored: int
    """as they are, scales and zero points included"""


class SizeReport(NamedTuple):
    """Bytes of a model by module; a tensor that modules share counts in the first."""

    layers: dict[str, LayerSize]

    @property
    def total(self) -> LayerSize:
        """Over all modules."""
        sizes = self.layers.values()
        return LayerSize(sum(size.fp32 for size in sizes), sum(size.stored for size in sizes))


def size_report(model: nn.Module) -> SizeReport:
    """What a model takes, and would take in fp32; call it before and after :func:`convert`.

    Counted are parameters and the buffers that a state dict holds, observers aside.
    """
    layers: dict[str, LayerSize] = {}
    seen: set[int] = set()
    observed: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Observer):
            observed |= {id(m) for m in module.modules()}
        if id(module) in observed:
            continue
        own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                own[key] = buffer
        own = {key: tensor for key, tensor in own.items() if id(tensor) not in seen}
        if not own:
            continue
        seen |= {id(tensor) for tensor in own.values()}
        sizes = {k: 4 * t.numel() if t.is_floating_point() else t.nbytes for k, t in own.items()}
        if isinstance(module, (IntLayer, TernaryLinear)):
            columns = module.columns if isinstance(module, IntLayer) else module.in_features
            sizes = {"weight": 4 * module.packed.shape[0] * columns, "bias": sizes.get("bias", 0)}
        sizes.pop("weight_step", None)
        stored = sum(tensor.nbytes for tensor in own.values())
        layers[name] = LayerSize(sum(sizes.values()), stored)
    return SizeReport(layers)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, BitLinear | RMSNorm)  # whose forwards look at their input
        return leaf or super().is_leaf_module(m, module_qualified_name)


def batch_norm_pairs(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Find the batch norms that :func:`fold_batch_norm` can fold, by torch.fx symbolic tracing.

    A linear layer's output is taken to be ``[batch, features]`` where a BatchNorm1d follows.

    Returns:
        ``(layer, batch norm)`` names, and for each other batch norm why it has to stay.
    Raises:
        ValueError: the model cannot be traced (its forward branches on values, ...).
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's forward raises on a tracer's proxies
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
    """Why a pair cannot be folded; "" where it can."""
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

    In eval mode a batch norm is an affine map of each channel, so with running mean m and variance
    v and its own weight g and bias c,

        W' = W * g / sqrt(v + eps)          b' = (b - m) * g / sqrt(v + eps) + c

    computed in float64 and rounded once. The model then computes in training what it did in eval.

    Before or after ``replace_linear`` the same weights come of it. A BitLinear quantizes W' anew,
    with other codes unless each row has a scale of its own (``granularity="row"``): fold before
    training it.

    Arguments:
        model: float, or with BitLinears; before :func:`prepare`.
        pairs: names ``(layer, batch norm)``; None: all that :func:`batch_norm_pairs` finds.
    Returns:
        The model.
    Raises:
        ValueError: the model is prepared already, cannot be traced, or a pair cannot be folded.
    """
    if any(isinstance(module, _QUANTIZED) for module in model.modules()):
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
