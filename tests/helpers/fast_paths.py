"""Counts calls that the fast paths of a training step make once or never. Not a test module."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import bitnet.loss
import bitnet.quant
import bitnet_kernels


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts the calls of functions that may run once, and of functions that may not run."""
    calls: Counter[str] = Counter()

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[what] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for what, owner, name in (
            ("weights quantized", bitnet.quant, "absmean_ternary"),
            ("inputs quantized", bitnet.quant, "absmax_int8"),
            ("inputs quantized", bitnet_kernels, "quant"),  # in one pass, if there is a kernel
            ("losses without logits", bitnet.loss, "linear_cross_entropy"),
            ("losses of logits", torch.nn.functional, "cross_entropy"),
        ):
            patch.setattr(owner, name, counted(what, getattr(owner, name)))
        yield calls
