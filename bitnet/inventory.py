"""Which modules of a model hold its weights, and why a layer of theirs stays in full precision.

A weight here is an element of a parameter with at least two dimensions: a matrix, a kernel, a
table. Biases and the weights of norms are none.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear layer of transposed weight, known by
    its name since transformers need not be installed."""
    kind = type_before_parametrizations(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def plain_linear(module: nn.Module, transposed: dict[int, nn.Parameter]) -> nn.Linear:
    """A linear layer as an ``nn.Linear`` that computes the same: itself, or of a ``Conv1D`` one
    with the same bias and a new, transposed weight.

    Arguments:
        transposed: new weights by the id of the old, so that a shared weight stays shared.
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
    """Raise ValueError, naming the first, where parameters are sharded over ranks."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"{name or 'model'}: is sharded (FSDP); {remedy}")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(f"{name}: is sharded over ranks (a DTensor); {remedy}")


def check_forward(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise ValueError for a subclass of ``kind`` whose own forward a conversion would lose."""
    if type(module).forward is not kind.forward:
        raise ValueError(
            f"forward: {type(module).__name__} has one of its own, which would be lost; call the "
            f"{kind.__name__} from a module instead"
        )


GATHER = (
    "gather first: load torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) into a model that is not sharded"
)
REPLACE_FIRST = "replace its layers first, then shard"


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """``(path, module, weights)`` of each module that holds weights itself. A weight that several
    share counts in the first. Of a lazy module, which has none yet, 0."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen |= {id(parameter) for parameter in own}
        lazy = any(isinstance(parameter, UninitializedParameter) for parameter in own)
        weights = sum(p.numel() for p in own if not is_lazy(p) and p.dim() >= 2)
        if weights or lazy:
            yield name, module, weights


def why_full_precision(module: nn.Module) -> str:
    """Why a module that holds weights has none of few bits."""
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
        return "a table, which multiplies nothing"
    names = ", ".join(n for n, p in module._parameters.items() if p is not None and p.dim() >= 2)
    return f"no nn.Linear: it holds and uses {names} itself"


def kept_weights(model: nn.Module) -> str:
    """One line of the modules that hold weights, by class, the largest first, with the reason."""
    kinds: dict[str, tuple[int, int, str]] = {}
    for _, module, weights in holders(model):
        kind = type_before_parametrizations(module).__name__
        count, total, _ = kinds.get(kind, (0, 0, ""))
        kinds[kind] = count + 1, total + weights, why_full_precision(module)
    largest = sorted(kinds.items(), key=lambda item: -item[1][1])
    lines = [f"{n} {kind} of {w:,} weights ({why})" for kind, (n, w, why) in largest]
    return "; ".join(lines) or "no weights"
