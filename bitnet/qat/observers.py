"""Observers find the range of a layer's activations, for static scales.

    observer = make_observer(recipe)
    observer.observe(x)                       for each batch; never waits for a GPU
    low, high = observer.range()              -> bitnet.qat.activations.static_range

| observer         | range                                                                      |
|------------------|----------------------------------------------------------------------------|
| "minmax"         | of all values seen                                                         |
| "moving_average" | of a batch, averaged: old * momentum + new * (1 - momentum)                |
| "percentile"     | the middle p percent of a batch, averaged the same way: outliers cut       |
| "mse"            | with the least squared error of quantization, summed over the batches      |

A frozen observer keeps its range, and so its scale. A batch with NaN or infinity, or without
values, does not change the range.

If ``torch.distributed`` is initialized, the batches of all ranks count as one, so that all ranks
have the same range: minimum and maximum are over the ranks, squared errors are summed, and averages
use the mean of the ranks' ranges. As with ``nn.SyncBatchNorm``, every rank must run the forward.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bitnet.qat.activations import static_codes, static_range
from bitnet.qat.recipe import Recipe
from bitnet_kernels.reference import EPS


class Observer(nn.Module):
    """Finds the range of the values that it sees; the subclasses define how.

    State: ``low``, ``high`` fp32 ``[]``, both 0 until a batch was seen (they stay fp32 under
    ``.to(dtype)``); ``n_seen`` int64 ``[]``, batches that counted; ``bad`` int64 ``[]``, batches
    left out for NaN or infinity. The plain attribute ``frozen`` stops changes of the range. A
    checkpoint does not hold it, so a schedule sets it again after loading one.

    Under gradient checkpointing a layer's forward runs again in the backward. So in training each
    batch counts twice: in ``n_seen``, and in a moving average as two steps (momentum squared).
    """

    low: Tensor
    high: Tensor
    n_seen: Tensor
    bad: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = self._calibrated = False
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device="cpu"))
        for name in ("n_seen", "bad"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device="cpu"))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Observe a float batch of any shape; does nothing if frozen."""
        if self.frozen or (x.numel() == 0 and not _distributed(x)):
            return
        x = x.detach().float()
        finite = x.isfinite().all()
        seen = torch.full_like(finite, x.numel() > 0)
        if _distributed(x):  # one bad batch spoils all ranks' batches; one with values is enough
            bad, seen = _over_ranks(torch.stack([~finite, seen]).int(), dist.ReduceOp.MAX).bool()
            x, finite = torch.where(finite, x, 0.0), ~bad
        # Compute both results and select one: a branch would wait for the device.
        new = self._update(torch.where(finite, x, 0.0))
        for name, value in new.items():
            buffer: Tensor = getattr(self, name)
            buffer.copy_(torch.where(finite & seen, value, buffer))
        self.n_seen += finite & seen
        self.bad += ~finite

    def _update(self, x: Tensor) -> dict[str, Tensor]:
        """The new buffers, by name, after a finite batch."""
        raise NotImplementedError

    def calibrated(self) -> bool:
        """Whether a batch was seen; true on the meta device, which has no values. Waits for the
        device only until a batch was seen."""
        if not self._calibrated and not self.n_seen.is_meta:
            self._calibrated = int(self.n_seen) > 0
        return self._calibrated or self.n_seen.is_meta

    def train(self, mode: bool = True) -> "Observer":
        """``eval()`` also checks that a batch was seen, since torch.export cannot read values."""
        super().train(mode)
        if not mode:
            self.calibrated()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._calibrated = False
        super()._load_from_state_dict(*args, **kwargs)

    def range(self) -> tuple[Tensor, Tensor]:
        """low, high: fp32 ``[]``."""
        return self.low, self.high

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Observer":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():  # .to(dtype), .half(): move, but do not round
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Show whether it is frozen."""
        return f"frozen={self.frozen}"


class MinMax(Observer):
    """The range of all values seen."""

    def _update(self, x: Tensor) -> dict[str, Tensor]:
        low, high = _ends(x)
        first = self.n_seen == 0
        return {
            "low": torch.where(first, low, torch.minimum(self.low, low)),
            "high": torch.where(first, high, torch.maximum(self.high, high)),
        }


class MovingAverage(Observer):
    """The exponential moving average of the batches' ranges; the first batch sets it."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum

    def _update(self, x: Tensor) -> dict[str, Tensor]:
        first = self.n_seen == 0
        averaged = {}
        low, high = self._batch_range(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        if _distributed(x):
            counts = x.new_full((), float(x.numel() > 0))
            low, high, ranks = _over_ranks(torch.stack([low, high, counts]), dist.ReduceOp.SUM)
            low, high = low / ranks, high / ranks
        for name, new in (("low", low), ("high", high)):
            moved = self.momentum * getattr(self, name) + (1 - self.momentum) * new
            averaged[name] = torch.where(first, new, moved)
        return averaged

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.aminmax()
        return low, high


class Percentile(MovingAverage):
    """As :class:`MovingAverage`, with ranges that leave out (100 - percentile) / 2 percent of a
    batch's values at each end.

    The ends are values of the batch. If the share falls between two values, the outer one is used:
    at least ``percentile`` percent are inside. Selection works on any number of values
    (``torch.quantile`` stops at 2^24) and does not sort them fully.
    """

    def __init__(self, momentum: float, percentile: float) -> None:
        super().__init__(momentum)
        self.tail = (100 - percentile) / 200

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten()
        outer = math.floor(self.tail * (x.numel() - 1)) + 1
        low = x.topk(outer, largest=False, sorted=False).values.amax()
        return low, x.topk(outer, sorted=False).values.amin()


class MeanSquaredError(Observer):
    """The clip c of [-c, c], within the seen range, with the least squared error of the codes.

    The candidates are c = 2^(e/12) for 61 consecutive integers e. The largest c is the first that
    holds all seen values; the smallest is 1/32 of it. Each candidate keeps its sum of squared
    errors over the batches; no batch is kept. A greater maximum adds larger candidates. These clip
    no value of earlier batches, so they have only rounding error there, which grows with c^2.

    Each batch is quantized 61 times, so use this for calibration, not in every training step.
    """

    PER_OCTAVE = 12
    N_CANDIDATES = 61

    seen_low: Tensor
    seen_high: Tensor
    top: Tensor
    errors: Tensor

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        for name in ("seen_low", "seen_high"):  # 0 is in every range
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device="cpu"))
        lowest = math.ceil(self.PER_OCTAVE * math.log2(EPS))
        self.register_buffer("top", torch.tensor(lowest, dtype=torch.int64, device="cpu"))
        self.register_buffer(
            "errors", torch.zeros(self.N_CANDIDATES, dtype=torch.float64, device="cpu")
        )

    def _update(self, x: Tensor) -> dict[str, Tensor]:
        low, high = _ends(x)
        low, high = torch.minimum(self.seen_low, low), torch.maximum(self.seen_high, high)
        absmax = torch.maximum(-low, high).clamp(min=EPS)
        top = torch.maximum(self.top, (absmax.log2() * self.PER_OCTAVE).ceil().long())
        below = torch.arange(self.N_CANDIDATES, device=x.device, dtype=torch.int64)
        new = (top - self.top - below).clamp(min=0)  # positions of new candidates above the old top
        errors = self.errors[(below - (top - self.top)).clamp(min=0)]
        errors = errors * torch.exp2(new.double() * (2 / self.PER_OCTAVE))
        clips = torch.exp2((top - below).double() / self.PER_OCTAVE).float()
        lows, highs = torch.maximum(-clips, low), torch.minimum(clips, high)
        added = torch.stack([self._error(x, *ends) for ends in zip(lows, highs, strict=True)])
        errors = errors + _over_ranks(added, dist.ReduceOp.SUM)
        best = errors.argmin(0, keepdim=True)  # keepdim: a scalar index would be read back
        return {
            "low": lows.index_select(0, best)[0],
            "high": highs.index_select(0, best)[0],
            "seen_low": low,
            "seen_high": high,
            "top": top,
            "errors": errors,
        }

    def _error(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = static_range(low, high, self.bits, self.symmetric)
        values = static_codes(x, scale, zero_point, self.bits).float()
        if zero_point is not None:
            values = values - zero_point
        return (x - values * scale).square().sum(dtype=torch.float64)


def _distributed(x: Tensor) -> bool:
    """Whether other ranks observe too."""
    together = dist.is_available() and dist.is_initialized() and not x.is_meta
    return together and dist.get_world_size() > 1


def _over_ranks(values: Tensor, op: "dist.ReduceOp.RedOpType") -> Tensor:
    if _distributed(values):
        dist.all_reduce(values, op)
    return values


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value over all ranks."""
    if not _distributed(x):
        return x.aminmax()
    none = x.new_full((), -math.inf)
    ends = torch.stack([-x.amin(), x.amax()] if x.numel() else [none, none])
    low, high = _over_ranks(ends, dist.ReduceOp.MAX)
    return -low, high


def make_observer(recipe: Recipe) -> Observer:
    """Make the observer for a recipe with static activations."""
    if recipe.observer == "minmax":
        return MinMax()
    if recipe.observer == "moving_average":
        return MovingAverage(recipe.observer_momentum)
    if recipe.observer == "percentile":
        return Percentile(recipe.observer_momentum, recipe.percentile)
    return MeanSquaredError(recipe.activation_bits, recipe.activation_symmetric)
