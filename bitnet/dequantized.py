"""The ``weight`` of a layer that holds codes: what code that asks for ``layer.weight`` needs.

    layer.weight.dtype, .device, .shape     known without the codes: T5 casts to ``wo.weight.dtype``
    x @ layer.weight.T                      the dequantized matrix, made for this use and not kept
    layer.weight.mul_(2)                    a RuntimeError: it would change nothing

It is no parameter and in no state dict.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_meta")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "layout", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size),
}


class DequantizedWeight(Tensor):
    """A tensor that is computed whenever its values are used; see :func:`dequantized`."""

    _compute: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata as they are known; any other function of the values."""
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (Tensor.data.__get__, Tensor.detach):  # type: ignore[attr-defined]
            return args[0]
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        augmented = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")  # __iadd__
        if in_place or augmented or name in ("__setitem__", "__set__") or "out" in kwargs:
            raise RuntimeError(  # torch takes a TypeError of `+=` for "not implemented"
                f"{name}: the weight of a packed or converted layer is made from its codes and "
                "cannot be written"
            )
        args, kwargs = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what gets past the above."""
        args, kwargs = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs or {}))
        return func(*args, **kwargs)


def dequantized(
    compute: Callable[[], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The weight that a layer's ``weight`` returns.

    Arguments:
        compute: makes the matrix in any dtype and of any shape with as many elements.
        shape, dtype, device: of the weight.
    """

    def weight() -> Tensor:
        return compute().to(dtype).reshape(shape)

    if torch.compiler.is_compiling():  # which drops what is not used
        return weight()
    lazy = Tensor._make_wrapper_subclass(DequantizedWeight, shape, dtype=dtype, device=device)
    lazy._compute = weight
    return lazy
