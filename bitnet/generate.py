"""Text from a model: one token at a time, for a batch of prompts.

The prompts go through the model once ("prefill"); from then on only the newest token of each row
does, and attention reads the keys and values of the earlier ones from a cache. Rows of different
lengths are padded on the *left*, so that their newest tokens share a column; the cache masks the
padding and counts positions from each row's own start, so a row's text is that which it would have
alone. A row that ends goes on being computed, unseen, until the last one has ended: simple, and
the right trade for a handful of prompts (a serving engine would refill the row).

Sampling draws from a generator of the row's own, seeded with ``seed + row``: the global random
state of a training run is not touched, and a row's text depends on no other row.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from bitnet.evaluate import evaluation_mode
from bitnet.model import KVCache, Transformer
from bitnet.schema import UserError
from bitnet.tokenizer import Tokenizer

StopReason = Literal["eos", "length", "context"]
"""Why a row ended: end of document, ``max_new_tokens`` reached, or the context is full."""


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    vocab_size: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    on_stop: Callable[[int, StopReason], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Prompt and continuation together fill at most ``model.config.max_seq_len`` positions; a row
    that reaches this ends, with the reason "context".

    Arguments:
        model: on its device, put in eval mode meanwhile.
        prompts: token ids. An empty prompt stands for ``[eos_id]``, the start of a document.
        max_new_tokens: new tokens a row, at most.
        temperature: 0 = the most likely token (greedy); otherwise divides the logits.
        top_k: sample among the k most likely tokens; 0 = all.
        top_p: sample among the fewest tokens that together have at least this probability.
        seed: row r samples with ``seed + r``; the same on one kind of device gives the same text.
        eos_id: the token that ends a row; None = rows end by length only.
        vocab_size: choose among the ids below this only, for a model with more rows than the
            tokenizer has tokens; 0 = all.
        on_token: called with (row, token) as each token is chosen, the ending one excepted.
        on_stop: called with (row, reason) when a row ends.

    Returns:
        The new tokens of each prompt, without prompt and without ``eos_id``.

    Raises:
        UserError: an argument out of range, a token id that the model does not have, a prompt
            that leaves no room in the context, or logits that are not finite.
    """
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    _check_sampling(temperature, top_k, top_p)
    rows = [_checked_prompt(model, i, prompt, eos_id) for i, prompt in enumerate(prompts)]
    new: list[list[int]] = [[] for _ in rows]
    if not rows or max_new_tokens == 0:
        return new

    device = model.embed_tokens.weight.device
    room = [min(max_new_tokens, model.config.max_seq_len - len(row)) for row in rows]
    columns = max(len(row) for row in rows)
    pad = [columns - len(row) for row in rows]
    cache = KVCache(
        model.config,
        len(rows),
        columns + max(room) - 1,  # the last new token is never fed
        device,
        model.embed_tokens.weight.dtype,
    )
    cache.pad.copy_(torch.tensor(pad))
    generators = [torch.Generator(device).manual_seed(seed + row) for row in range(len(rows))]
    tokens = torch.tensor([[0] * n + row for n, row in zip(pad, rows, strict=True)], device=device)

    live = set(range(len(rows)))

    def stop(row: int, reason: StopReason) -> None:
        live.remove(row)
        if on_stop is not None:
            on_stop(row, reason)

    with evaluation_mode(model):
        while live:
            logits_BV = model(tokens, cache)[:, -1, : vocab_size or None].float()
            chosen = _choose(logits_BV, temperature, top_k, top_p, generators)
            for row, token in enumerate(chosen.tolist()):  # the one wait for the device a step
                if row not in live:
                    continue
                if token < 0:
                    raise UserError(
                        f"the model's logits for token {len(new[row])} after prompt {row} are NaN "
                        "or infinite: its weights are damaged, or its training diverged"
                    )
                if token == eos_id:
                    stop(row, "eos")
                    continue
                new[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                if len(new[row]) == room[row]:
                    stop(row, "length" if room[row] == max_new_tokens else "context")
            tokens = chosen.clamp(min=0).unsqueeze(1)
    return new


def next_token_probabilities(
    logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The distribution to sample from: temperature, then top-k, then top-p, then renormalized.

    Arguments:
        logits_BV: fp32 ``[B, V]``.
        temperature: above 0.
        top_k: 0 or at least the vocabulary = all; among equal logits any k.
        top_p: in (0, 1]; the most likely token always stays. Counts the probabilities after top-k.

    Returns:
        fp32 ``[B, V]``, rows sum to 1, exactly 0 for what is cut off.
    """
    # Subtracting the peak first keeps a tiny temperature from overflowing: exp sees 0 and below.
    # A temperature below fp32's range would divide by 0.
    scaled = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    vocab_size = scaled.shape[-1]
    if top_p < 1:
        ranked, ids = scaled.sort(-1, descending=True)
        ranked, ids = ranked[:, : top_k or None], ids[:, : top_k or None]
    elif 0 < top_k < vocab_size:
        ranked, ids = scaled.topk(top_k, -1)
    else:
        return scaled.softmax(-1)
    probabilities = ranked.softmax(-1)
    inside = probabilities.cumsum(-1) - probabilities < top_p
    inside[:, 0] = True
    kept = probabilities.where(inside, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(scaled).scatter_(-1, ids, kept)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a prompt: the end-of-document token, which stands before every document in
    training, then the text's tokens (none for "")."""
    return [tokenizer.eos_id, *tokenizer.encode(text)]


class TextStream:
    """Tokens to text as they come.

    What the calls return adds up to ``tokenizer.decode(prompt + tokens)`` after the prompt. A
    character whose bytes come in several tokens (byte fallback) is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """The prompt's tokens decide whether the first new one begins with its space."""
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._printed = len(_whole(tokenizer.decode(self._ids)))

    def push(self, token: int) -> str:
        """Take one token; return the text that is certain now, which may be empty."""
        self._ids.append(token)
        return self._advance(_whole(self._tokenizer.decode(self._ids)))

    def finish(self) -> str:
        """The rest: bytes that never became a character, as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[self._printed :]
        self._printed += len(new)
        return new


def _whole(text: str) -> str:
    """Without the characters at the end that another token may still change: an unfinished UTF-8
    character has at most three bytes, and each decodes to one U+FFFD."""
    for _ in range(3):
        text = text.removesuffix("\N{REPLACEMENT CHARACTER}")
    return text


def _choose(
    logits_BV: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generators: list[torch.Generator],
) -> Tensor:
    """The next token of each row, int64 ``[B]``; -1 where the logits have no finite maximum."""
    broken = ~logits_BV.amax(-1).isfinite()
    if temperature == 0:
        chosen = logits_BV.argmax(-1)
    else:
        sound_BV = logits_BV.masked_fill(broken.unsqueeze(-1), 0.0)  # multinomial raises on NaN
        probabilities = next_token_probabilities(sound_BV, temperature, top_k, top_p)
        draws = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, generators, strict=True)
        ]
        chosen = torch.cat(draws)
    return chosen.masked_fill(broken, -1)


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k < 0:
        raise UserError(f"top_k must be 0 (off) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1 (off), got {top_p}")


def _checked_prompt(
    model: Transformer, row: int, prompt: list[int], eos_id: int | None
) -> list[int]:
    if not prompt:
        if eos_id is None:
            raise UserError(f"prompt {row} is empty, and there is no eos_id to start from")
        prompt = [eos_id]
    vocab_size, limit = model.config.vocab_size, model.config.max_seq_len
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise UserError(
            f"prompt {row} holds token ids {min(prompt)} to {max(prompt)}; the model has 0 to "
            f"{vocab_size - 1}: is the tokenizer the model's?"
        )
    if len(prompt) >= limit:
        raise UserError(
            f"prompt {row} has {len(prompt)} tokens and leaves no room in the model's context "
            f"of {limit}"
        )
    return prompt
