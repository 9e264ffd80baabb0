"""Perplexity by a sliding window, as in published results (WikiText and similar).

A window of L tokens moves over the text by S tokens, the stride. Each token is predicted once, by
the first window that holds it and at least one token before it:

    tokens     0 1 2 3 4 5 6 7 8 9          L = 4, S = 2
    window 0   . 1 2 3                      predicts 1 2 3
    window 1       . . 4 5                  predicts 4 5
    window 2           . . 6 7              ...

So a token has at least L - S tokens of context, except near the start of the text. With S = L the
windows do not overlap, and the first token of each window is not predicted; many papers on
quantization report this (with L = 2048). Perplexity is exp of the mean loss of the predicted
tokens. This is the loop of Hugging Face's documentation ("Perplexity of fixed-length models") with
one change: each window is weighted by the number of tokens that it predicts. That loop counts one
too few in each window but the first.

Perplexity per token depends on the tokenizer. Perplexity per word,

    word perplexity = exp(loss * tokens / words)        white space separates words,

compares models with different tokenizers, as bits per byte do. Token 0 is the end-of-document
token, the context of the text's first token, as everywhere in this library.
"""

from collections.abc import Callable, Iterable

import torch

from bitnet.data.tokenizer import Tokenizer
from bitnet.evaluate import EvalResult, check_text_fits, of_text
from bitnet.model import Transformer
from bitnet.schema import UserError
from bitnet.scoring import Ending, log_likelihoods


def sliding_perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    stride: int,
    context: int = 0,
    track: Callable[[list[list[int]]], Iterable[list[int]]] = iter,
) -> EvalResult:
    """Evaluate on a text taken as one document, with overlapping windows.

    Arguments:
        stride: S, 1 to L. context: L; 0 = the model's context.
        track: wraps the batches to show progress, as ``bitnet.progress.Reports.track`` does.
    Returns:
        The mean loss of the predicted tokens; per byte and per word it stands for all tokens.
    Raises:
        UserError: the text is empty, the tokenizer is not the model's, or the context or the stride
            is impossible.
    """
    check_text_fits(model, tokenizer, text)
    longest = model.config.max_seq_len
    if not 0 <= context <= longest:
        raise UserError(f"context: must be 0 (the model's) to {longest}, which that is")
    context = context or longest
    if not 1 <= stride <= context or context < 2:
        raise UserError(f"stride: must be 1 to the context of {context}, got {stride}")
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text)], dtype=torch.int64, device="cpu")
    endings, seen = [], 1
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + context]
        end = begin + len(window)
        endings.append(Ending(window, min(end - seen, len(window) - 1)))
        seen = end
        if end == len(ids):
            break
    log_p = sum(result.log_p for result in log_likelihoods(model, endings, track=track))
    predicted = sum(ending.predicted for ending in endings)
    return of_text(-log_p / predicted, predicted, len(ids) - 1, text)
