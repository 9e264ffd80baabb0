"""A model, its cache and one step. The engine runs the loop, a runner does the arithmetic.

    decoder = Decoder(model, max_batch=8, max_len=2048)
    decoder.prefill(tokens, n_valid)        # prompts; logits and the chosen token of each row
    decoder.step(batch)                     # as often as needed: appends, attends, chooses

The weights are read once (:mod:`bitnet.engine.weights`). Memory for keys and values, and for the
rows' tokens and lengths, is allocated once. A greedy step feeds itself: it writes the chosen tokens
where the next step reads its inputs, so the host only reads them. Rows fill independently, each
from column 0, without padding or shared positions, so a row's tokens depend on no other row.

On a GPU a step is one CUDA graph per batch size (:mod:`bitnet.engine.cuda`). On a CPU it is one
call of the native library (:mod:`bitnet.engine.cpu`) or, if that is missing or does not take the
model, calls of the model's own layers one by one (:mod:`bitnet.engine.modules`).

S rows, T tokens, V vocabulary.
"""

import warnings
from dataclasses import replace
from typing import Literal, NoReturn, SupportsIndex, get_args

import torch
from torch import Tensor

from bitnet.engine.cpu import CpuRunner, takes
from bitnet.engine.cuda import CudaRunner
from bitnet.engine.modules import ModuleRunner
from bitnet.engine.state import State
from bitnet.engine.weights import (
    Dense,
    ModelWeights,
    Versions,
    embedding_of,
    one_embedding,
    packed_copy,
    quantized_head,
    tensors_of,
)
from bitnet.linear import Kernel
from bitnet.model import Transformer
from bitnet_kernels.cpu import native

CacheDtype = Literal["auto", "fp32", "bf16", "int8"]
HeadDtype = Literal["auto", "float", "bf16", "int8"]
LARGEST_BATCH = 64
"""Most rows: the largest bucket."""


class Decoder:
    """A model's weights, its keys and values, and one step over them.

    Arguments:
        model: on its device, in fp32, bf16, fp16, or on a CPU fp64. Its weights are read once, now:
            a BitLinear is packed; on CUDA matrices are fused; the rest is shared with the model.
            Linear layers that are neither ternary nor plain (:mod:`bitnet.engine.weights`) are
            called as modules, in their current mode. The model may be dropped. If it changes,
            make a new decoder: :meth:`check_weights`.
        max_batch: rows, at most 64. max_len: tokens per row, at most the model's context.
        chunk: most tokens per row in one call of :meth:`prefill`.
        cache_dtype: of keys and values. "auto": the model's dtype on a CPU, bf16 on CUDA. "int8"
            keeps one scale per head and token.
        head: dtype of the output head. "float": the model's. "auto": the model's on a CPU, bf16 on
            CUDA. "int8": absmax codes with one scale per row, for weights and activations.
        kernel: of packed layers. "dot" and "addsub" are families of kernels (kernels/README.md).
            "addsub" multiplies nothing; it reads bit planes, which are made now (with AVX2 it
            reads the packed weights). "reference" computes layer by layer with the model's own
            modules, on a CPU.
    Attributes:
        device, vocab_size, max_batch, max_len, chunk.
        modules: the layers that are neither ternary nor plain; usually none.
        buckets: batch sizes that have a graph on CUDA; a CPU runs any.
        tokens: int64 ``[S]``, the next input of each row. A step writes ``chosen`` there (0 instead
            of -1); the caller may overwrite it between steps.
        lengths: int32 ``[S]``, the number of tokens whose keys and values each row holds. Change it
            only by :meth:`set_length` and :meth:`copy_prefix`.
        active: int32 ``[S]``, 1 (the initial value) if a step advances the row. A row at 0 keeps
            its length and its tokens; a step computes it too, without effect.
        logits: fp32 ``[S, V]``, the latest of each row.
        chosen: int64 ``[S]``, the argmax of the logits; -1 if their maximum is NaN or infinite.
    Raises:
        ValueError: an argument is out of range, or a step cannot repeat the model's arithmetic.
    Warns:
        UserWarning: the model is on a CPU, and there is no native library.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch: int,
        max_len: int,
        *,
        chunk: int = 256,
        cache_dtype: CacheDtype = "auto",
        head: HeadDtype = "auto",
        kernel: Kernel = "auto",
    ) -> None:
        config, weight = model.config, embedding_of(model)
        for name, number in (("max_batch", max_batch), ("max_len", max_len), ("chunk", chunk)):
            if type(number) is not int:
                raise ValueError(f"{name}: expected an int, got {number!r}")
        if not 1 <= max_batch <= LARGEST_BATCH:
            raise ValueError(f"max_batch: expected 1 to {LARGEST_BATCH}, got {max_batch}")
        if not 1 <= max_len <= config.max_seq_len:
            raise ValueError(
                f"max_len: expected 1 to the model's context of {config.max_seq_len}, got {max_len}"
            )
        if chunk < 1:
            raise ValueError(f"chunk: expected >= 1, got {chunk}")
        for name, value, choices in (
            ("cache_dtype", cache_dtype, CacheDtype),
            ("head", head, HeadDtype),
            ("kernel", kernel, Kernel),
        ):
            if value not in get_args(choices):
                expected = ", ".join(get_args(choices))
                raise ValueError(f"{name}: expected one of {expected}, got {value!r}")
        if weight.device.type not in ("cpu", "cuda"):
            raise ValueError(f"model: expected it on cpu or cuda, got {weight.device}")
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        if weight.dtype not in (*dtypes, torch.float64) or (
            weight.is_cuda and weight.dtype not in dtypes
        ):
            raise ValueError(
                f"model: expected fp32, bf16, fp16, or on a CPU fp64; got {weight.dtype}"
            )

        self.device, self.vocab_size = weight.device, config.vocab_size
        self.max_batch, self.max_len, self.chunk = max_batch, max_len, min(chunk, max_len)
        self.buckets = (*(2**i for i in range(6) if 2**i < max_batch), max_batch)
        # The decoder's tensors are made outside of inference mode, so that they may be changed both
        # inside and outside of it.
        with torch.inference_mode(False), torch.no_grad(), self.device:
            self._build(model, cache_dtype, head, kernel)

    def _build(
        self, model: Transformer, cache_dtype: CacheDtype, head: HeadDtype, kernel: Kernel
    ) -> None:
        config, on_cpu = model.config, self.device.type == "cpu"
        packed = packed_copy(model)
        addsub = kernel == "addsub"
        planes = addsub and not (on_cpu and native.families_share_layout())
        weights = ModelWeights.of(packed, fused=not on_cpu, planes=planes)
        if head == "auto" and not on_cpu and isinstance(weights.head, Dense):
            head = "bf16"
        if head == "bf16" or head == "int8":
            weights = replace(weights, head=quantized_head(weights.head, head))
        cache = {
            "auto": weights.embedding.dtype if on_cpu else torch.bfloat16,
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "int8": torch.int8,
        }[cache_dtype]
        self._state = state = State.empty(config, self.max_batch, self.max_len, cache, self.device)
        self.tokens, self.lengths, self.active = state.tokens, state.lengths, state.active
        self.logits, self.chosen = state.logits, state.chosen
        if on_cpu and kernel != "reference" and (missing := native.missing()):
            warnings.warn(f"{missing}: generation is several times slower", stacklevel=4)
        in_one_call = on_cpu and kernel != "reference" and takes(weights, state)
        self._weights = weights = one_embedding(weights) if in_one_call else weights
        self.modules = weights.modules()
        self._versions = Versions(model, weights)
        self._runner: CpuRunner | ModuleRunner | CudaRunner
        if in_one_call:
            self._runner = CpuRunner(config, weights, state, self.chunk, addsub)
        elif on_cpu:
            self._runner = ModuleRunner(packed, weights, state, self.chunk)
        else:
            self._runner = CudaRunner(config, weights, state, self.buckets, kernel)

    @torch.inference_mode()
    def step(self, batch: int) -> None:
        """Feed ``tokens[:batch]``: append their keys and values, attend, and write ``logits``,
        ``chosen`` and the next ``tokens`` of these rows; then ``lengths += active``.

        A row that holds ``max_len`` tokens is full: a step appends nothing to it and keeps its
        length, and its logits mean nothing. On CUDA, a step does not wait for the device.

        Raises:
            ValueError: batch is not 1 to max_batch.
        """
        if not 1 <= batch <= self.max_batch:
            raise ValueError(f"batch: expected 1 to {self.max_batch} (max_batch), got {batch}")
        self._runner.step(batch)

    def check_weights(self) -> None:
        """Check that the model's weights have not changed since they were read. :meth:`prefill`
        calls this, too.

        Raises:
            ValueError: a weight was changed in place since. Changes through ``weight.data`` are
                seen only in vectors, such as norms.
        """
        if self._versions.changed():
            raise ValueError(
                "model: its weights changed since they were read, and only some of them are "
                "copies; make a new engine"
            )

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, n_valid: list[int]) -> None:
        """Append tokens to rows, active or not. Waits for the device.

        Arguments:
            tokens: int64 ``[B, T]``, T <= chunk, for rows 0 .. B - 1, padded on the right.
            n_valid: how many of each row's tokens count; 0 leaves the row as it is. The row then
                has the logits, chosen and next token after its last valid token.
        Raises:
            ValueError: a shape or dtype does not fit, the model does not have a token, a row has no
                room for its tokens, or weights have changed (:meth:`check_weights`).
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens: expected int64 [B, T], got {tokens.dtype} {list(tokens.shape)}"
            )
        self.check_weights()
        b, t = tokens.shape
        if b != len(n_valid) or b > self.max_batch:
            raise ValueError(
                f"tokens: expected a row for each of the {len(n_valid)} of n_valid and at most "
                f"{self.max_batch} (max_batch), got {b}"
            )
        if t > self.chunk:
            raise ValueError(f"tokens: expected at most {self.chunk} (chunk) per row, got {t}")
        low, high = tokens.aminmax() if tokens.numel() else (0, 0)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"tokens: expected 0 to {self.vocab_size - 1}, got {low} to {high}")
        for row, (n, length) in enumerate(zip(n_valid, self.lengths[:b].tolist(), strict=True)):
            if type(n) is not int or not 0 <= n <= t:
                raise ValueError(f"n_valid: expected 0 to {t}, got {n} for row {row}")
            if length + n > self.max_len:
                raise ValueError(
                    f"row {row}: {length} + {n} tokens exceed max_len = {self.max_len}"
                )
        self._runner.prefill(tokens, n_valid)

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, n: int) -> None:
        """Make row ``target`` hold the first ``n`` tokens of row ``source``, and only those.

        Raises:
            ValueError: no such row, or it holds fewer tokens.
        """
        self._check_row("source", source, n)
        self._check_row("target", target, 0)
        if source == target:
            raise ValueError(f"target: expected another row than source = {source}")
        self._state.copy_prefix(source, target, n)

    @torch.inference_mode()
    def set_length(self, row: int, n: int) -> None:
        """Forget a row's tokens after the first ``n``.

        Raises:
            ValueError: no such row, or it holds fewer tokens.
        """
        self._check_row("row", row, n)
        self.lengths[row] = n

    def memory(self) -> dict[str, int]:
        """Bytes of ``weights`` (the layers' matrices and norms), ``head``, ``embedding``, ``cache``
        (keys, values and their scales) and ``workspace`` (everything else that is kept; on CUDA
        without the graphs' pool). Shared memory counts once: a head tied to the embedding has 0."""
        weights, state = self._weights, self._state
        parts = {
            "embedding": [weights.embedding],
            "head": tensors_of(weights.head),
            "weights": weights.tensors(),  # include the two above, which count once
            "cache": [state.kv] if state.scale is None else [state.kv, state.scale],
            "workspace": [
                *state.others(),
                *self._runner.workspace(),
                *self._versions.copies(),
            ],
        }
        seen: set[int] = set()
        sizes = dict.fromkeys(("weights", "head", "embedding", "cache", "workspace"), 0)
        for kind, tensors in parts.items():
            for storage in (tensor.untyped_storage() for tensor in tensors):
                if storage.data_ptr() not in seen:
                    sizes[kind] += storage.nbytes()
                    seen.add(storage.data_ptr())
        return sizes

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a Decoder cannot be copied or pickled: its steps are bound to its memory; make another"
        )

    def _check_row(self, name: str, row: int, n: int) -> None:
        if not 0 <= row < self.max_batch:
            raise ValueError(f"{name}: expected 0 to {self.max_batch - 1}, got {row}")
        if not 0 <= n <= (length := int(self.lengths[row])):
            raise ValueError(f"n: row {row} holds {length} tokens, got {n}")
