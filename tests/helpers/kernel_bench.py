"""An operator with wrong results, for the tests of bitnet bench kernels. Not a test module."""

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bitnet_kernels.bench import contenders as contending


def wrong_by_one(at: str, calls_until_wrong: int = 0) -> Callable[..., Tensor]:
    """An op of the package that is wrong in one output after ``calls_until_wrong`` calls."""
    right = getattr(contending, at)
    count = itertools.count()

    def op(*args: Any, **kwargs: Any) -> Tensor:
        y = right(*args, **kwargs).clone()
        if next(count) >= calls_until_wrong:
            y.view(-1)[-1] += 1
        return y

    return op
