"""The layers of a model that a recipe quantizes, by kind, name and position."""

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import type_before_parametrizations

from bitnet.modules import check_patterns, is_conv1d, kept_weights, matches, why_full_precision
from bitnet.qat.recipe import ModuleKind, Recipe

_KINDS: dict[ModuleKind, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "embedding": nn.Embedding,
}
_LAYERS = tuple(_KINDS.values())


def select(model: nn.Module, recipe: Recipe) -> set[int]:
    """The ids of the modules to replace, as :func:`bitnet.qat.prepare.prepare` describes them.

    A layer with a parametrized weight counts as its original plain layer; prepare then raises for
    it.

    Raises:
        ValueError: nothing is selected; a pattern matches no module's name, or a pattern of
            ``include`` selects nothing (with the reason).
    """
    check_patterns(model, recipe.include, "include")
    check_patterns(model, recipe.skip, "skip")
    named = list(model.named_modules(remove_duplicate=False))  # a module may have several names
    layers = [module for _, module in named if isinstance(module, _LAYERS) or is_conv1d(module)]
    ends = {id(m) for m in (layers[:1] + layers[-1:] if recipe.keep_first_last else [])}
    skipped = {id(module) for name, module in named if matches(name, recipe.skip)}
    kinds = {_KINDS[kind] for kind in recipe.modules}

    for name, module in named:
        lazy = isinstance(module, LazyModuleMixin) and isinstance(module, _LAYERS)
        if lazy and id(module) not in skipped:
            kind = type(module).__name__
            raise ValueError(f"{name or 'model'}: a {kind} {why_full_precision(module)}")

    def obstacle(module: nn.Module) -> str:
        """The reason why a module cannot be selected by any ``include``; "" if it can."""
        plain = nn.Linear if is_conv1d(module) else type_before_parametrizations(module)
        if plain not in kinds:
            return f"is a {type(module).__name__}, which modules = {recipe.modules} does not cover"
        if id(module) in skipped:
            return "is in skip"
        if id(module) in ends:
            return "is the first or last layer; keep_first_last = false quantizes it too"
        return ""

    for pattern in recipe.include:
        found = [(name, module) for name, module in named if matches(name, [pattern])]
        if all(obstacle(module) for _, module in found):
            name, module = max(found, key=lambda pair: isinstance(pair[1], _LAYERS))
            raise ValueError(f"include: {pattern!r} selects nothing: {name} {obstacle(module)}")
    selected = {
        id(module)
        for name, module in named
        if not obstacle(module) and (not recipe.include or matches(name, recipe.include))
    }
    if not layers:
        raise ValueError(f"model: no layer can be quantized; it has {kept_weights(model)}")
    if not selected:
        first_last = ", keep_first_last" if recipe.keep_first_last else ""
        raise ValueError(
            f"recipe: selects none of the model's {len({id(layer) for layer in layers})} linear, "
            f"convolution and embedding layers (modules, skip{first_last})"
        )
    return selected
