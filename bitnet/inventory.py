"""Count how much of a model is ternary or integer, and say why the rest is not.

model = replace_linear(model)
print(coverage(model))
"""

from typing import NamedTuple

from torch import nn

from bitnet.bitlinear import BitLinear
from bitnet.linear import TernaryLinear
from bitnet.modules import holders, never_called, why_full_precision
from bitnet.qat.integer import IntLayer
from bitnet.qat.layers import QATLayer
from bitnet.qat.nf4 import FrozenLinear


class Kept(NamedTuple):
    """A module that holds weights in full precision."""

    kind: str
    """the name of its class"""
    weights: int
    reason: str


class Coverage(NamedTuple):
    """The modules that hold a model's weights, by path; ``str()`` gives a table.

    A weight is an element of a parameter with at least two dimensions; biases and norms do not
    count. A weight that several modules share counts in the first.
    """

    replaced: dict[str, int]
    """number of weights in each layer with ternary or integer weights"""
    kept: dict[str, Kept]
    """modules that stay in full precision"""
    never_called: list[str]
    """replaced layers that no forward has called since, although others were called. If the model
    reads their weight directly, it does so in full precision. Compiled forwards do not count."""

    @property
    def share(self) -> float:
        """Share of the weights in replaced layers, 0 to 1."""
        replaced = sum(self.replaced.values())
        total = replaced + sum(kept.weights for kept in self.kept.values())
        return replaced / total if total else 0.0

    def __str__(self) -> str:
        """One line for the replaced layers, and one per class and reason of the kept ones."""
        replaced = sum(self.replaced.values())
        lines = [
            f"replaced: {len(self.replaced)} layers, {replaced:,} weights, {self.share:.1%} of all"
        ]
        groups: dict[tuple[str, str], list[str]] = {}
        for name, kept in self.kept.items():
            groups.setdefault((kept.kind, kept.reason), []).append(name)
        for (kind, reason), names in groups.items():
            weights = sum(self.kept[name].weights for name in names)
            lines.append(f"kept: {kind} {_some(names)}, {weights:,} weights: {reason}")
        if self.never_called:
            lines.append(
                f"never called: {_some(self.never_called)}: if the model reads their weight "
                "directly, it does so in full precision; name them in skip"
            )
        return "\n".join(lines)


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(name or "(the model)" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def coverage(model: nn.Module) -> Coverage:
    """Count the weights of a model by their present form.

    It can be called after ``replace_linear`` or ``prepare``, during and after training, and after
    ``pack`` or ``convert``.
    """
    replaced: dict[str, int] = {}
    kept: dict[str, Kept] = {}
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear | FrozenLinear):
            replaced[name] = module.in_features * module.out_features
        elif isinstance(module, IntLayer):
            replaced[name] = module.packed.shape[0] * module.columns
    for name, module, weights in holders(model):
        if isinstance(module, BitLinear | QATLayer):
            replaced[name] = weights
        elif name not in replaced:
            kept[name] = Kept(type(module).__name__, weights, why_full_precision(module))
    return Coverage(replaced, kept, never_called(model, (BitLinear, QATLayer)))
