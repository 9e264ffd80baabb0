"""What a call to the engine asks for, checked: its options, and a row for each prompt."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from bitnet.data.tokenizer import Tokenizer, check_text
from bitnet.engine.text import TextStream
from bitnet.schema import UserError

StopReason = Literal["eos", "stop", "length", "context"]
"""Why a row ended: end of document, a stop string, ``max_new_tokens`` reached, or the context is
full."""


@dataclass(frozen=True)
class Options:
    """A call's options; :meth:`bitnet.engine.engine.Engine.generate` says what they mean.

    ``stop`` may be given as any iterable, and is a tuple afterwards; so is ``eos_id``, which may be
    one id or several.

    Raises:
        UserError: one of another type, or out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_id: int | Sequence[int] | None = None
    vocab_size: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "vocab_size"):
            integer(name, getattr(self, name))
        eos = self.eos_id
        several = isinstance(eos, Sequence) and not isinstance(eos, str)
        ids = tuple(eos) if several else () if eos is None else (eos,)  # type: ignore[arg-type]
        object.__setattr__(self, "eos_id", tuple(integer("eos_id", one) for one in ids))
        for name in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, name), Real) or isinstance(value, bool):
                raise UserError(f"{name} must be a number, got {value!r}")
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}")
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
            stop = tuple(stop)  # an iterator can be read but once
        if not isinstance(stop, tuple) or not all(isinstance(one, str) and one for one in stop):
            raise UserError(f"stop must be a list of strings, none empty, got {stop!r}")
        for one in stop:
            check_text(one, "stop")
        object.__setattr__(self, "stop", stop)


@dataclass
class Row:
    """A prompt on its way."""

    index: int
    prompt: list[int]
    room: int
    """New tokens that ``max_new_tokens`` and the context leave it."""
    text: TextStream | None
    ends: dict[int, StopReason] = field(default_factory=dict)
    """The tokens that end the row, none of which it keeps."""
    slot: int = -1
    """The decoder's row that it is in."""
    new: list[int] = field(default_factory=list)
    delivered: int = 0
    """How many of the new tokens the caller has."""
    ended: bool = False

    def take(self, token: int, options: Options) -> tuple[str, StopReason | None]:
        """The row's next token: the text that is certain now, and why the row ends, if it does.

        Raises:
            UserError: -1, for logits that are not finite.
        """
        if token < 0:
            raise UserError(
                f"the model's logits for token {len(self.new)} after prompt {self.index} are NaN "
                "or infinite: its weights are damaged, or its training diverged"
            )
        text, reason = "", self._reason(token, options)
        if token not in self.ends:
            self.new.append(token)
            if self.text is not None:
                text = self.text.push(token)
                reason = "stop" if self.text.stopped else reason
        if reason is not None:
            self.ended = True
            text += self.text.finish() if self.text is not None else ""
        return text, reason

    def _reason(self, token: int, options: Options) -> StopReason | None:
        if token in self.ends:
            return self.ends[token]
        if len(self.new) + 1 < self.room:
            return None
        return "length" if self.room == options.max_new_tokens else "context"

    def deliver(self) -> list[int]:
        """The tokens that have become certain since the last time."""
        begin = self.delivered
        self.delivered = len(self.new) if self.text is None else self.text.settled
        return self.new[begin : self.delivered]


def make_rows(
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    n_ids: int,
    max_len: int,
    context: int,
    tokenizer: Tokenizer | None,
    as_text: bool,
) -> list[Row]:
    """A row for each prompt.

    Arguments:
        n_ids: tokens that the model has. max_len: positions of a row; context: of the model.
        tokenizer: needed for stop strings, and for ``as_text``: the rows' text is wanted.

    Raises:
        UserError: a prompt or an option that does not fit model or engine.
    """
    eos_ids: tuple[int, ...] = options.eos_id  # type: ignore[assignment]
    for end in eos_ids:
        if not 0 <= end < n_ids:
            raise UserError(f"eos_id must be 0 to {n_ids - 1}, got {end}")
    if not 0 <= options.vocab_size <= n_ids:
        raise UserError(f"vocab_size must be 0 (all) to {n_ids}, got {options.vocab_size}")
    as_text = as_text or bool(options.stop)
    if as_text and tokenizer is None:
        raise UserError("stop strings and on_text need the engine's tokenizer; it has none")
    ends: dict[int, StopReason] = dict.fromkeys(eos_ids, "eos")
    for name in options.stop:
        special = None if tokenizer is None else tokenizer.special_id(name)
        if special is not None:
            ends.setdefault(special, "stop")
    rows = []
    for index, prompt in enumerate(sequence(prompts)):
        ids = _token_ids(index, prompt, eos_ids)
        if min(ids) < 0 or max(ids) >= n_ids:
            raise UserError(
                f"prompt {index} holds token ids {min(ids)} to {max(ids)}; the model has 0 to "
                f"{n_ids - 1}: is the tokenizer the model's?"
            )
        if len(ids) >= max_len:
            limit = f"the model's context of {context}"
            if max_len < context:
                limit = f"the engine's max_len of {max_len} ({limit})"
            raise UserError(f"prompt {index} has {len(ids)} tokens and leaves no room in {limit}")
        room = min(options.max_new_tokens, max_len - len(ids))
        text = TextStream(tokenizer, ids, options.stop) if tokenizer and as_text else None
        rows.append(Row(index, ids, room, text, ends))
    return rows


def integer(name: str, value: Any) -> int:
    """An argument that must be an integer (a bool is none); raises UserError, with its name."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be an integer, got {value!r}") from None


def sequence(prompts: Any) -> Sequence[Any]:
    """Prompts, which must be a list, whatever is in it; raises UserError."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise UserError(f"prompts must be a list of lists of token ids, got {prompts!r}")
    return prompts


def _token_ids(row: int, prompt: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise UserError(f"prompt {row} must be a list of token ids, got {prompt!r}")
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise UserError(f"prompt {row} must be a list of token ids: {error}") from error
    if ids:
        return ids
    if not eos_ids:
        raise UserError(f"prompt {row} is empty, and there is no eos_id to start from")
    return [eos_ids[0]]
