"""The ways in which a decoder computes a step on a CPU, each with the models and the oracle that
suit it: what is true of a decoder is tested with all of them.

    modules   a model in fp64, against the model itself (tests/helpers/decoding.py)
    native    a model in fp32, against reference operators (tests/helpers/native_reference.py)

Not a test module: the fixture gives one after the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bitnet.engine.cpu import CpuRunner
from bitnet.engine.decoder import Decoder
from bitnet.engine.modules import ModuleRunner
from bitnet.linear import pack
from bitnet.model import Transformer
from tests.helpers.decoding import CONTEXT, check_row, small_model
from tests.helpers.native_reference import compare


class Runner(NamedTuple):
    """One of them."""

    kind: type
    dtype: torch.dtype
    """Of its models."""
    check: Callable[[Transformer, list[int], Decoder, int, Tensor], None]
    """Checks a row of a decoder that has been fed the tokens ``ids``: (model, ids, decoder, row,
    logits ``[n, V]`` after the last n of them)."""

    def model(self, packed: bool = True, **fields: Any) -> Transformer:
        """A small model."""
        model = small_model(self.dtype, **fields)
        if packed and fields.get("linear") != "fp":
            pack(model)
        return model

    def decoder(
        self, model: Transformer, max_batch: int, max_len: int = CONTEXT, **options: Any
    ) -> Decoder:
        """A decoder that runs in this way."""
        decoder = Decoder(model, max_batch, max_len, **options)
        assert type(decoder._runner) is self.kind
        return decoder


def _check_modules(
    model: Transformer, ids: list[int], decoder: Decoder, row: int, logits: Tensor
) -> None:
    check_row(model, ids, logits)


def _check_native(
    model: Transformer, ids: list[int], decoder: Decoder, row: int, logits: Tensor
) -> None:
    compare(model, ids, decoder._state, row, logits, sure=0.0)


RUNNERS = {
    "modules": Runner(ModuleRunner, torch.float64, _check_modules),
    "native": Runner(CpuRunner, torch.float32, _check_native),
}


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Runner:
    """Each of :data:`RUNNERS`."""
    return RUNNERS[request.param]
