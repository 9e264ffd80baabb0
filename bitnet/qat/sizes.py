"""Bytes of a model by module, before and after its conversion to integers."""

from typing import NamedTuple

from torch import Tensor, nn

from bitnet.linear import TernaryLinear
from bitnet.qat.integer import IntLayer
from bitnet.qat.observers import Observer


class LayerSize(NamedTuple):
    """Bytes of one module's own tensors."""

    fp32: int
    """with every weight in fp32"""
    stored: int
    """as stored, including scales and zero points"""


class SizeReport(NamedTuple):
    """Bytes of a model by module; a shared tensor counts in the first module."""

    layers: dict[str, LayerSize]

    @property
    def total(self) -> LayerSize:
        """The sum over all modules."""
        sizes = self.layers.values()
        return LayerSize(sum(size.fp32 for size in sizes), sum(size.stored for size in sizes))


def size_report(model: nn.Module) -> SizeReport:
    """Bytes of a model as it is, and in fp32; call it before and after :func:`convert`.

    Counts parameters and the buffers that a state dict holds, without observers.
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
