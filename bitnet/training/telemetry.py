"""Telemetry of ternary weights: seven numbers per layer, read every few hundred steps.

A loss curve does not show a quantizer that is stuck. These numbers do, for the model and per layer:

    zeros        share of codes that are 0. 0.31 for Gaussian weights, 0.25 for nn.Linear's uniform
                 initial weights; 0.31 to 0.34 in a trained run.
    flip_rate    share of codes that changed since the last reading (absent from the first). It
                 falls with the learning rate; near 0 early in a run, the codes are frozen.
    dead_zone    share of weights with ||W| - gamma/2| <= 0.05 * gamma/2, i.e. about to flip or
                 flipping back and forth. 0.029 for Gaussian weights.
    gamma        the weight scale (the mean if a layer has several).
    gamma_drift  gamma / gamma of the first reading - 1.
    act_clipped  share of int8 activation codes at the ends, +-127. Absmax never clips a value, so
                 this is the share *at* the token's maximum after rounding: about 1/K if one
                 outlier sets the scale, more if many values are near the maximum.
    act_kurtosis fourth standardized moment of the quantized activations: 3 for Gaussian ones. The
                 larger it is, the more of the 8 bits the outliers use up.

The weights are read as they are. The activations come from one extra forward pass without
gradients on one micro-batch, so a reading costs about half of a training micro-step. It leaves
random state, train/eval modes, gradients and compiled code unchanged.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear
from bitnet.modules import is_dtensor
from bitnet.qat.layers import QATLinear
from bitnet.quant import QuantizedInput, absmean_ternary, quantize_input, spread_groups
from bitnet.training.distributed import whole
from bitnet_kernels import pack_ternary, unpack_ternary

DEAD_ZONE = 0.05
"""Half-width of the dead zone around the threshold, in units of the threshold gamma/2."""


class Telemetry:
    """Reads a model's BitLinears; keeps the codes of the last reading, 2 bits each.

    Arguments:
        model: the model in training, without a wrapper (``torch.compile``, DDP). BitLinears are
            read, and layers that QAT quantizes by BitNet's recipe. For a model without such
            layers, such as a full-precision baseline, a reading is ``{}``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[str, BitLinear | QATLinear] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, BitLinear)
            or (isinstance(module, QATLinear) and module.recipe.is_bitnet)
        }
        self._packed: dict[str, Tensor] = {}
        self._first_gamma: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(self, inputs: Tensor) -> dict[str, Any]:
        """Take a reading. All processes of a run take it together, each on its own inputs. The
        numbers of the weights are the same on all.

        Arguments:
            inputs: one micro-batch for the model's forward.
        Returns:
            For a line of metrics: ``ternary/<number>`` of the model (a mean over layers, weighted
            by their number of weights or activations), and ``ternary/layers``: layer -> number ->
            value, to 4 digits.
        """
        if not self._layers:
            return {}
        activations = self._read_activations(inputs)
        keys: list[tuple[str, str]] = []
        values: list[Tensor] = []
        for name, layer in self._layers.items():
            numbers = self._read_weights(name, layer) | activations[name].numbers()
            keys += [(name, number) for number in numbers]
            values += [value.float() for value in numbers.values()]
        layers: dict[str, dict[str, float]] = {name: {} for name in self._layers}
        totals: dict[str, list[tuple[int, float]]] = {}
        for (name, number), value in zip(keys, torch.stack(values).tolist(), strict=True):
            layers[name][number] = float(f"{value:.4g}")
            weight = activations[name].count if number.startswith("act_") else self._size(name)
            totals.setdefault(number, []).append((weight, value))
        overall = {
            f"ternary/{number}": sum(w * value for w, value in terms) / sum(w for w, _ in terms)
            for number, terms in totals.items()
        }
        return {**overall, "ternary/layers": layers}

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint: ``codes.<layer>`` uint8 (packed), and ``gamma.<layer>`` fp32
        ``[]`` of the first reading; empty before that reading."""
        codes = {f"codes.{name}": packed for name, packed in self._packed.items()}
        return codes | {f"gamma.{name}": gamma for name, gamma in self._first_gamma.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`: the next reading equals that of an uninterrupted run.

        Raises:
            ValueError: the state belongs to other layers than this model's.
        """
        expected = {f"{kind}.{name}" for kind in ("codes", "gamma") for name in self._layers}
        if state and set(state) != expected:
            raise ValueError(
                f"state: not of this model's layers: {sorted(set(state) ^ expected)[0]!r} differs"
            )
        for key, value in state.items():
            kind, _, name = key.partition(".")
            value = value.to(self._layers[name].weight.device)
            (self._packed if kind == "codes" else self._first_gamma)[name] = value

    def _size(self, name: str) -> int:
        return self._layers[name].weight.numel()

    def _read_weights(self, name: str, layer: BitLinear | QATLinear) -> dict[str, Tensor]:
        weight = whole(layer.weight)
        if isinstance(layer, BitLinear):
            codes, gamma = absmean_ternary(weight, layer.granularity, layer.group_size)
        else:
            codes, gamma = layer.quantize()[:2]
        size = self._size(name)
        numbers = {"zeros": (codes == 0).sum().float() / size}
        if name in self._packed:
            before = unpack_ternary(self._packed[name], layer.in_features)
            numbers["flip_rate"] = (codes != before).sum().float() / size
        self._packed[name] = pack_ternary(codes)
        threshold = gamma / 2
        if gamma.dim() == 1:
            threshold = threshold.unsqueeze(1)
        elif gamma.dim() == 2:
            options = layer if isinstance(layer, BitLinear) else layer.recipe
            threshold = spread_groups(threshold, options.group_size, layer.in_features)
        distance = (weight.float().abs() - threshold).abs()
        numbers["dead_zone"] = (distance <= DEAD_ZONE * threshold).sum().float() / size
        numbers["gamma"] = gamma.mean()
        first = self._first_gamma.setdefault(name, numbers["gamma"])
        numbers["gamma_drift"] = numbers["gamma"] / first - 1
        return numbers

    def _read_activations(self, inputs: Tensor) -> dict[str, "_Activations"]:
        activations = {name: _Activations() for name in self._layers}
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self._model, inputs.device))
            for name, layer in self._layers.items():
                hook = layer.register_forward_pre_hook(activations[name].hook, with_kwargs=True)
                stack.callback(hook.remove)
            self._model(inputs)
        return activations


class _Activations:
    """Sums over the calls of one layer in one forward pass."""

    def __init__(self) -> None:
        self.count = 0
        self._clipped: list[Tensor] = []
        self._kurtosis: list[Tensor] = []

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor | QuantizedInput = args[0] if args else kwargs["input"]
        if isinstance(layer, BitLinear) and layer.rms_norm is not None:
            given = layer.rms_norm(given)
        weight: Any = layer.weight
        if is_dtensor(weight):  # tensor parallelism: this rank may have only some input columns
            from bitnet.sharded import whole_input

            given = whole_input(given, weight)
        x, codes, _ = given if isinstance(given, QuantizedInput) else quantize_input(given)
        if x.numel() == 0:
            return
        centred = x.float() - x.float().mean()
        standard = centred / centred.square().mean().sqrt()  # first, so that x^4 cannot overflow
        self.count += x.numel()
        self._clipped.append(((codes >= 127) | (codes <= -127)).sum())
        self._kurtosis.append(standard.square().square().mean() * x.numel())

    def numbers(self) -> dict[str, Tensor]:
        """The numbers of the activations; empty for a layer that was not called."""
        if not self.count:
            return {}
        return {
            "act_clipped": torch.stack(self._clipped).sum().float() / self.count,
            "act_kurtosis": torch.stack(self._kurtosis).sum() / self.count,
        }


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block in evaluation mode, eager; restore random state and modes afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        # Eager: hooks on compiled code would make torch compile it again, with and without them.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
