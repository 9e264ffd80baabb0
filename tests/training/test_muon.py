"""Muon's iterations against the formula in fp64, and against torch's own optimizer."""

import pytest
import torch
from torch import Tensor, nn

from bitnet.training.muon import Muon, orthogonalize

JORDAN = (3.4445, -4.7750, 2.0315)


def newton_schulz(update: Tensor, steps: int) -> Tensor:
    """By the singular values: each step maps s to a s + b s^3 + c s^5 and keeps the vectors."""
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = JORDAN
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (64, 64), (33, 100), (100, 33)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_iterations_are_those_of_the_formula(shape: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape).bfloat16()
    expected = newton_schulz(update, steps)
    found = orthogonalize(update.float(), JORDAN, steps, 1e-7)
    assert found.dtype == torch.bfloat16
    # fp32 in between: the only error that counts is the rounding of the result, at most 2^-8 of it
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-8, atol=1e-5)


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(3, 5), JORDAN, 5, 1e-7).any()


def test_an_update_is_that_of_torch() -> None:
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in ((24, 24), (9, 40), (40, 9))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 3}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for value, a, b in zip(values, ours, theirs, strict=True):
        # torch iterates in bf16: some 1% of the norm of the four updates
        assert (a - b).norm() < 0.03 * (a - value).norm()
        assert not torch.equal(a, value)
