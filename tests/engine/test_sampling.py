"""Draws from logits: their distribution, and the random numbers of a seed."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.engine.engine import Engine
from bitnet.engine.sampling import choose, draw, next_token_probabilities, uniforms
from tests.helpers.decoding import make_prompts, small_model


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}])
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square of 2^17 draws: a right sampler exceeds df + 5 sqrt(2 df) once in a million."""
    logits = torch.randn(1, 37, generator=torch.Generator().manual_seed(1)) * 1.5
    probabilities = next_token_probabilities(logits, 0.8, **options)[0].double()
    n = 2**17
    numbers = uniforms(5, n)
    drawn = torch.cat(
        [choose(logits.expand(512, -1), 0.8, uniforms_B=u, **options) for u in numbers.split(512)]
    )
    counts = drawn.bincount(minlength=37).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * n
    assert expected.min() > 5
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    df = int(possible.sum()) - 1
    assert chi_square < df + 5 * math.sqrt(2 * df)


def test_top_p_among_the_top_k_sorts_no_vocabulary() -> None:
    sorted_widths = []

    class Sorts(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "sort" in func.__name__:
                sorted_widths.append(args[0].shape[-1])
            return func(*args, **kwargs or {})

    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    with Sorts():
        cut = next_token_probabilities(logits, 0.8, 50, 0.9)
        next_token_probabilities(logits, 0.8, 0, 0.9)
    assert sorted_widths == [1000]  # of the second call alone
    assert (cut > 0).sum(-1).max() <= 50


def test_draw_inverts_the_distribution() -> None:
    quarters = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])  # sums exact in binary
    numbers = [0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2**-50]
    drawn = draw(quarters.expand(6, -1), torch.tensor(numbers, dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]
    third = torch.full((1, 3), 1 / 3)  # fp32: adds up to a little more than 1
    last = torch.tensor([1 - 2**-50], dtype=torch.float64)
    assert draw(third, last).tolist() == [2]
    assert draw(third * 0.999, last).tolist() == [2]


def test_numbers_of_a_seed_are_a_sequence() -> None:
    long = uniforms(3, 1000)
    for n in (1, 5, 15, 16, 17, 100):
        assert torch.equal(uniforms(3, n), long[:n])
    assert not torch.equal(uniforms(4, 1000), long)
    assert 0 <= float(long.min()) < float(long.max()) < 1


def test_a_shorter_sample_is_the_beginning_of_a_longer_one() -> None:
    model, prompts = small_model(linear="fp"), make_prompts([1, 2, 30, 7, 22, 9])
    engine = Engine(model, max_batch=4)
    long = engine.generate(prompts, 15, temperature=1.0, seed=7)
    short = Engine(model, max_batch=3).generate(prompts, 4, temperature=1.0, seed=7)
    assert [text[:4] for text in long] == short
    assert list(engine.stream(prompts[5], 15, temperature=1.0, seed=12)) == long[5]
