"""Log likelihoods of the last tokens of many sequences, of any lengths, in batches.

Two comparisons with published results use it. A sliding window over a text (bitnet/perplexity.py)
predicts the end of each window. A multiple-choice task (bitnet/harness.py) predicts the tokens of
an answer after its question.

Sequences are sorted by length, so that a batch has little padding. The padding is on the right:
attention is causal and activations are quantized per token, so no token sees it. The head, most of
a small model's work, computes only the positions that predict.

B sequences, T tokens of the longest, D channels, M predicted tokens of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet.evaluate import evaluation_mode, logits_at_once
from bitnet.model import Transformer

_CPU_TOKENS, _GPU_TOKENS = 2**12, 2**16
"""Tokens per batch if no batch size is given."""


class Ending(NamedTuple):
    """A sequence whose last tokens are to be predicted."""

    ids: Tensor
    """int64 ``[T]``, at most one more than the model's context"""
    predicted: int
    """number of tokens at the end, 0 to T - 1: the first token of a sequence has no context"""


class Likelihood(NamedTuple):
    """The likelihood of a sequence's predicted tokens."""

    log_p: float
    """natural logarithm of their probability, summed over the tokens"""
    greedy: bool
    """whether each token is the most likely one at its position"""


def log_likelihoods(
    model: Transformer,
    endings: Sequence[Ending],
    batch_size: int = 0,
    track: Callable[[list[list[int]]], Iterable[list[int]]] = iter,
) -> list[Likelihood]:
    """Score each ending, in the order given.

    Softmax in fp32, sums in float64. The result depends on the batches only by rounding.

    Arguments:
        model: evaluated on its device, in eval mode (restored afterwards).
        batch_size: sequences per forward; 0 = up to 4,096 tokens on a CPU, 65,536 elsewhere.
        track: wraps the batches to show progress, as ``bitnet.progress.Reports.track`` does.
    """
    results = [Likelihood(0.0, True)] * len(endings)
    scored = [place for place, ending in enumerate(endings) if ending.predicted]
    scored.sort(key=lambda place: -len(endings[place].ids))
    device = model.norm.weight.device
    limit = batch_size, _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS
    batches = list(_batches(scored, endings, *limit))
    with evaluation_mode(model):
        for places in track(batches):
            batch = [endings[place] for place in places]
            results_of = zip(places, _score(model, batch, device), strict=True)
            for place, result in results_of:
                results[place] = result
    return results


def _batches(
    places: Sequence[int], endings: Sequence[Ending], batch_size: int, max_tokens: int
) -> Iterator[list[int]]:
    """Cut ``places``, sorted longest first, into batches: the first of a batch sets its width."""
    begin = 0
    while begin < len(places):
        width = len(endings[places[begin]].ids)
        rows = batch_size or max(1, max_tokens // width)
        yield list(places[begin : begin + rows])
        begin += rows


def _score(model: Transformer, batch: list[Ending], device: torch.device) -> list[Likelihood]:
    """Run one forward; the results are in the order of the batch."""
    width = len(batch[0].ids) - 1
    inputs_BT = torch.zeros(len(batch), width, dtype=torch.int64, device="cpu")
    for row, (ids, _) in enumerate(batch):
        inputs_BT[row, : len(ids) - 1] = ids[:-1]
    hidden_BTD = model.hidden(inputs_BT.to(device))
    ends = [(len(ids) - 1, predicted) for ids, predicted in batch]
    hidden_MD = torch.cat([hidden_BTD[row, end - n : end] for row, (end, n) in enumerate(ends)])
    target_M = torch.cat([ids[-n:] for ids, n in batch]).to(device)
    log_p, hits = [], []
    rows = max(1, logits_at_once(device) // model.config.vocab_size)
    for hidden, target in zip(hidden_MD.split(rows), target_M.split(rows), strict=True):
        logits = model.lm_head(hidden).float()
        log_p.append(-F.cross_entropy(logits, target, reduction="none").double())
        hits.append(logits.argmax(-1) == target)
    counts = [n for _, n in ends]
    sums = [float(part.sum()) for part in torch.cat(log_p).cpu().split(counts)]
    greedy = [bool(part.all()) for part in torch.cat(hits).cpu().split(counts)]
    return list(map(Likelihood, sums, greedy))
