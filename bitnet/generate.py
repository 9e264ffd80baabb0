"""Generate text in one call, by an engine of just the size needed, used once and dropped.

For more than one call on the same weights make a :class:`bitnet.Engine`: it is built once, and
reuses the keys and values of earlier calls. See docs/generation.md.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from bitnet.data.tokenizer import Tokenizer
from bitnet.engine.decoder import LARGEST_BATCH
from bitnet.engine.engine import Engine
from bitnet.engine.request import (
    GREEDY,
    SamplingFields,
    SamplingParams,
    StopReason,
    integer,
    sequence,
)
from bitnet.model import Transformer


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text as a prompt: the end-of-document token, which precedes every document in
    training, then the text's tokens (none for "")."""
    return [tokenizer.eos_id, *tokenizer.encode(text)]


class EngineSize(TypedDict):
    """Arguments of :class:`bitnet.Engine`."""

    max_batch: int
    max_len: int


def size_for(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> EngineSize:
    """The rows and positions that one call needs: ``Engine(model, **size_for(...))``.

    Raises:
        UserError: ``prompts`` is not a list, or ``max_new_tokens`` is not an integer.
    """
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    sizes = [len(prompt) for prompt in sequence(prompts) if isinstance(prompt, Sequence)]
    return {
        "max_batch": max(1, min(len(prompts), LARGEST_BATCH)),
        "max_len": min(model.config.max_seq_len, max([1, *sizes]) + max(1, max_new_tokens)),
    }


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    params: SamplingParams = GREEDY,
    *,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_stop: Callable[[int, StopReason], None] | None = None,
    **fields: Unpack[SamplingFields],
) -> list[list[int]]:
    """Continue each prompt. :meth:`Engine.generate` explains the arguments.

    Prompt and continuation together fill at most ``model.config.max_seq_len`` positions. The model
    may be in training and have any kind of layer. It is in eval mode during the call. The engine is
    not kept.

    Returns:
        The new tokens for each prompt, without the prompt, ``eos_id`` and the stop string.

    Raises:
        UserError: as :meth:`Engine.generate`.
    """
    engine = Engine(model, tokenizer, **size_for(model, prompts, max_new_tokens))
    return engine.generate(
        prompts, max_new_tokens, params, on_token=on_token, on_stop=on_stop, **fields
    )
