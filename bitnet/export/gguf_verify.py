"""Check an exported GGUF file against the model, in llama.cpp itself.

llama.cpp multiplies by the same codes and scales. But it rounds activations to int8 in blocks of
256 channels (not at all for f32 matrices), where our model rounds them per token, and it keeps keys
and values in fp16. That moves logits by some 3% of their spread in a small model, and by more in a
deep one. A format error (a scale, an order of rows, a norm, an activation) moves them by 100%. The
bound is in between.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer
from bitnet.evaluate import evaluation_mode
from bitnet.export.gguf import load_gguf
from bitnet.export.gguf_file import open_gguf
from bitnet.export.hf_tokenizer import probes
from bitnet.export.verification import Verification, compare_codes
from bitnet.model import Transformer

BOUND = 0.2
"""Bound on the root mean square difference of logits, in standard deviations of the logits."""
TOKENS = 64
"""Tokens in each of the two compared rows, or as many as the context holds."""


def verify_gguf(model: Transformer, tokenizer: Tokenizer, path: Path) -> Verification:
    """Read back and compare codes, scales and token ids; then token ids and logits in llama.cpp.

    Raises:
        UserError: the file cannot be read back.
    """
    result = Verification()
    loaded, read = load_gguf(path)
    compare_codes(model, loaded, result, fp16=("embed_tokens.weight",))
    texts = list(probes(tokenizer))
    for text in texts:
        if read.encode(text) != tokenizer.encode(text):
            result.differences.append(f"{text!r} has other ids when the file is read back")
    if any(tensor.tensor_type.name == "I2_S" for tensor in open_gguf(path).tensors):
        result.skipped.append("i2_s is read by bitnet.cpp, which is not run here: ids and logits")
        return result
    try:
        import llama_cpp
    except ImportError:
        result.skipped.append(
            'llama.cpp is not here: ids and logits; pip install "bitnet-train[peers]"'
        )
        return result
    length = min(TOKENS, model.config.max_seq_len)
    try:
        llama = llama_cpp.Llama(
            str(path), n_ctx=max(TOKENS, length), logits_all=True, verbose=False
        )
    except ValueError as error:
        result.differences.append(f"llama.cpp does not load it: {error}")
        return result
    try:
        for text in texts:
            theirs = llama.tokenize(text.encode(), add_bos=False)
            ours = tokenizer.encode(text)
            if theirs != ours and "</s>" in text:
                result.skipped.append(f"ids of {text!r}: llama.cpp reads what it spells as tokens")
            elif theirs != ours:
                result.differences.append(f"{text!r} has the ids {theirs} there, {ours} here")
        if not result.differences:
            result.compared.append(f"{len(texts)} texts have the same ids in llama.cpp")
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(
            model.config.vocab_size,
            (2, length),
            generator=generator,
            dtype=torch.int64,
            device="cpu",
        )
        with torch.no_grad(), evaluation_mode(model):
            _compare_logits(model(tokens), _logits(llama, tokens), result)
    finally:
        llama.close()
    return result


def _logits(llama: Any, tokens: Tensor) -> Tensor:
    """llama.cpp's logits of every position, fp32 ``[B, T, V]``."""
    rows = []
    for row in tokens.tolist():
        llama.reset()
        llama.eval(row)
        rows.append(torch.from_numpy(llama.scores[: len(row)].copy()))
    return torch.stack(rows)


def _compare_logits(ours: Tensor, theirs: Tensor, result: Verification) -> None:
    difference = float((ours - theirs).square().mean().sqrt() / ours.std())
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    result.record(
        difference <= BOUND,
        f"logits of {ours.shape[0] * ours.shape[1]} tokens: the difference is {difference:.1%} of "
        f"their spread (root mean square); the likeliest token is the same for {same:.1%}",
    )
