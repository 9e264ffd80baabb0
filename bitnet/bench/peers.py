"""llama.cpp as a contender of ``bitnet bench decode``, and the check that it runs the same model.

    bitnet bench decode --peers

llama.cpp runs through the C functions that llama-cpp-python binds (`llama_decode`). The only Python
between two steps is a greedy choice by numpy, some 10 µs. Its model is a GGUF file
(:mod:`bitnet.export.gguf_write`) with the codes and scales of our model and a head in fp16.

Nothing is timed before it is checked. Both programs multiply by the same weights and round the
activations to 8 bits in their own way: ours per token, llama.cpp per block of 256 channels. So
neither is an oracle for the other, and both are compared with the model whose activations are not
rounded. A block's largest value is at most its token's, so llama.cpp's quantization steps are at
most ours, and its error must not exceed ours, except by chance. A wrong scale, order of rows or
angle gives an error as large as the logits themselves.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.linear import TernaryLinear
from bitnet.model import ModelConfig, Transformer, as_transformer
from bitnet.modules import replace_modules

CHANCE = 2.0
"""How many times larger than ours the error of another engine may be."""
VACUOUS = 0.5
"""Our own error as a share of the logits' deviation, above which a comparison says nothing."""


class LlamaCpp:
    """A model in llama.cpp, with its defaults: fp16 keys and values, the file mapped into memory.

    Arguments:
        path: of the file, which must stay. config: of its model.
        rows: sequences decoded together. columns: prompt and new tokens per sequence.
        threads: for prompts and for single tokens.
        flash: whether attention is fused, which is llama.cpp's default; the faster choice depends
            on the CPU.
    Raises:
        RuntimeError: llama.cpp refuses the file.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        rows: int,
        columns: int,
        threads: int,
        *,
        flash: bool,
    ) -> None:
        import llama_cpp

        self._llama, self._rows, self._n_vocab = llama_cpp, rows, config.vocab_size
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), of_model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * (-(-columns // 256) * 256)  # in steps of 256 per sequence
        settings.n_batch = rows * columns
        settings.n_seq_max = rows
        settings.flash_attn_type = int(flash)
        settings.n_threads = settings.n_threads_batch = threads
        context = self._model and llama_cpp.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError("llama.cpp refused the model; its reason stands above")
        self._context = context
        self._batch = llama_cpp.llama_batch_init(rows * columns, 0, 1)
        self.cache_bytes = 2 * 2 * config.n_layers * int(settings.n_ctx)
        self.cache_bytes *= config.n_kv_heads * config.head_dim

    def weight_bytes(self) -> int:
        """Bytes of all tensors of the file."""
        return int(self._llama.llama_model_size(self._model))

    def prefill(self, prompts: list[list[int]]) -> np.ndarray:
        """Forget everything and take one prompt per row, all of the same length. Returns the logits
        after each, fp32 ``[rows, V]``: a view that is valid until the next call."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        places = [
            (token, column, row, column == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for column, token in enumerate(prompt)
        ]
        return self._decode(places)

    def step(self, tokens: list[int], column: int) -> np.ndarray:
        """Take one token per row, all at the same column; returns as :meth:`prefill`."""
        return self._decode([(token, column, row, True) for row, token in enumerate(tokens)])

    def _decode(self, places: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Run the tokens given as (token, column, row, whether its logits are wanted)."""
        batch = self._batch
        for i, (token, column, row, wanted) in enumerate(places):
            batch.token[i], batch.pos[i], batch.logits[i] = token, column, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        batch.n_tokens = len(places)
        if failed := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: error {failed}")
        address: Any = self._llama.llama_get_logits(self._context)  # waits for the result
        shape = (self._rows, self._n_vocab)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)


class _WeightOnly(nn.Module):
    """A packed layer whose activations stay as they are."""

    def __init__(self, layer: TernaryLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """float ``[..., K]`` -> ``[..., N]``; dequantizes the matrix each time."""
        return F.linear(x, self.layer.weight)


@torch.no_grad()
def exact_logits(model: Transformer, prompt: list[int]) -> Tensor:
    """Logits after the prompt, fp32 ``[V]``, with activations that are not quantized. Changes the
    model: afterwards it no longer has its packed layers."""

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        return _WeightOnly(module) if isinstance(module, TernaryLinear) else None

    dense = as_transformer(replace_modules(model, convert))
    tokens = torch.tensor([prompt], dtype=torch.int64, device="cpu")
    return dense.lm_head(dense.hidden(tokens)[0, -1]).float()


def disagreement(ours: Tensor, theirs: Tensor, exact: Tensor) -> str:
    """Why another engine cannot be computing our model; "" if it can.

    Arguments:
        ours, theirs, exact: logits ``[V]`` of our engine, of the other engine, and without
            quantized activations.
    """
    spread = float(exact.std())
    our_error, their_error = (float((x - exact).square().mean().sqrt()) for x in (ours, theirs))
    figures = f"rms errors: ours {our_error:.3g}, theirs {their_error:.3g}, of logits {spread:.3g}"
    if not our_error < VACUOUS * spread:
        return f"our own logits are too far off to compare with ({figures})"
    if not their_error < CHANCE * our_error:
        return f"it does not compute the same model ({figures})"
    return ""
