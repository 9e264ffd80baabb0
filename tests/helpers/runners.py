"""The ways in which a decoder computes a step on a CPU, each with suitable models and oracle. The
tests of a decoder run with all of them.

    modules   a model in fp64, against the model itself (tests/helpers/decoding.py)
    native    a model in fp32 with hard attention, against reference operators
              (tests/helpers/native_reference.py), by the kernels of the family "dot"
    addsub    the same, by the kernels of the family "addsub"

Not a test module: the fixture gives one after the other.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bitnet.engine.cpu import CpuRunner
from bitnet.engine.decoder import Decoder
from bitnet.engine.modules import ModuleRunner
from bitnet.linear import Kernel, pack
from bitnet.model import Transformer
from bitnet_kernels.cpu import native
from tests.helpers.decoding import CONTEXT, check_row, small_model
from tests.helpers.native_reference import compare, hard_attention


class Runner(NamedTuple):
    """A way to compute a step."""

    kind: type
    kernel: Kernel
    dtype: torch.dtype
    """The dtype of its models."""
    check: Callable[[Transformer, list[int], Decoder, int, Tensor], None]
    """Checks a row of a decoder that has been fed the tokens ``ids``: (model, ids, decoder, row,
    logits ``[n, V]`` after the last n of them)."""

    def model(self, packed: bool = True, **fields: Any) -> Transformer:
        """A small model."""
        model = small_model(self.dtype, **fields)
        if packed and fields.get("linear") != "fp":
            pack(model)
        hard = self.kind is CpuRunner and model.config.linear == "ternary"
        return hard_attention(model) if hard else model

    def decoder(
        self, model: Transformer, max_batch: int, max_len: int = CONTEXT, **options: Any
    ) -> Decoder:
        """A decoder that runs in this way."""
        decoder = Decoder(model, max_batch, max_len, kernel=self.kernel, **options)
        assert type(decoder._runner) is self.kind
        return decoder


def _check_modules(
    model: Transformer, ids: list[int], decoder: Decoder, row: int, logits: Tensor
) -> None:
    check_row(model, ids, logits)


def _check_native(
    model: Transformer, ids: list[int], decoder: Decoder, row: int, logits: Tensor
) -> None:
    if model.config.linear == "ternary":  # silu is not exact
        sure = 0.8 if model.config.activation == "relu2" else 0.2
        compare(model, ids, decoder._state, row, logits, sure)
        return
    # fp32 sums of K <= 44 terms err by some sqrt(K) 2^-24 = 4e-7 of their size, and a dozen sums in
    # a row by 5e-6. No code can flip.
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(torch.tensor([ids]))[0, -len(logits) :]
    assert ((logits - expected).norm(dim=-1) <= 2e-5 * expected.norm(dim=-1)).all()


_NATIVE = Runner(CpuRunner, "dot", torch.float32, _check_native)
RUNNERS = {"modules": Runner(ModuleRunner, "auto", torch.float64, _check_modules)}
if native.library() is not None:
    RUNNERS |= {"native": _NATIVE, "addsub": _NATIVE._replace(kernel="addsub")}


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Runner:
    """Each of :data:`RUNNERS`."""
    return RUNNERS[request.param]
