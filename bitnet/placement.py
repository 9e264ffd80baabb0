"""Keep torch modules from using a layer's weight without calling the forward that quantizes it.

Two torch modules multiply by a layer's ``weight`` directly: ``nn.TransformerEncoderLayer`` in its
fused inference path, and ``nn.MultiheadAttention`` with its output projection. A layer that
quantizes in its forward would silently compute in full precision there.

- torch skips the fused path if a module has forward hooks, so each layer carries a hook that does
  nothing. torch.compile cannot trace that test, so placing a layer also switches the path off by
  the attribute ``activation_relu_or_gelu``.
- The attention never calls its projection, so a layer placed there raises an error.

This relies on internals of torch: ``activation_relu_or_gelu`` and ``Module._forward_pre_hooks``,
which ``Module._call_impl`` tests by truth value and the fused path by length. The functions that
use them have the same syntax trees in the wheels of torch 2.11.0, 2.12.0, 2.13.0 and 2.14.1.
The tests run on the installed torch only. Placing a layer raises RuntimeError if either remedy has
lost its effect; see :func:`_check_fused_path`.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nested, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import handle_torch_function, has_torch_function_unary

IDLE_HOOK = "called"
"""The name of the hook that does nothing."""


class CalledLayer(nn.Module):
    """Base class of layers whose forward must not be bypassed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forward_pre_hooks = _CallMe(self._forward_pre_hooks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Add the hook to a layer that was pickled without it."""
        super().__setstate__(state)
        if not isinstance(self._forward_pre_hooks, _CallMe):
            self._forward_pre_hooks = _CallMe(self._forward_pre_hooks)


def _does_nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing but exist: the fused path counts hooks."""


class _CallMe(OrderedDict[Any, Any]):
    """Pre-forward hooks of a :class:`CalledLayer`: the idle hook, and any that users add.

    It is false while it holds only the idle hook, so ``nn.Module``, which tests its truth value,
    runs no hooks. The fused path and torch.compile test its length, which is at least 1.
    """

    def __init__(self, *hooks: Any) -> None:
        super().__init__(*hooks)
        self[IDLE_HOOK] = _does_nothing

    def __bool__(self) -> bool:
        return len(self) > 1


def _placed(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if not isinstance(module, CalledLayer):
        return
    if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu:
        _check_fused_path()
        parent.activation_relu_or_gelu = 0  # the fused path runs only for 1 and 2
    if not isinstance(parent, nn.MultiheadAttention):
        return
    if type(parent).forward is nn.MultiheadAttention.forward:  # a subclass may call it
        raise ValueError(
            f"{name}: nn.MultiheadAttention multiplies with its weight and never calls it, so a "
            f"{type(module).__name__} would compute in full precision; keep torch's layer there"
        )


register_module_module_registration_hook(_placed)


def _check_fused_path() -> None:
    """Raise RuntimeError if torch's fused path bypasses a layer despite one of the remedies.

    Each remedy is tried alone. If the fused path does not run at all (switched off, or under a
    torch function mode), there is nothing to check.
    """
    if _is_called(hook=False, flag=False):
        return
    remedies = {
        "a forward hook": _is_called(hook=True, flag=False),
        "activation_relu_or_gelu = 0": _is_called(hook=False, flag=True),
    }
    for remedy, works in remedies.items():
        if not works:
            raise RuntimeError(
                f"torch {torch.__version__}: nn.TransformerEncoderLayer bypasses a layer despite "
                f"{remedy}, so a quantized layer in it would compute in full precision; use a "
                "torch that pyproject.toml allows"
            )


class _Probe(CalledLayer, nn.Linear):
    """A linear layer that notes whether it was called."""

    ran = False

    def forward(self, input: Tensor) -> Tensor:
        self.ran = True
        return super().forward(input)


def _is_called(hook: bool, flag: bool) -> bool:
    """Whether an encoder layer in inference calls its ``linear1`` with only these remedies."""
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        layer = nn.TransformerEncoderLayer(2, 2, 2, batch_first=True, **options).eval()
        probe = _Probe(2, 2, **options)
        if not hook:
            probe._forward_pre_hooks = OrderedDict()
        if flag:
            layer.activation_relu_or_gelu = 0
        layer._modules["linear1"] = probe  # not through _placed
        layer(torch.zeros(1, 1, 2, device="cpu", dtype=torch.float32))
    return probe.ran


def is_unusual(input: Tensor) -> bool:
    """Whether an input is nested, or of a subclass of Tensor: :func:`by_its_kind` handles it."""
    return input.is_nested or (type(input) is not Tensor and has_torch_function_unary(input))


def by_its_kind(layer: nn.Module, input: Tensor) -> Tensor:
    """Compute a layer's output for a nested tensor or a subclass of Tensor, as torch's layers do.

    A nested tensor, which ``nn.TransformerEncoder`` makes from a padded batch, is computed part by
    part. A subclass of Tensor goes through its ``__torch_function__``, so the output is one too.
    """
    if not input.is_nested:
        output: Tensor = handle_torch_function(layer.forward, (input,), input)
        return output
    parts = [layer(part) for part in input.unbind()]
    nest: Tensor = nested.as_nested_tensor(parts, layout=input.layout)
    return nest
