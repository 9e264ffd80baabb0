"""Layers that only their own forward computes right, in modules of torch that read past it.

``nn.TransformerEncoderLayer`` has a fused inference path, and ``nn.MultiheadAttention`` its output
projection: both take a layer's ``weight`` and multiply with it themselves. For a layer that
quantizes in its forward that is full precision, without a word. Whoever puts one there, torch says
so (``register_module_module_registration_hook``), so the fused path is switched off, and the
projection refused.
"""

from torch import Tensor, nested, nn
from torch.nn.modules.module import register_module_module_registration_hook


class CalledLayer:
    """Marks modules whose weight means nothing without their forward."""


def _placed(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if not isinstance(module, CalledLayer):
        return
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name}: nn.MultiheadAttention multiplies with its weight and never calls it, so a "
            f"{type(module).__name__} would compute in full precision; keep torch's layer there"
        )
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # the fused path runs only for 1 and 2


register_module_module_registration_hook(_placed)


def each_part(layer: nn.Module, input: Tensor) -> Tensor:
    """A layer's output for a nested tensor, part by part: what ``nn.TransformerEncoder`` makes of a
    padded batch."""
    parts = [layer(part) for part in input.unbind()]
    output: Tensor = nested.as_nested_tensor(parts, layout=input.layout)
    return output
