"""From a float model to a quantized one: prepare, calibrate, train, convert.

    fold_batch_norm(model)                     Conv + BatchNorm -> one Conv, before anything else
    model = prepare(model, Recipe(...))        selected layers become QAT layers, in place
    calibrate(model, batches)                  static activations: observe, no training
    ...train...                                without it, this is post-training quantization
    model = convert(model)                     QAT layers become integer layers, in place

Only plain torch layers are replaced: a subclass may use its weight differently
(``nn.MultiheadAttention`` never *calls* its output projection, so a QAT layer there would have no
effect). Hooks on a replaced module are dropped. Parameters are the same objects before and after
prepare. On the meta device prepare and convert build the structure of a quantized model, into which
a saved model can be loaded.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, TernaryLinear
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
from bitnet.qat.recipe import Recipe
from bitnet.qat.select import select

QUANTIZED = (QATLayer, IntLayer, TernaryLinear)
"""Layers that prepare() does not accept."""


def prepare(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the layers that a recipe selects by QAT layers with the same Parameters, in place.

    The recipe selects the kinds in ``modules`` that ``include`` matches (all, if it is empty) and
    ``skip`` does not match. With ``keep_first_last`` the first and the last of *all* linear layers,
    convolutions and embeddings, in order of registration, are not replaced. A layer registered
    twice counts in both places. Tied weights stay tied, and share a learned scale.

    Arguments:
        model: float; a single layer is replaced by the returned one. Each layer keeps its train or
            eval mode.
    Returns:
        The model.
    Raises:
        ValueError: nothing is selected; the model has QAT or integer layers already; a pattern
            matches no module's name, or a pattern of ``include`` selects nothing; a layer (named)
            has no quantized form: it is empty, or a hook or a parametrization computes its weight.
    """
    if not recipe.enabled:
        raise ValueError('recipe: weights = "none" quantizes nothing')
    check_whole(model, REPLACE_FIRST)
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZED):
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
    """Run a prepared model on data, so that its observers find the ranges of static activations.

    The model runs in eval mode and full precision (both lambdas 0); its modes are restored
    afterwards. Earlier observations still count. Without static activations no batch is read.
    If ``torch.distributed`` is initialized, all ranks calibrate together, with the same number of
    batches, and find one range.

    Arguments:
        batches: each is a tensor, the model's input, or a tuple of its forward's arguments.
    Raises:
        TypeError: a tensor instead of batches; a batch of another type, such as the lists
            ``[x, y]`` of a DataLoader.
        ValueError: the model is not prepared; there is no batch; a layer (named) has a frozen
            observer, was never called, got an input with NaN or infinity, or got only empty
            inputs.
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
        if observer.frozen:
            raise ValueError(
                f"{name or 'model'}: its observer is frozen; set input_observer.frozen = False "
                "before calibration"
            )
    before = {name: (int(o.bad), int(o.n_seen)) for name, o in observers.items()}
    with _observing(model, layers) as called:
        n_batches = 0
        for batch in batches:
            n_batches += 1
            if not isinstance(batch, (Tensor, tuple)):
                raise TypeError(
                    "batches: a batch is a tensor or a tuple of the forward's arguments, got a "
                    f"{type(batch).__name__}; of a DataLoader's [x, y] pass x"
                )
            model(*batch) if isinstance(batch, tuple) else model(batch)
    if n_batches == 0:
        raise ValueError("batches: the calibration set is empty")
    for name, observer in observers.items():
        if name not in called:
            raise ValueError(f"{name or 'model'}: was never called during calibration")
        bad, n_seen = before[name]
        if int(observer.bad) > bad:
            raise ValueError(
                f"{name or 'model'}: its input held NaN or infinity during calibration"
            )
        if int(observer.n_seen) == n_seen:
            raise ValueError(f"{name or 'model'}: its input was empty in every batch")


@contextmanager
def _observing(model: nn.Module, layers: dict[str, QATLayer]) -> Iterator[set[str]]:
    """Put the model in eval mode and full precision, and feed its observers with the layers'
    inputs. Yields the names of the layers that were called. Restores modes and lambdas, even on an
    error."""
    called: set[str] = set()

    def hook_of(name: str, observer: Observer) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            observer.observe(args[0] if args else kwargs["input"])
            called.add(name)

        return hook

    modes = [(module, module.training) for module in model.modules()]
    lambdas = [(layer, layer.lambda_w, layer.lambda_a) for layer in layers.values()]
    handles = [
        layer.register_forward_pre_hook(hook_of(name, layer.input_observer), with_kwargs=True)
        for name, layer in layers.items()
        if layer.input_observer is not None
    ]
    try:
        model.eval()
        for layer in layers.values():
            layer.lambda_w = layer.lambda_a = 0.0
        yield called
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for layer, lambda_w, lambda_a in lambdas:
            layer.lambda_w, layer.lambda_a = lambda_w, lambda_a


def convert(model: nn.Module) -> nn.Module:
    """Replace every QAT layer by its integer form, in place, with equal outputs to the last bit.

    Ternary linear layers with 8-bit dynamic activations become :class:`bitnet.TernaryLinear`; the
    others become the ``Int`` form of their kind. The integer form is fully quantized, for any
    lambdas. Each of several tied layers gets a copy of the codes.

    Returns:
        The model; a single QAT layer is replaced by the returned one.
    Raises:
        ValueError: the model has no QAT layers (not prepared, or converted already), or has
            adapters; a layer (named) has weights that are not finite, or static activations that
            are not calibrated.
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


def with_bitlinears(model: nn.Module) -> nn.Module | None:
    """The same model with :class:`bitnet.BitLinear` instead of QATLinear, sharing its tensors. None
    if a QAT layer does not compute the same as BitLinear, or if there is none."""
    layers = [module for module in model.modules() if isinstance(module, QATLayer)]
    if not layers or not all(isinstance(m, QATLinear) and m.recipe.is_bitnet for m in layers):
        return None
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

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

    return replace_modules(copied, convert_one)
