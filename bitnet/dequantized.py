"""The ``weight`` of a packed or converted layer: the layer stores codes, but code may read weights.

    layer.weight.dtype, .device, .shape     not computed (T5 casts to ``wo.weight.dtype``)
    x @ layer.weight.T                      dequantizes the matrix for this use; nothing is kept
    layer.weight.mul_(2)                    RuntimeError: it would change nothing
    layer.weight.T[0] = 1                   RuntimeError, as through any view

It is not a parameter and not in any state dict. Two kinds of writes are not detected and change
nothing: writes in compiled code and writes to the memory itself (``.numpy()``,
``.untyped_storage()``). ``parameter.data = layer.weight`` leaves NaN in the parameter; write
``parameter.data.copy_(layer.weight)`` instead.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves, tree_map_only

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
        """Return metadata without the values; call any other function with the values.

        A result that shares memory with the values, such as a view, is a DequantizedWeight too.
        """
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (Tensor.data.__get__, Tensor.detach):  # type: ignore[attr-defined]
            return args[0]
        _refuse_writes(getattr(func, "__name__", ""), args, kwargs)
        memory: set[int] = set()

        def values(weight: DequantizedWeight) -> Tensor:
            computed = weight._compute()
            memory.add(_memory(computed))
            return computed

        def read_only(result: Tensor) -> Tensor:
            if _memory(result) not in memory:
                return result
            return _stand_in(result.shape, result.dtype, result.device, lambda: result)

        args, kwargs = tree_map_only(cls, values, (args, kwargs))
        return tree_map_only(Tensor, read_only, func(*args, **kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the same for operators that bypassed ``__torch_function__``."""
        _refuse_writes(func._schema.name, args, kwargs or {})
        args, kwargs = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the rows, which are read-only too."""
        return iter(self.unbind(0))


def _refuse_writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if a function of this name would write into a DequantizedWeight."""
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")  # __iadd__
    if "out" in kwargs:
        written: Any = kwargs["out"]
    elif in_place or augmented or name in ("__setitem__", "__set__") or kwargs.get("inplace"):
        written = args[0] if args else kwargs  # nn.init names its argument
    else:
        return
    if any(isinstance(leaf, DequantizedWeight) for leaf in tree_leaves(written)):
        raise RuntimeError(  # in `+=` torch would take a TypeError for "not implemented"
            f"{name}: the weight of a packed or converted layer is made from its codes and "
            "cannot be written"
        )


def _memory(tensor: Tensor) -> int:
    """Identify the storage of a tensor, even if it has no address (on the meta device)."""
    return int(tensor.untyped_storage()._cdata)


def _stand_in(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, compute: Callable[[], Tensor]
) -> DequantizedWeight:
    """Make a DequantizedWeight, whose memory is a single NaN, expanded. It needs memory because
    torch does not pass ``parameter.data = weight`` to the class. Without memory, as after
    ``_make_wrapper_subclass``, the parameter would read memory that does not exist."""
    wrong = torch.nan if dtype.is_floating_point else 0  # a view may have another dtype
    element = torch.full((), wrong, dtype=dtype, device=device)
    weight = element.expand(shape).as_subclass(DequantizedWeight)
    weight._compute = compute
    return weight


def dequantized(
    compute: Callable[[], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the tensor that a layer offers as its ``weight``.

    Arguments:
        compute: makes the matrix, in any dtype and in any shape with the same number of elements.
        shape, dtype, device: of the weight.
    """

    def weight() -> Tensor:
        return compute().to(dtype).reshape(shape)

    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return weight()  # compiled code drops it if unused; fake values cost nothing
    return _stand_in(shape, dtype, device, weight)
