"""Find, check and replace the layers of any model, and say why a layer stays in full precision.

Here, a weight is one element of a parameter with at least two dimensions (a matrix, a convolution
kernel, an embedding table); biases and norms do not count.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from bitnet.placement import IDLE_HOOK
from bitnet.schema import nearest


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear layer with a transposed weight.

    It is recognized by its name: transformers need not be installed.
    """
    kind = type_before_parametrizations(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def plain_linear(module: nn.Module, transposed: dict[int, nn.Parameter]) -> nn.Linear:
    """Return a linear layer as an ``nn.Linear`` that computes the same function.

    An ``nn.Linear`` is returned unchanged. A ``Conv1D`` gives a new layer, with the same bias and
    a new, transposed weight.

    Arguments:
        transposed: old weight's id -> new weight, so that a shared weight stays shared.
    """
    if not is_conv1d(module):
        assert isinstance(module, nn.Linear)
        return module
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    new = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    linear.weight = transposed.setdefault(id(weight), new)
    linear.register_parameter("bias", module.bias)  # type: ignore[arg-type]
    return linear.train(module.training)


def check_whole(model: nn.Module, remedy: str) -> None:
    """Raise ValueError if a parameter is sharded over ranks; the error names the first such one."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"{name or 'model'}: is sharded (FSDP); {remedy}")
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise ValueError(f"{name}: is sharded over ranks (a DTensor); {remedy}")


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether a tensor is divided over ranks. Does not import torch.distributed.tensor."""
    return type(tensor) is not nn.Parameter and hasattr(tensor, "full_tensor")


def check_forward(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise ValueError if a subclass of ``kind`` overrides forward, which conversion would lose."""
    if type(module).forward is not kind.forward:
        raise ValueError(
            f"forward: {type(module).__name__} overrides it, and that code would be lost; call the "
            f"{kind.__name__} from a module instead"
        )


GATHER = (
    "gather first: load torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) into a model that is not sharded"
)
REPLACE_FIRST = "replace its layers first, then shard"


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield ``(path, module, weights)`` for each module that holds weights itself.

    A weight that several modules share counts in the first. A lazy module, which has no weights
    yet, counts 0.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen |= {id(parameter) for parameter in own}
        lazy = any(isinstance(parameter, UninitializedParameter) for parameter in own)
        weights = sum(p.numel() for p in own if not is_lazy(p) and p.dim() >= 2)
        if weights or lazy:
            yield name, module, weights


def why_full_precision(module: nn.Module) -> str:
    """Say why a module that holds weights is neither ternary nor integer."""
    kind = type_before_parametrizations(module)
    if isinstance(module, LazyModuleMixin):
        return "has no weights yet: run the model once first"
    if kind is nn.Linear or is_conv1d(module):
        return "in skip, or added later"
    if kind is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention uses its weight itself"
    if isinstance(module, nn.Linear):
        return (
            "a subclass of nn.Linear may use its weight in its own way; if its forward is that of "
            f"nn.Linear, name it: also=({kind.__name__},)"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a lookup table, which multiplies nothing"
    names = ", ".join(n for n, p in module._parameters.items() if p is not None and p.dim() >= 2)
    return f"not an nn.Linear: it holds and uses {names} itself"


def kept_weights(model: nn.Module) -> str:
    """List in one line the modules that hold weights: by class, largest first, with the reason why
    each stays in full precision."""
    kinds: dict[str, tuple[int, int, str]] = {}
    for _, module, weights in holders(model):
        kind = type_before_parametrizations(module).__name__
        count, total, _ = kinds.get(kind, (0, 0, ""))
        kinds[kind] = count + 1, total + weights, why_full_precision(module)
    largest = sorted(kinds.items(), key=lambda item: -item[1][1])
    lines = [f"{n} {kind} of {w:,} weights ({why})" for kind, (n, w, why) in largest]
    return "; ".join(lines) or "no weights"


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module runs the forward of ``kind`` and nothing else.

    False for a subclass (a parametrized module is one), a :func:`hooked` module, and a module with
    backward hooks. A class whose attribute ``computes_as`` is ``kind`` counts as ``kind``.
    """
    backward = module._backward_pre_hooks or module._backward_hooks
    computes_as = getattr(type(module), "computes_as", type(module))
    return computes_as is kind and not hooked(module) and not backward


def hooked(module: nn.Module) -> bool:
    """Whether calling a module runs anything but the forward of its class: forward hooks of the
    module, global hooks, or a forward assigned to the instance."""
    # by name: torch.compile can trace neither the truth value nor the length of such hooks
    pre_hooks: Mapping[Any, Any] = module._forward_pre_hooks
    added = [name for name in pre_hooks if name != IDLE_HOOK]
    own = added or module._forward_hooks or "forward" in vars(module)
    return bool(own) or bool(_has_any_global_hook())


def computed_parameter(module: nn.Module) -> str:
    """Return which of ``weight`` and ``bias`` is computed in each forward, or "".

    A hook or a parametrization (weight_norm, pruning, ...) computes it from other parameters.
    """
    for name in ("weight", "bias"):
        if is_parametrized(module, name):
            return name
        if isinstance(getattr(type(module), name, None), property):
            continue  # the weight of a packed layer, which its forward does not use
        if not isinstance(getattr(module, name, None), nn.Parameter | None):
            return name
    return ""


def never_called(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Return the paths of layers of ``kinds`` that no forward has called, if others were called.

    A compiled forward leaves no trace: the list is empty for a compiled model.
    """
    modules = dict(model.named_modules())
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules.values()):
        return []
    layers = {name: module for name, module in modules.items() if isinstance(module, kinds)}
    idle = [name for name, module in layers.items() if not module.called]
    return idle if len(idle) < len(layers) else []


def warn_never_called(model: nn.Module, kind: type[nn.Module]) -> None:
    """Warn about layers of :func:`never_called`. The model may read their weight directly: then it
    trained that weight in full precision and will now read the quantized weight."""
    if idle := never_called(model, (kind,)):
        warnings.warn(
            f"{', '.join(idle[:3])}: never called, while other layers were ({len(idle)} such): "
            "if the model reads their weight directly, it trained in full precision; name them in "
            "skip",
            stacklevel=3,
        )


def replace_modules(
    model: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Replace modules in place by the results of ``convert(name, module)`` (None: keep it).

    A module that is used twice stays one module. Returns the model, or its replacement.
    """
    replaced: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if (new := convert(name, module)) is not None:
            replaced[id(module)] = new
    if id(model) in replaced:
        return replaced[id(model)]
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replaced:
                setattr(parent, child_name, replaced[id(child)])
    return model


def disable_nested_tensors(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` from turning a padded batch into a nested tensor: replaced
    layers would compute it part by part."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's path, or its last part, matches one of ``patterns``."""
    own_name = name.rpartition(".")[2]
    return any(fnmatch(name, pattern) or own_name == pattern for pattern in patterns)


def check_patterns(model: nn.Module, patterns: Sequence[str], key: str) -> None:
    """Raise ValueError if a pattern matches no module; it names ``key`` and the nearest name."""
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    known = {*paths, *(path.rpartition(".")[2] for path in paths)}
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in paths):
            near = nearest(pattern, known)
            hint = f"; the nearest is {near!r}" if near else ""
            raise ValueError(f"{key}: no module is named {pattern!r}{hint}")
