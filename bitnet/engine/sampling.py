"""Choosing the next token: the distribution, and a draw from it with one uniform number.

A draw inverts the cumulative distribution: it takes the first token whose cumulative probability
exceeds the number. So a text is a function of the logits and the numbers. Each prompt has
its own generator of random numbers, always on the CPU. Neither the global random state nor another
prompt changes its numbers. Nothing here waits for the device.
"""

import torch
from torch import Tensor


def next_token_probabilities(
    logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The distribution to sample from: temperature, then top-k, then top-p, then renormalized.

    Arguments:
        logits_BV: fp32 ``[B, V]``.
        temperature: above 0.
        top_k: 0 or at least the vocabulary = all; among equal logits any k.
        top_p: in (0, 1]; applied to the probabilities after top-k. The most likely token always
            stays.

    Returns:
        fp32 ``[B, V]``; rows sum to 1, and tokens that are cut off have exactly 0.
    """
    # Subtract the maximum first, so that exp gets 0 and below and a tiny temperature does not
    # overflow. A temperature below fp32's range would divide by 0.
    scaled = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    vocab_size = scaled.shape[-1]
    if 0 < top_k < vocab_size:  # before top_p: sorting a whole vocabulary takes long
        ranked, ids = scaled.topk(top_k, -1)
    elif top_p < 1:
        ranked, ids = scaled.sort(-1, descending=True)
    else:
        return scaled.softmax(-1)
    probabilities = ranked.softmax(-1)
    inside = probabilities.cumsum(-1) - probabilities < top_p
    inside[:, 0] = True
    kept = probabilities.where(inside, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(scaled).scatter_(-1, ids, kept)


def uniforms(seed: int, n: int) -> Tensor:
    """The random numbers of a text's draws, in order: float64 ``[n]`` in [0, 1), on the CPU.

    A longer sequence from the same seed begins with the shorter one.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(n, dtype=torch.float64, generator=generator, device="cpu")
    # The last few below 1 would round to 1 when multiplied by a sum of probabilities.
    return numbers.clamp_(max=1 - 2**-50)


def draw(probabilities_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Draw a token for each row: the first whose cumulative probability exceeds the number.

    Arguments:
        probabilities_BV: float ``[B, V]``, at least 0, with any positive sum.
        uniforms_B: float64 ``[B]`` in [0, 1 - 2**-50].

    Returns:
        int64 ``[B]``; never a token of probability 0.
    """
    cumulated = probabilities_BV.double().cumsum(-1)
    numbers = uniforms_B.unsqueeze(-1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, numbers, right=True).squeeze(-1)


def choose(
    logits_BV: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniforms_B: Tensor | None = None,
) -> Tensor:
    """Choose the next token of each row.

    Arguments:
        logits_BV: fp32 ``[B, V]``.
        temperature: 0 = the most likely token (greedy), which takes no ``uniforms_B``.
        top_k, top_p: see :func:`next_token_probabilities`.
        uniforms_B: float64 ``[B]``, see :func:`draw`.

    Returns:
        int64 ``[B]``; -1 if the logits have no finite maximum.
    """
    broken = ~logits_BV.amax(-1).isfinite()
    if temperature == 0:
        return logits_BV.argmax(-1).masked_fill(broken, -1)
    assert uniforms_B is not None
    sound_BV = logits_BV.masked_fill(broken.unsqueeze(-1), 0.0)
    probabilities_BV = next_token_probabilities(sound_BV, temperature, top_k, top_p)
    return draw(probabilities_BV, uniforms_B).masked_fill(broken, -1)
