"""The checked arguments of a call to the engine: how to sample, and a request for each prompt."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, TypedDict

from bitnet.data.tokenizer import Tokenizer, check_text
from bitnet.engine.text import TextStream
from bitnet.schema import UserError

StopReason = Literal["eos", "stop", "length", "context"]
"""Why a text ended: end of document, a stop string, ``max_new_tokens`` reached, or the context is
full."""


@dataclass(frozen=True)
class SamplingParams:
    """How each token is chosen, and what ends a text.

    Raises:
        UserError: a field has a wrong type or is out of range.
    """

    temperature: float = 0.0
    """0 = the most likely token (greedy); otherwise divides the logits"""
    top_k: int = 0
    """sample among the k most likely tokens; 0 = all"""
    top_p: float = 1.0
    """sample among the fewest tokens that together have at least this probability; 1 = all"""
    seed: int = 0
    """prompt i samples with ``seed + i``; equal logits then give equal text"""
    eos_id: int | Sequence[int] | None = None
    """the token that ends a text, or several of them (``Tokenizer.eos_ids``); None = none does"""
    vocab_size: int = 0
    """choose among the ids below this only, for a model with more rows than the tokenizer has
    tokens; 0 = all"""
    stop: Sequence[str] = ()
    """strings that end a text; given as any iterable, kept as a tuple"""

    def __post_init__(self) -> None:
        for name in ("top_k", "seed", "vocab_size"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        eos_ids = tuple(integer("eos_id", one) for one in self.eos_ids)
        several = isinstance(self.eos_id, Sequence)
        object.__setattr__(self, "eos_id", eos_ids if several else next(iter(eos_ids), None))
        for name in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, name), Real) or isinstance(value, bool):
                raise UserError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        if not 0 <= self.seed <= 2**62:
            raise UserError(f"seed must be 0 to 2^62, got {self.seed}")
        stop = self.stop
        if not isinstance(stop, str) and isinstance(stop, Iterable):
            stop = tuple(stop)  # an iterator can be read only once
        if not isinstance(stop, tuple) or not all(isinstance(one, str) and one for one in stop):
            raise UserError(f"stop must be a list of strings, none empty, got {stop!r}")
        for one in stop:
            check_text(one, "stop")
        object.__setattr__(self, "stop", stop)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """``eos_id`` as a tuple."""
        if isinstance(self.eos_id, Sequence) and not isinstance(self.eos_id, str):
            return tuple(self.eos_id)
        return () if self.eos_id is None else (self.eos_id,)


class SamplingFields(TypedDict, total=False):
    """The fields of :class:`SamplingParams`, given as keywords."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    eos_id: int | Sequence[int] | None
    vocab_size: int
    stop: Sequence[str]


@dataclass
class Request:
    """A prompt and the tokens that continue it."""

    index: int
    """Place of the prompt in the call."""
    prompt: list[int]
    room: int
    """New tokens that ``max_new_tokens`` and the context allow."""
    full: StopReason
    """Which of these two limits ``room``."""
    ends: Mapping[int, StopReason]
    """Tokens that end the text, and are not part of it."""
    text: TextStream | None
    row: int = -1
    """The decoder's row that computes it."""
    new: list[int] = field(default_factory=list)
    delivered: int = 0
    """How many of the new tokens the caller has."""
    ended: bool = False

    def take(self, token: int) -> tuple[str, StopReason | None]:
        """Add the next token; return the text that is certain now, and why the text ends, or None.

        Raises:
            UserError: the token is -1, which marks logits that are not finite.
        """
        if token < 0:
            raise UserError(
                f"the model's logits for token {len(self.new)} after prompt {self.index} are NaN "
                "or infinite: its weights are damaged, or its training diverged"
            )
        text, reason = "", self.ends.get(token)
        if reason is None:
            self.new.append(token)
            if self.text is not None:
                text = self.text.push(token)
            if self.text is not None and self.text.stopped:
                reason = "stop"
            elif len(self.new) == self.room:
                reason = self.full
        if reason is not None:
            self.ended = True
            text += self.text.finish() if self.text is not None else ""
        return text, reason

    def deliver(self) -> list[int]:
        """The tokens that have become certain since the last call."""
        begin = self.delivered
        self.delivered = len(self.new) if self.text is None else self.text.settled
        return self.new[begin : self.delivered]


def make_requests(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    params: SamplingParams,
    *,
    n_ids: int,
    max_len: int,
    context: int,
    tokenizer: Tokenizer | None,
    as_text: bool,
) -> list[Request]:
    """Make a request for each prompt.

    Arguments:
        n_ids: tokens that the model has. max_len: positions of a row; context: of the model.
        tokenizer: needed for stop strings, and for ``as_text``: the caller wants text.

    Raises:
        UserError: an argument does not fit the model or the engine.
    """
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    for end in params.eos_ids:
        if not 0 <= end < n_ids:
            raise UserError(f"eos_id must be 0 to {n_ids - 1}, got {end}")
    if not 0 <= params.vocab_size <= n_ids:
        raise UserError(f"vocab_size must be 0 (all) to {n_ids}, got {params.vocab_size}")
    as_text = as_text or bool(params.stop)
    if as_text and tokenizer is None:
        raise UserError("stop strings and on_text need the engine's tokenizer; it has none")
    ends = _ends(params, tokenizer)
    requests = []
    for index, prompt in enumerate(sequence(prompts)):
        ids = _token_ids(index, prompt, params.eos_ids, n_ids)
        left = max_len - len(ids)
        if left <= 0:
            limit = f"the model's context of {context}"
            if max_len < context:
                limit = f"the engine's max_len of {max_len} ({limit})"
            raise UserError(f"prompt {index} has {len(ids)} tokens and leaves no room in {limit}")
        full: StopReason = "length" if max_new_tokens <= left else "context"
        text = TextStream(tokenizer, ids, params.stop) if tokenizer and as_text else None
        requests.append(Request(index, ids, min(max_new_tokens, left), full, ends, text))
    return requests


def integer(name: str, value: Any) -> int:
    """``value``, which must be an integer and not a bool; else raises UserError with its name."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be an integer, got {value!r}") from None


def sequence(prompts: Any) -> Sequence[Any]:
    """``prompts``, which must be a list, with any items; else raises UserError."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise UserError(f"prompts must be a list of lists of token ids, got {prompts!r}")
    return prompts


def _ends(params: SamplingParams, tokenizer: Tokenizer | None) -> dict[int, StopReason]:
    """The tokens that end a text: ``eos_id``, and special tokens that ``stop`` names."""
    ends: dict[int, StopReason] = dict.fromkeys(params.eos_ids, "eos")
    for name in params.stop:
        special = None if tokenizer is None else tokenizer.special_id(name)
        if special is not None:
            ends.setdefault(special, "stop")
    return ends


def _token_ids(index: int, prompt: Sequence[int], eos_ids: Sequence[int], n_ids: int) -> list[int]:
    """The ids of prompt ``index``; for an empty prompt, the first of ``eos_ids``."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise UserError(f"prompt {index} must be a list of token ids, got {prompt!r}")
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise UserError(f"prompt {index} must be a list of token ids: {error}") from error
    if not ids and not eos_ids:
        raise UserError(f"prompt {index} is empty, and there is no eos_id to start from")
    ids = ids or [eos_ids[0]]
    if min(ids) < 0 or max(ids) >= n_ids:
        raise UserError(
            f"prompt {index} holds token ids {min(ids)} to {max(ids)}; the model has 0 to "
            f"{n_ids - 1}: is the tokenizer the model's?"
        )
    return ids


GREEDY = SamplingParams()
"""The most likely token each time; only its length ends a text."""


def sampling_params(params: Any, fields: SamplingFields) -> SamplingParams:
    """``params``, overridden by the keywords of a call; raises UserError for a wrong type."""
    if not isinstance(params, SamplingParams):
        raise UserError(f"params must be a SamplingParams, got {params!r}")
    return replace(params, **fields)
