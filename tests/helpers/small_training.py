"""A small model, trained with weights and inputs quantized once or in every call.

Not a test module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bitnet.model
from bitnet import weights_quantized
from bitnet.model import ModelConfig, Transformer

SMALL: dict[str, Any] = {
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 40,
    "vocab_size": 50,
    "max_seq_len": 16,
}


def small(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**(SMALL | options)))


@contextmanager
def plain_path() -> Iterator[None]:
    """Each BitLinear computes separately: it quantizes its input and its weight in each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitnet.model, "shared_input", lambda x, *_: x)
        yield


def batch(step: int) -> Tensor:
    return torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(step))


def next_token_loss(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: Transformer, steps: int, fast: bool, forward: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Losses and gradients of ``steps`` optimizer steps of two micro-batches, in order."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    seen = []
    for step in range(steps):
        with weights_quantized(model) if fast else plain_path():
            for micro in range(2):
                loss = next_token_loss(
                    model if forward is None else forward, batch(2 * step + micro)
                )
                (loss / 2).backward()
                seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
