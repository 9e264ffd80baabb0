"""A decoder whose cache holds the tokens themselves, and whose next token is a hash of all tokens
of the row. So a column that is stale, missing or from another row changes every token after it.

Not a test module: the fixture replaces an engine's decoder with it.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bitnet.engine import engine as engine_module
from bitnet.model import Transformer

VOCAB = 61


class Columns:
    """As strict as the decoder's interface: columns past a row's length have no meaning, and each
    step writes one of them in every row of its bucket."""

    following: ClassVar[Callable[[tuple[int, ...]], int]]
    prefilled: ClassVar[list[tuple[int, ...]]] = []
    fail_at_step: ClassVar[int] = -1

    def __init__(self, model: Transformer, max_batch: int, max_len: int, **options: Any) -> None:
        self.chunk = options["chunk"]
        self.device = torch.device("cpu")
        self.max_batch, self.max_len = max_batch, max_len
        self.rows = [[-1] * max_len for _ in range(max_batch)]
        self.lengths = torch.zeros(max_batch, dtype=torch.int32)
        self.active = torch.ones(max_batch, dtype=torch.int32)
        self.tokens = torch.zeros(max_batch, dtype=torch.int64)
        self.chosen = torch.zeros(max_batch, dtype=torch.int64)
        self.logits = torch.full((max_batch, model.config.vocab_size), -math.inf)
        self.steps = 0
        self.modules: tuple[torch.nn.Module, ...] = ()

    def _answer(self, row: int, length: int) -> None:
        token = type(self).following(tuple(self.rows[row][:length]))
        self.logits[row] = 0.0
        self.logits[row, token] = 50.0
        self.chosen[row] = self.tokens[row] = token

    def step(self, batch: int) -> None:
        self.steps += 1
        assert 1 <= batch <= self.max_batch
        bucket = min(self.max_batch, 1 << (batch - 1).bit_length())
        for row in range(bucket):
            length = int(self.lengths[row])
            if length == self.max_len:
                assert not self.active[row]
                continue
            self.rows[row][length] = int(self.tokens[row])
            if self.steps == self.fail_at_step:
                continue
            if row < batch:
                self._answer(row, length + 1)
            self.lengths[row] += self.active[row]
        if self.steps == self.fail_at_step:
            raise KeyboardInterrupt

    def prefill(self, tokens: Tensor, n_valid: list[int]) -> None:
        assert tokens.dtype == torch.int64
        assert tokens.shape == (len(n_valid), max(n_valid))
        assert len(n_valid) <= self.max_batch
        assert 1 <= max(n_valid) <= self.chunk
        self.prefilled.append(tuple(n_valid))
        for row, n in enumerate(n_valid):
            begin = int(self.lengths[row])
            assert begin + n <= self.max_len
            self.rows[row][begin : begin + n] = tokens[row, :n].tolist()
            self.lengths[row] += n
            if n:
                self._answer(row, begin + n)

    def check_weights(self) -> None: ...

    def copy_prefix(self, source: int, target: int, n: int) -> None:
        assert source != target
        self.rows[target] = self.rows[source][:n] + [-1] * (self.max_len - n)
        self.lengths[target] = n

    def set_length(self, row: int, n: int) -> None:
        assert -1 not in self.rows[row][:n]
        self.lengths[row] = n


def hashed(ids: tuple[int, ...]) -> int:
    assert -1 not in ids
    return hash(ids) % VOCAB


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> type[Columns]:
    monkeypatch.setattr(engine_module, "Decoder", Columns)
    monkeypatch.setattr(Columns, "following", staticmethod(hashed), raising=False)
    monkeypatch.setattr(Columns, "prefilled", [])
    return Columns
