"""Layers that only their own forward computes right, in modules of torch that read past it.

The fused inference path of ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``, for its
output projection, take a layer's ``weight`` and multiply with it themselves. For a layer that
quantizes in its forward that is full precision, without a word.

The fused path leaves modules with forward hooks alone, so each layer has one, which does nothing.
torch.compile cannot trace that test of theirs (2.13), so where torch tells that a layer is placed,
the path is switched off besides. The attention never calls its projection; there a layer is
refused.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nested, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import handle_torch_function, has_torch_function_unary


class CalledLayer(nn.Module):
    """Marks modules whose weight means nothing without their forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forward_pre_hooks = _CallMe(self._forward_pre_hooks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a layer pickled without the hook, too."""
        super().__setstate__(state)
        if not isinstance(self._forward_pre_hooks, _CallMe):
            self._forward_pre_hooks = _CallMe(self._forward_pre_hooks)


def _does_nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that the fused path can count."""


class _CallMe(OrderedDict[Any, Any]):
    """Hooks of a layer that has to be called: one that does nothing, and those of others.

    With that one alone it is false, by which ``nn.Module`` asks whether there are hooks to run;
    the fused path, and torch.compile, ask for its length.
    """

    def __init__(self, *hooks: Any) -> None:
        super().__init__(*hooks)
        self["called"] = _does_nothing

    def __bool__(self) -> bool:
        return len(self) > 1


def _placed(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if not isinstance(module, CalledLayer):
        return
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # the fused path runs only for 1 and 2
    if not isinstance(parent, nn.MultiheadAttention):
        return
    if type(parent).forward is nn.MultiheadAttention.forward:  # a subclass may call it
        raise ValueError(
            f"{name}: nn.MultiheadAttention multiplies with its weight and never calls it, so a "
            f"{type(module).__name__} would compute in full precision; keep torch's layer there"
        )


register_module_module_registration_hook(_placed)


def is_unusual(input: Tensor) -> bool:
    """Whether a layer leaves its input to :func:`by_its_kind`."""
    return input.is_nested or (type(input) is not Tensor and has_torch_function_unary(input))


def by_its_kind(layer: nn.Module, input: Tensor) -> Tensor:
    """A layer's output for an input that is more than its values, as torch's layers have it.

    A nested tensor, which ``nn.TransformerEncoder`` makes of a padded batch: part by part.
    A subclass of Tensor: by its ``__torch_function__``, which makes the output one, too.
    """
    if not input.is_nested:
        output: Tensor = handle_torch_function(layer.forward, (input,), input)
        return output
    parts = [layer(part) for part in input.unbind()]
    nest: Tensor = nested.as_nested_tensor(parts, layout=input.layout)
    return nest
