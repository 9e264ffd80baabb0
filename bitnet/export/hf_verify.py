"""Check an exported Hugging Face folder against the model, in transformers itself.

Both programs add the same integers, but transformers quantizes activations by x * (127 / max) where
our models divide, and in ``online`` it rounds w * (1 / mean). So a value halfway between two codes
may get the other code. A small model has no such value in a few thousand tokens, and its logits
agree to 1e-6 of their spread. A large model has some in every text. One changed code moves the
later values by at most the effect of rounding to int8, some 1% of the spread. A format error (an
inverse scale, another norm, no quantization) moves them by 100%. The bounds are in between.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.data.chat_template import Message
from bitnet.data.tokenizer import Tokenizer
from bitnet.evaluate import evaluation_mode
from bitnet.export.hf import load_hf
from bitnet.export.hf_tokenizer import probes
from bitnet.export.verification import Verification, compare_codes
from bitnet.generate import encode_prompt, generate
from bitnet.model import Transformer
from bitnet.schema import UserError

MEDIAN, NEARLY_ALL = 0.01, 0.1
"""Bounds on the median and on the 99.9% quantile of |difference|, in standard deviations of the
logits."""
TOKENS = 64
"""Tokens whose logits are compared, and greedy tokens, or as many as the context holds."""
PROMPTS = ("", "The ", "def __init__(self")
CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "to be?"}],
    [
        {"role": "user", "content": "  two  spaces \n"},
        {"role": "assistant", "content": "naïve"},
        {"role": "user", "content": "and?"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}],
)


def verify_hf(model: Transformer, tokenizer: Tokenizer, path: Path) -> Verification:
    """Read back codes and scales; then compare token ids, logits, greedy tokens in transformers.

    Raises:
        UserError: the folder cannot be read back.
    """
    result = Verification()
    loaded, _ = load_hf(path)
    compare_codes(model, loaded, result)
    try:
        import accelerate  # noqa: F401 - transformers needs it for loading
        import transformers
    except ImportError:
        result.skipped.append(
            'transformers is not here: ids, logits, tokens; pip install "bitnet-train[hf]"'
        )
        return result
    # eager: compiled functions would need a C++ compiler and half a minute
    with torch.compiler.set_stance("force_eager"), _quiet(transformers.utils.logging):
        encoder = transformers.AutoTokenizer.from_pretrained(path)
        _compare_ids(encoder, tokenizer, result)
        _compare_chats(encoder, tokenizer, result)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        _compare_logits(model, theirs, result)
        _compare_generated(model, tokenizer, theirs, result)
    return result


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Turn off transformers' progress bars and advice within the block."""
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _compare_ids(theirs: Any, tokenizer: Tokenizer, result: Verification) -> None:
    texts = list(probes(tokenizer))
    if tokenizer.chat_template is not None:  # then a special token's name is the token
        texts = [text for text in texts if not any(name in text for name in tokenizer.specials)]
    for text in texts:
        ids, expected = theirs(text)["input_ids"], encode_prompt(tokenizer, text)
        if ids != expected:
            result.differences.append(f"{text!r} has the ids {ids} there, {expected} here")
    if not result.differences:
        result.compared.append(f"{len(texts)} texts have the same ids in transformers")


def _compare_chats(theirs: Any, tokenizer: Tokenizer, result: Verification) -> None:
    if (template := tokenizer.chat_template) is None:
        return
    equal = 0
    for chat in CHATS:
        try:
            text = template.render(chat)
        except UserError:  # not every template accepts a system message
            continue
        found = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        if found != text or ids != tokenizer.encode_chat(template, chat):
            result.differences.append(f"a chat of {len(chat)} messages is {found!r} there")
        equal += 1
    result.record(True, f"{equal} chats have the same text and ids by the chat template")


def _compare_logits(model: Transformer, theirs: Any, result: Verification) -> None:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, config.max_seq_len)
    tokens = torch.randint(
        config.vocab_size, (2, length), generator=generator, dtype=torch.int64, device="cpu"
    )
    with torch.no_grad(), evaluation_mode(model):
        ours, logits = model(tokens), theirs(tokens).logits
    difference = ((ours - logits).abs() / ours.std()).flatten()
    middle, high = quantile(difference, 0.5), quantile(difference, 0.999)
    result.record(
        middle <= MEDIAN and high <= NEARLY_ALL,
        f"logits of {tokens.numel()} tokens: |difference| is {middle:.1g} in the median and "
        f"{high:.1g} at 99.9%, in units of their spread",
    )


def quantile(values: Tensor, share: float) -> float:
    """The value that the given share of the values ``[N]`` does not exceed."""
    return float(values.kthvalue(math.ceil(share * values.numel())).values)


def _compare_generated(
    model: Transformer, tokenizer: Tokenizer, theirs: Any, result: Verification
) -> None:
    prompts = [encode_prompt(tokenizer, text) for text in PROMPTS]
    count = min(TOKENS, model.config.max_seq_len - max(map(len, prompts)))
    if count < 1:
        result.skipped.append(
            f"greedy tokens: a context of {model.config.max_seq_len} is too short"
        )
        return
    same = 0
    for prompt in prompts:
        (ours,) = generate(model, [prompt], count)
        new = _generate_theirs(theirs, prompt, count)
        at = next((i for i, (a, b) in enumerate(zip(ours, new, strict=True)) if a != b), count)
        same += at
        if at == count:
            continue
        with torch.no_grad(), evaluation_mode(model):
            logits = model(torch.tensor([prompt + ours[:at]], dtype=torch.int64, device="cpu"))[
                0, -1
            ]
        margin = float((logits[ours[at]] - logits[new[at]]) / logits.std())
        result.record(
            margin <= NEARLY_ALL,
            f"greedy token {at} is {new[at]} there, {ours[at]} here, whose logits are {margin:.1g} "
            "spreads apart",
        )
    if same == count * len(prompts):
        result.compared.append(f"{same} greedy tokens are equal")


def _generate_theirs(theirs: Any, prompt: list[int], count: int) -> list[int]:
    generated = theirs.generate(
        torch.tensor([prompt], dtype=torch.int64, device="cpu"),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device="cpu"),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    new: list[int] = generated[0, len(prompt) :].tolist()
    return new
