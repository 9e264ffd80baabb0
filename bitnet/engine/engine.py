"""Prompts in, tokens out: the loop around a :class:`Decoder`.

A call puts each prompt into a row of the decoder's cache, computes what the row does not hold yet
in chunks ("prefill"), and from then on feeds each row its newest token. A row that ends goes on
being computed, unseen, until the last one has ended: simple, and the right trade for a handful of
prompts (a server would refill the row). More prompts than rows run in waves.

What the rows hold is remembered across calls. A prompt that continues an earlier conversation, or
shares a system prompt with one, is computed only from where they part (bitnet/engine/prefix.py). A
row's tokens do not depend on what was reused or on the other rows, but for the last bit of floating
point sums, which a matrix product may add up differently for another number of rows.

The host waits for the device once a step, for the chosen tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer
from bitnet.engine import sampling
from bitnet.engine.decoder import CacheDtype, Decoder, HeadDtype
from bitnet.engine.prefix import keep, place, share
from bitnet.engine.request import Options, Row, StopReason, integer, make_rows
from bitnet.linear import Kernel
from bitnet.model import Transformer
from bitnet.schema import UserError


@dataclass
class Stats:
    """What the latest call did; grows while a stream runs."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Those of the prompts whose keys and values were there already, or copied."""
    new_tokens: int = 0
    """Tokens chosen, ending ones and those of a stop string included."""
    first_token_s: float = 0.0
    """Seconds from the call to its first token."""
    decoded_tokens: int = 0
    """The new tokens but each row's first, which its prefill gives."""
    decode_s: float = 0.0
    """Seconds in which they came, with what the caller did between them."""

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens of all rows together a second; 0 where there were none."""
        return self.decoded_tokens / self.decode_s if self.decoded_tokens else 0.0


class _Event(NamedTuple):
    """Something to tell the caller about a row, in this order."""

    row: int
    tokens: Sequence[int] = ()
    text: str = ""
    reason: StopReason | None = None


class Engine:
    """Generates from one model, call after call, in memory allocated once.

    Not for two threads at a time.

    Arguments:
        model: on its device. Its weights are read as they are now, and some stay the model's own
            tensors: after training it further, make a new engine. Of the model itself nothing is
            kept but the layers that the decoder calls as they are (``decoder.modules``, none
            mostly), which are in eval mode while a call computes.
        tokenizer: for stop strings and ``on_text``.
        max_batch: rows, 1 to 64; more prompts run in waves of so many.
        max_len: positions of a row, prompt and new tokens together; 0 = the model's context.
        chunk: tokens a row that prefill computes at a time.
        cache_dtype, head, kernel: as :class:`Decoder` has them.
    Attributes:
        decoder, max_len. stats: of the latest call.
    Raises:
        UserError: an argument out of range, or a model that the decoder cannot take.
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
        # The tokens whose keys and values each row of the decoder holds. Cut before the row is
        # written and extended after: an exception between leaves less here than is there.
        self._held: list[list[int]] = [[] for _ in range(max_batch)]
        self._used = [0] * max_batch  # the call that last used what each row holds
        self._call = 0

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_id: int | Sequence[int] | None = None,
        vocab_size: int = 0,
        stop: Sequence[str] = (),
        on_token: Callable[[int, int], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_stop: Callable[[int, StopReason], None] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt.

        Prompt and continuation together fill at most ``max_len`` positions; a row that reaches
        this ends, with the reason "context".

        Arguments:
            prompts: token ids. An empty prompt stands for ``[eos_id]``, the start of a document, or
                for the first of several.
            max_new_tokens: new tokens a row, at most.
            temperature: 0 = the most likely token (greedy); otherwise divides the logits.
            top_k: sample among the k most likely tokens; 0 = all.
            top_p: sample among the fewest tokens that together have at least this probability.
            seed: row r samples with ``seed + r``; the same text for the same logits.
            eos_id: the token that ends a row, or several of them (``Tokenizer.eos_ids``); None =
                none does.
            vocab_size: choose among the ids below this only, for a model with more rows than the
                tokenizer has tokens; 0 = all.
            stop: strings that end a row (reason "stop"). The name of a special token, such as
                "<|eot_id|>", stops at that token, which decodes to no text. The row keeps the
                tokens that lie wholly before the string; see
                :class:`bitnet.engine.text.TextStream`.
            on_token: called with (row, token) as each token is chosen, the ending one excepted;
                where there are stop strings, as soon as no stop string can take it back.
            on_text: called with (row, text), the text never empty, as text becomes certain. The
                pieces add up to the row's text after its prompt, which ends exactly before a stop
                string, even inside a token. Ctrl-C hands out what is held back, then is raised.
            on_stop: called with (row, reason) when a row ends, after its last token and text.

        Returns:
            The new tokens of each prompt, without prompt, ``eos_id`` and stop string.

        Raises:
            UserError: an argument out of range, a token id that the model does not have, a prompt
                that leaves no room in the context, stop strings or ``on_text`` without a
                tokenizer, logits that are not finite, or weights that the model was given since
                the engine was made.
        """
        options = Options(max_new_tokens, temperature, top_k, top_p, seed, eos_id, vocab_size, stop)
        rows = self._rows(prompts, options, as_text=on_text is not None)
        try:
            for index, tokens, text, reason in self._events(rows, options):
                if on_token is not None:
                    for token in tokens:
                        on_token(index, token)
                if on_text is not None and text:
                    on_text(index, text)
                if on_stop is not None and reason is not None:
                    on_stop(index, reason)
        except KeyboardInterrupt:  # what was held back became no stop string
            for row in rows:
                rest = row.text.finish() if row.text is not None else ""
                if on_text is not None and rest:
                    on_text(row.index, rest)
            raise
        return [row.new[: row.delivered] for row in rows]

    def stream(
        self,
        prompt: list[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_id: int | Sequence[int] | None = None,
        vocab_size: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[int]:
        """The tokens of :meth:`generate` for one prompt, one by one as they become certain.

        Nothing is computed between two tokens that are asked for. To break off, close the iterator
        or just drop it: the engine can be used at once, and what was computed is remembered.

        Raises:
            UserError: as :meth:`generate`, of the arguments at once; and on the next token, if the
                engine has begun another call meanwhile.
        """
        options = Options(max_new_tokens, temperature, top_k, top_p, seed, eos_id, vocab_size, stop)
        rows = self._rows([prompt], options)
        return (token for event in self._events(rows, options) for token in event.tokens)

    def _events(self, rows: list[Row], options: Options) -> Iterator[_Event]:
        """The call, one event after the other; the caller has them in its own modes."""
        events = self._run(rows, options)
        while True:
            with self._evaluating():
                event = next(events, None)
            if event is None:
                return
            yield event

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradients, and eval mode of the layers that are called as they are; afterwards each
        module's own mode is back. Weights are the decoder's: nothing is quantized here."""
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

    def _rows(
        self, prompts: Sequence[Sequence[int]], options: Options, as_text: bool = False
    ) -> list[Row]:
        config = self._config
        return make_rows(
            prompts,
            options,
            n_ids=config.vocab_size,
            max_len=self.max_len,
            context=config.max_seq_len,
            tokenizer=self._tokenizer,
            as_text=as_text,
        )

    def _run(self, rows: list[Row], options: Options) -> Iterator[_Event]:
        """The call, as the caller takes its events. Nothing of it runs before the first."""
        self._call += 1
        self.stats = Stats(prompt_tokens=sum(len(row.prompt) for row in rows))
        if options.max_new_tokens == 0:
            return
        call, begin = self._call, time.perf_counter()
        for first in range(0, len(rows), self.decoder.max_batch):
            self._check_call(call)
            self._check_weights()
            wave = rows[first : first + self.decoder.max_batch]
            self._load(wave)
            yield from self._wave(call, begin, options, wave)

    def _wave(self, call: int, begin: float, options: Options, rows: list[Row]) -> Iterator[_Event]:
        """From the logits of the prompts' last tokens until every row has ended."""
        stats, uniforms = self.stats, self._uniforms(rows, options)
        since = 0.0
        for position in count():
            chosen = self._choose(
                len(rows), options, None if uniforms is None else uniforms[position]
            )
            tokens = chosen.tolist()  # the one wait for the device a step
            now = time.perf_counter()
            live = [row for row in rows if not row.ended]
            stats.new_tokens += len(live)
            if position > 0:
                stats.decoded_tokens += len(live)
                stats.decode_s += now - since
            stats.first_token_s = stats.first_token_s or now - begin
            since = now
            for row in live:
                text, reason = row.take(tokens[row.slot], options)
                yield _Event(row.index, row.deliver(), text, reason)
            fed = [row for row in live if not row.ended]
            if not fed:
                return
            self._check_call(call)
            if position == 0 or len(fed) < len(live):
                active = [0] * self.decoder.max_batch
                for row in fed:
                    active[row.slot] = 1
                self.decoder.active.copy_(torch.tensor(active, dtype=torch.int64, device="cpu"))
            self.decoder.step(len(rows))
            for row in fed:
                self._held[row.slot].append(row.new[-1])

    def _uniforms(self, rows: list[Row], options: Options) -> Tensor | None:
        """The numbers of all draws: float64 ``[tokens, B]`` on the device; none if greedy."""
        if options.temperature == 0:
            return None
        room = max(row.room for row in rows)
        by_slot = sorted(rows, key=lambda row: row.slot)
        numbers = [sampling.uniforms(options.seed + row.index, room) for row in by_slot]
        return torch.stack(numbers, 1).to(self.decoder.device)

    def _choose(self, n: int, options: Options, uniforms_B: Tensor | None) -> Tensor:
        """The next token of the first ``n`` rows of the decoder, which is to be fed them."""
        decoder = self.decoder
        if uniforms_B is None and not options.vocab_size:
            return decoder.chosen[:n]  # the decoder feeds itself these
        chosen_B = sampling.choose(
            decoder.logits[:n, : options.vocab_size or None],
            options.temperature,
            options.top_k,
            options.top_p,
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

    def _load(self, rows: list[Row]) -> None:
        """Put each prompt into a row of the decoder, computing what is nowhere yet."""
        prompts = [row.prompt for row in rows]
        slots, kept, copies = place(self._held, prompts)
        for row, slot in zip(rows, slots, strict=True):
            row.slot = slot
        prompt_in = dict(zip(slots, prompts, strict=True))
        lost = [slot for slot, n in zip(slots, kept, strict=True) if n < len(self._held[slot])]
        read = {source for source, _, _ in copies}
        spare = set(range(len(rows), self.decoder.max_batch)) - read
        for source, target, n in keep(self._held, self._used, lost, spare):
            self._copy(source, target, n)
            self._used[target] = self._used[source]
        for source, target, n in copies:
            self._copy(source, target, n)
        copied = {target for _, target, _ in copies}
        for slot, n in zip(slots, kept, strict=True):
            if slot not in copied:
                del self._held[slot][n:]
                self.decoder.set_length(slot, n)
        for slot in read.union(slots):
            self._used[slot] = self._call
        held = [len(self._held[slot]) for slot in slots]
        self.stats.reused_tokens += sum(held)
        for shared in share(prompts, held):
            needed = [0] * len(rows)
            for source, _, n in shared:
                needed[source] = max(needed[source], n)
            self._extend({slots[i]: prompts[i][:n] for i, n in enumerate(needed) if n})
            for source, target, n in shared:
                self.stats.reused_tokens += n - len(self._held[slots[target]])
                self._copy(slots[source], slots[target], n)
        self._extend(prompt_in)

    def _copy(self, source: int, target: int, n: int) -> None:
        """The first ``n`` tokens of a row over another row of the decoder."""
        self._held[target] = []
        self.decoder.copy_prefix(source, target, n)
        self._held[target] = self._held[source][:n]

    def _extend(self, targets: dict[int, list[int]]) -> None:
        """Make rows of the decoder hold these tokens, which begin with those they hold.

        Chunks are counted from the end, so that all rows take their last tokens in the last chunk,
        whose logits are wanted.
        """
        rest = {slot: ids[len(self._held[slot]) :] for slot, ids in targets.items()}
        longest, chunk = max(len(ids) for ids in rest.values()), self.decoder.chunk
        for end in reversed(range(0, longest, chunk)):  # tokens after this chunk
            parts = {
                slot: ids[max(0, len(ids) - end - chunk) : len(ids) - end]
                for slot, ids in rest.items()
                if len(ids) > end
            }
            shape = (max(parts) + 1, max(len(part) for part in parts.values()))
            tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
            for slot, part in parts.items():
                tokens[slot, : len(part)] = torch.tensor(part, dtype=torch.int64, device="cpu")
            n_valid = [len(parts.get(slot, ())) for slot in range(shape[0])]
            self.decoder.prefill(tokens.to(self.decoder.device), n_valid)
            for slot, part in parts.items():
                self._held[slot] += part
