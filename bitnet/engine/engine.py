"""Prompts in, tokens out: the loop around a :class:`Decoder`.

A call puts each prompt into a row of the decoder's cache. It computes in chunks ("prefill") the
tokens that the row does not hold yet, and then feeds each row its newest token, step by step. A row
whose text has ended is still computed, and its results ignored, until the last text of the batch
ends. This is simple, and good enough for a handful of prompts (a server would refill the row). If
there are more prompts than rows, they run in batches.

The engine remembers across calls which tokens each row holds. A prompt that continues an earlier
conversation, or shares a system prompt with one, is computed only from the first token that differs
(bitnet/engine/prefix.py). A text does not depend on reused or other rows, except for the last bit
of floating-point sums: the order of additions in a matrix product may depend on the number of rows.

The host waits for the device once per step, for the chosen tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer
from bitnet.engine import sampling
from bitnet.engine.decoder import CacheDtype, Decoder, HeadDtype
from bitnet.engine.prefix import keep, place, share
from bitnet.engine.request import (
    GREEDY,
    Request,
    SamplingFields,
    SamplingParams,
    StopReason,
    integer,
    make_requests,
    sampling_params,
)
from bitnet.linear import Kernel
from bitnet.model import Transformer
from bitnet.schema import UserError


@dataclass
class Stats:
    """Counts and times of the latest call; they grow while a stream runs."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were already in the cache."""
    new_tokens: int = 0
    """Tokens chosen, including tokens that end a text or belong to a stop string."""
    first_token_s: float = 0.0
    """Seconds from the call to its first token."""
    decoded_tokens: int = 0
    """New tokens, except the first of each text, which comes from the prefill."""
    decode_s: float = 0.0
    """Seconds for the decoded tokens, including the caller's own time between them."""

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens of all texts per second; 0 if there were none."""
        return self.decoded_tokens / self.decode_s if self.decoded_tokens else 0.0


class _Event(NamedTuple):
    """What happened to a request; the fields are in the order in which the caller gets them."""

    prompt: int
    """The request's place in the call."""
    tokens: Sequence[int] = ()
    text: str = ""
    reason: StopReason | None = None


class Engine:
    """Generates from one model, call after call, in memory allocated once.

    Two threads must not use it at the same time.

    Arguments:
        model: on its device. The engine reads its weights once and shares some of the model's own
            tensors: after training the model further, make a new engine. It keeps no other part of
            the model, except layers that are neither ternary nor plain (``decoder.modules``,
            usually none), which are in eval mode while a call computes.
        tokenizer: needed for stop strings and ``on_text``.
        max_batch: rows, 1 to 64; more prompts run in batches of this size.
        max_len: positions of a row, prompt and new tokens together; 0 = the model's context.
        chunk: tokens per row that prefill computes at a time.
        cache_dtype, head, kernel: see :class:`Decoder`.
    Attributes:
        decoder, max_len. stats: of the latest call.
    Raises:
        UserError: an argument is out of range, or the decoder does not take the model.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 8,
        max_len: int = 0,
        chunk: int = 256,
        cache_dtype: CacheDtype = "auto",
        head: HeadDtype = "auto",
        kernel: Kernel = "auto",
    ) -> None:
        context = model.config.max_seq_len
        arguments = {"max_batch": max_batch, "max_len": max_len, "chunk": chunk}
        max_batch, max_len, chunk = (integer(name, n) for name, n in arguments.items())
        if max_batch < 1:
            raise UserError(f"max_batch must be 1 or more, got {max_batch}")
        if not 0 <= max_len <= context:
            raise UserError(
                f"max_len must be 0 (the model's context) to {context}, which that is, "
                f"got {max_len}"
            )
        if chunk < 1:
            raise UserError(f"chunk must be 1 or more, got {chunk}")
        self.max_len = max_len or context
        self.stats = Stats()
        self._config, self._tokenizer = model.config, tokenizer
        try:
            self.decoder = Decoder(
                model,
                max_batch,
                self.max_len,
                chunk=min(chunk, self.max_len),
                cache_dtype=cache_dtype,
                head=head,
                kernel=kernel,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        # The tokens whose keys and values each row of the decoder holds. Shortened before the row
        # is written and extended after: an exception in between leaves less here than in the cache.
        self._held: list[list[int]] = [[] for _ in range(max_batch)]
        self._used = [0] * max_batch  # per row, the call that last used its tokens
        self._call = 0

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        params: SamplingParams = GREEDY,
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_stop: Callable[[int, StopReason], None] | None = None,
        **fields: Unpack[SamplingFields],
    ) -> list[list[int]]:
        """Continue each prompt.

        Prompt and continuation together fill at most ``max_len`` positions; a text that reaches
        this limit ends, with the reason "context".

        Arguments:
            prompts: token ids. An empty prompt means ``[eos_id]``, the start of a document, or the
                first ``eos_id`` of several.
            max_new_tokens: new tokens per prompt, at most.
            params: how to sample and where to stop; greedy by default.
            fields: fields of :class:`SamplingParams` that replace those of ``params``:
                ``temperature``, ``top_k``, ``top_p``, ``seed``, ``eos_id``, ``vocab_size``,
                ``stop``. The name of a special token in ``stop``, such as "<|eot_id|>", stops at
                that token, which decodes to no text. A text keeps the tokens that lie wholly before
                a stop string; see :class:`bitnet.engine.text.TextStream`.
            on_token: called with (index of the prompt, token) as each token is chosen, except the
                one that ends the text; with stop strings, as soon as the token can no longer become
                part of one.
            on_text: called with (index, text) as text becomes certain; the text is never empty. The
                pieces add up to the text after the prompt, which ends exactly before a stop string,
                even inside a token. On Ctrl-C, the text held back is delivered first.
            on_stop: called with (index, reason) when a text ends, after its last token and piece.

        Returns:
            The new tokens of each prompt, without prompt, ``eos_id`` and stop string.

        Raises:
            UserError: an argument is out of range, the model does not have a token id, a prompt
                leaves no room in the context, stop strings or ``on_text`` come without a
                tokenizer, logits are not finite, or the model's weights changed since the engine
                was made.
        """
        params = sampling_params(params, fields)
        requests = self._requests(prompts, max_new_tokens, params, as_text=on_text is not None)
        try:
            for index, tokens, text, reason in self._events(requests, params):
                if on_token is not None:
                    for token in tokens:
                        on_token(index, token)
                if on_text is not None and text:
                    on_text(index, text)
                if on_stop is not None and reason is not None:
                    on_stop(index, reason)
        except KeyboardInterrupt:  # the text held back did not become a stop string
            for request in requests:
                rest = request.text.finish() if request.text is not None else ""
                if on_text is not None and rest:
                    on_text(request.index, rest)
            raise
        return [request.new[: request.delivered] for request in requests]

    def stream(
        self,
        prompt: list[int],
        max_new_tokens: int,
        params: SamplingParams = GREEDY,
        **fields: Unpack[SamplingFields],
    ) -> Iterator[int]:
        """Yield the tokens of :meth:`generate` for one prompt as they become certain.

        The engine computes only when the next token is requested. To stop early, close the iterator
        or drop it: the engine can be used at once, and remembers what it computed.

        Raises:
            UserError: as :meth:`generate`, at once if it concerns the arguments; on the next token,
                if the engine has begun another call meanwhile.
        """
        params = sampling_params(params, fields)
        requests = self._requests([prompt], max_new_tokens, params)
        return (token for event in self._events(requests, params) for token in event.tokens)

    def _events(self, requests: list[Request], params: SamplingParams) -> Iterator[_Event]:
        """Run the call, event by event. Between events the caller's own modes are in force."""
        events = self._run(requests, params)
        while True:
            with self._evaluating():
                event = next(events, None)
            if event is None:
                return
            yield event

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Turn gradients off and put the layers called as modules in eval mode; restore both
        afterwards. The decoder holds quantized weights already."""
        layers = self.decoder.modules
        modes = [(part, part.training) for layer in layers for part in layer.modules()]
        for layer in layers:
            layer.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for part, mode in modes:
                part.training = mode

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        params: SamplingParams,
        as_text: bool = False,
    ) -> list[Request]:
        config = self._config
        return make_requests(
            prompts,
            max_new_tokens,
            params,
            n_ids=config.vocab_size,
            max_len=self.max_len,
            context=config.max_seq_len,
            tokenizer=self._tokenizer,
            as_text=as_text,
        )

    def _run(self, requests: list[Request], params: SamplingParams) -> Iterator[_Event]:
        """Run the call batch by batch. Nothing runs before the caller requests the first event."""
        self._call += 1
        self.stats = Stats(prompt_tokens=sum(len(request.prompt) for request in requests))
        if not any(request.room for request in requests):
            return
        call, begin = self._call, time.perf_counter()
        for first in range(0, len(requests), self.decoder.max_batch):
            self._check_call(call)
            self._check_weights()
            batch = requests[first : first + self.decoder.max_batch]
            self._load(batch)
            yield from self._decode(call, begin, params, batch)

    def _decode(
        self, call: int, begin: float, params: SamplingParams, batch: list[Request]
    ) -> Iterator[_Event]:
        """Generate from the logits of the prompts' last tokens until every text has ended."""
        stats, uniforms = self.stats, self._uniforms(batch, params)
        since = 0.0
        for position in count():
            chosen = self._choose(
                len(batch), params, None if uniforms is None else uniforms[position]
            )
            tokens = chosen.tolist()  # the only wait for the device in a step
            now = time.perf_counter()
            live = [request for request in batch if not request.ended]
            stats.new_tokens += len(live)
            if position > 0:
                stats.decoded_tokens += len(live)
                stats.decode_s += now - since
            stats.first_token_s = stats.first_token_s or now - begin
            since = now
            for request in live:
                text, reason = request.take(tokens[request.row])
                yield _Event(request.index, request.deliver(), text, reason)
            fed = [request for request in live if not request.ended]
            if not fed:
                return
            self._check_call(call)
            if position == 0 or len(fed) < len(live):
                active = [0] * self.decoder.max_batch
                for request in fed:
                    active[request.row] = 1
                self.decoder.active.copy_(torch.tensor(active, dtype=torch.int64, device="cpu"))
            self.decoder.step(len(batch))
            for request in fed:
                self._held[request.row].append(request.new[-1])

    def _uniforms(self, batch: list[Request], params: SamplingParams) -> Tensor | None:
        """Random numbers for all draws: float64 ``[tokens, B]`` on the device; None if greedy."""
        if params.temperature == 0:
            return None
        room = max(request.room for request in batch)
        by_row = sorted(batch, key=lambda request: request.row)
        numbers = [sampling.uniforms(params.seed + request.index, room) for request in by_row]
        return torch.stack(numbers, 1).to(self.decoder.device)

    def _choose(self, n: int, params: SamplingParams, uniforms_B: Tensor | None) -> Tensor:
        """Choose the next token of the decoder's first ``n`` rows, and make it their input."""
        decoder = self.decoder
        if uniforms_B is None and not params.vocab_size:
            return decoder.chosen[:n]  # the decoder has already made these its inputs
        chosen_B = sampling.choose(
            decoder.logits[:n, : params.vocab_size or None],
            params.temperature,
            params.top_k,
            params.top_p,
            uniforms_B,
        )
        decoder.tokens[:n] = chosen_B.clamp(min=0)
        return chosen_B

    def _check_call(self, call: int) -> None:
        if call != self._call:
            raise UserError("this call was broken off: its engine has begun another one since")

    def _check_weights(self) -> None:
        try:
            self.decoder.check_weights()
        except ValueError as error:
            raise UserError(str(error)) from error

    def _load(self, batch: list[Request]) -> None:
        """Put each prompt into a row of the decoder, computing only what no row holds yet."""
        prompts = [request.prompt for request in batch]
        rows, kept, copies = place(self._held, prompts)
        for request, row in zip(batch, rows, strict=True):
            request.row = row
        lost = [row for row, n in zip(rows, kept, strict=True) if n < len(self._held[row])]
        read = {source for source, _, _ in copies}
        spare = set(range(len(batch), self.decoder.max_batch)) - read
        for source, target, n in keep(self._held, self._used, lost, spare):
            self._copy(source, target, n)
            self._used[target] = self._used[source]
        for source, target, n in copies:
            self._copy(source, target, n)
        copied = {target for _, target, _ in copies}
        for row, n in zip(rows, kept, strict=True):
            if row not in copied:
                del self._held[row][n:]
                self.decoder.set_length(row, n)
        for row in read.union(rows):
            self._used[row] = self._call
        held = [len(self._held[row]) for row in rows]
        self.stats.reused_tokens += sum(held)
        for shared in share(prompts, held):
            needed = [0] * len(batch)
            for source, _, n in shared:
                needed[source] = max(needed[source], n)
            self._extend({rows[i]: prompts[i][:n] for i, n in enumerate(needed) if n})
            for source, target, n in shared:
                self.stats.reused_tokens += n - len(self._held[rows[target]])
                self._copy(rows[source], rows[target], n)
        self._extend(dict(zip(rows, prompts, strict=True)))

    def _copy(self, source: int, target: int, n: int) -> None:
        """Copy the first ``n`` tokens of a row of the decoder over another row."""
        self._held[target] = []
        self.decoder.copy_prefix(source, target, n)
        self._held[target] = self._held[source][:n]

    def _extend(self, targets: dict[int, list[int]]) -> None:
        """Make rows of the decoder hold these tokens, which begin with the tokens that they hold.

        Chunks are counted from the end, so that all rows take their last tokens in the last chunk,
        which gives the logits.
        """
        rest = {row: ids[len(self._held[row]) :] for row, ids in targets.items()}
        longest, chunk = max(len(ids) for ids in rest.values()), self.decoder.chunk
        for end in reversed(range(0, longest, chunk)):  # tokens after this chunk
            parts = {
                row: ids[max(0, len(ids) - end - chunk) : len(ids) - end]
                for row, ids in rest.items()
                if len(ids) > end
            }
            shape = (max(parts) + 1, max(len(part) for part in parts.values()))
            tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
            for row, part in parts.items():
                tokens[row, : len(part)] = torch.tensor(part, dtype=torch.int64, device="cpu")
            n_valid = [len(parts.get(row, ())) for row in range(shape[0])]
            self.decoder.prefill(tokens.to(self.decoder.device), n_valid)
            for row, part in parts.items():
                self._held[row] += part
