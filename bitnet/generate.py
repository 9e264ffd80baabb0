"""Text from a model, in one call: an engine sized to the call, used once and dropped.

For more than one call on the same weights make a :class:`bitnet.engine.engine.Engine`: it is built
once, and remembers what it has computed. See docs/generation.md.
"""

from collections.abc import Callable, Sequence

from bitnet.data.tokenizer import Tokenizer
from bitnet.engine.decoder import LARGEST_BATCH, CacheDtype, HeadDtype
from bitnet.engine.engine import Engine
from bitnet.engine.request import StopReason, integer, sequence
from bitnet.engine.sampling import next_token_probabilities
from bitnet.engine.text import TextStream, encode_prompt
from bitnet.linear import Kernel
from bitnet.model import Transformer

__all__ = [
    "StopReason",
    "TextStream",
    "encode_prompt",
    "generate",
    "next_token_probabilities",
    "sized_engine",
]


def sized_engine(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokenizer: Tokenizer | None = None,
    *,
    cache_dtype: CacheDtype = "auto",
    head: HeadDtype = "auto",
    kernel: Kernel = "auto",
) -> Engine:
    """An engine with just the rows and columns that a call needs; arguments as :class:`Engine`."""
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    sizes = [len(prompt) for prompt in sequence(prompts) if isinstance(prompt, Sequence)]
    return Engine(
        model,
        tokenizer,
        max_batch=max(1, min(len(prompts), LARGEST_BATCH)),
        max_len=min(model.config.max_seq_len, max([1, *sizes]) + max(1, max_new_tokens)),
        cache_dtype=cache_dtype,
        head=head,
        kernel=kernel,
    )


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
    vocab_size: int = 0,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    on_token: Callable[[int, int], None] | None = None,
    on_stop: Callable[[int, StopReason], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt: :meth:`Engine.generate`, where the arguments are explained.

    Prompt and continuation together fill at most ``model.config.max_seq_len`` positions. The model
    may be in training, with any kind of layer; it is put in eval mode meanwhile, and nothing of
    the engine is kept.

    Returns:
        The new tokens of each prompt, without prompt, ``eos_id`` and stop string.

    Raises:
        UserError: as :meth:`Engine.generate`.
    """
    return sized_engine(model, prompts, max_new_tokens, tokenizer).generate(
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=eos_id,
        vocab_size=vocab_size,
        stop=stop,
        on_token=on_token,
        on_stop=on_stop,
    )
