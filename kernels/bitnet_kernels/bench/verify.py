"""Check every contender before it is timed.

The truth is a product in fp64 of the codes as drawn, before any packing. Every sum of these
integers is exact there in any order (|acc| <= 128 K < 2^53). If the full product is cheap, all of
it is compared. Else a sample of rows is, and *all* rows at once through a random integer
combination of them: ``acc @ r = x_q @ (codes.T @ r)`` holds for a wrong ``acc`` with a probability
of at most one in thousands. Accumulators that pass are the standard for all else, bit for bit.
"""

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.bench.contenders import DTYPES, Contender, Problem

_BUDGET = 2**31
"""Multiply-adds in fp64 that one check may take."""
_CHUNK = 2**25
"""Elements of the activations that are converted to fp64 at a time."""


class Inexact(RuntimeError):
    """A contender gives wrong results; the message names it and the shape."""


def _sampled_rows(problem: Problem) -> Tensor:
    """Indices of weight rows: all of them, or the first, the last, and some evenly between."""
    most = max(16, _BUDGET // (problem.m * problem.k))
    if problem.n <= most:
        return torch.arange(problem.n, device=problem.device, dtype=torch.int64)
    fp32 = torch.float32
    chosen = torch.linspace(0, problem.n - 1, most, device=problem.device, dtype=fp32)
    return chosen.round().long().unique()


def _exact_product(x_q: Tensor, weight: Tensor) -> Tensor:
    """``x_q [M, K] @ weight [n, K].T`` in fp64."""
    columns = weight.double().t()
    rows = max(1, _CHUNK // x_q.shape[1])
    return torch.cat([piece.double() @ columns for piece in x_q.split(rows)])


def check_accumulators(acc: Tensor, x_q: Tensor, problem: Problem, name: str) -> None:
    """Raise :class:`Inexact` unless int32 ``acc [M, N]`` is the product that fp64 gives."""
    shape = (problem.m, problem.n)
    if acc.dtype != torch.int32 or acc.shape != shape:
        raise Inexact(f"{name}: gives {acc.dtype} {list(acc.shape)}, not int32 {list(shape)}")
    rows = _sampled_rows(problem)
    if not torch.equal(acc[:, rows].double(), _exact_product(x_q, problem.codes[rows])):
        raise Inexact(f"{name}: wrong accumulators at {_where(problem)}")
    if len(rows) < problem.n:
        draw = torch.Generator(problem.device).manual_seed(problem.seed + 3)
        r = torch.randint(-4096, 4097, (problem.n,), generator=draw, device=problem.device).double()
        step = max(1, _CHUNK // problem.k)
        codes, coefficients = problem.codes.split(step), r.split(step)
        combined = sum(
            (part @ piece.double() for part, piece in zip(coefficients, codes, strict=True)),
            start=r.new_zeros(problem.k),
        )
        given = torch.cat([piece.double() @ r for piece in acc.split(max(1, _CHUNK // problem.n))])
        if not torch.equal(given, _exact_product(x_q, combined.unsqueeze(0)).squeeze(1)):
            raise Inexact(f"{name}: wrong accumulators at {_where(problem)}")


def _where(problem: Problem) -> str:
    return f"N x K = {problem.n}x{problem.k}, M = {problem.m}"


class Judge:
    """Holds one problem's accumulators, once they have been checked, and compares outputs."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._expected: dict[tuple[str, str], Tensor] = {}

    def _accumulators(self, x_q: Tensor) -> Tensor:
        acc = reference.ternary_matmul(x_q, self.problem.packed)
        check_accumulators(acc, x_q, self.problem, "reference")
        return acc

    def expected(self, what: str, dtype: str) -> Tensor:
        """The output of an exact contender: ``[M, N]``; for a read, the sum ``[]``."""
        if (what, dtype) not in self._expected:
            if what == "read":
                y = self.problem.packed.view(torch.int64).sum()
            elif what == "matmul":
                y = self._accumulators(self.problem.x_q)
            else:
                x_q, s_x = reference.absmax_int8(self.problem.x(dtype))
                acc = self._accumulators(x_q)
                y = reference.rescale(acc, s_x, self.problem.scale, None, DTYPES[dtype])
            self._expected[what, dtype] = y
        return self._expected[what, dtype]

    def check(self, contender: Contender, y: Tensor) -> str:
        """``"yes"`` for outputs that are right bit for bit, or their error if it is allowed.

        Raises:
            Inexact: they are neither.
        """
        where = f"{contender.label} at {_where(self.problem)}"
        if contender.tolerance is None:
            expected = self.expected(contender.what, contender.dtype)
            if y.dtype != expected.dtype or y.shape != expected.shape:
                raise Inexact(
                    f"{where}: gives {y.dtype} {list(y.shape)}, "
                    f"not {expected.dtype} {list(expected.shape)}"
                )
            if not torch.equal(y, expected):
                wrong = int((y != expected).sum())
                raise Inexact(f"{where}: {wrong} of {y.numel()} outputs are wrong")
            return "yes"
        error = self._relative_error(contender, y)
        if not error <= contender.tolerance:  # NaN is not
            raise Inexact(f"{where}: relative error {error:.2g}, allowed {contender.tolerance}")
        return f"rel {error:.1e}"

    def _relative_error(self, contender: Contender, y: Tensor) -> float:
        problem = self.problem
        if y.shape != (problem.m, problem.n):
            raise Inexact(f"{contender.label} at {_where(problem)}: gives {list(y.shape)}")
        rows = _sampled_rows(problem)
        x = problem.x(contender.dtype)
        truth = _exact_product(x, problem.codes[rows]) * problem.scale.double()
        return float((y[:, rows].double() - truth).norm() / truth.norm())
