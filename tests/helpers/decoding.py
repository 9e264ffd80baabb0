"""Small models, prompts, and their greedy tokens: by hand, which is the oracle, and by a decoder.

In fp64 the two agree. Sums of floats in another order differ in the last bits. If an activation is
that close to the border between two int8 codes, the difference is a whole code, and grows from
there. In fp32 that happens all the time; in fp64, whose last bits are 2^-29 times as large, it
happens in none of the millions of activations of these tests.

Not a test module.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet.engine.decoder import Decoder
from bitnet.linear import pack
from bitnet.model import ModelConfig, Transformer, as_transformer

VOCAB, CONTEXT = 61, 150
VARIANTS: dict[str, dict[str, Any]] = {
    "ternary": {},
    "dense": {"linear": "fp"},
    "row": {"granularity": "row", "norm_placement": "pre_norm", "n_kv_heads": 4},
    "silu, qk_norm": {"activation": "silu", "qk_norm": True, "n_kv_heads": 1},
    "qkv_bias": {"qkv_bias": True},  # as modules
    "in_linear": {"norm_placement": "in_linear"},  # as modules
    "group": {"granularity": "group", "group_size": 8},  # as modules
    "dense qkv_bias": {"linear": "fp", "qkv_bias": True},  # as modules
    "dense in_linear": {"linear": "fp", "norm_placement": "in_linear"},  # as modules
}
PACKABLE = [name for name, fields in VARIANTS.items() if fields.get("linear") != "fp"]


def small_model(dtype: torch.dtype = torch.float32, **fields: Any) -> Transformer:
    """A model far from ties: its choices depend on all tokens, and their margins are wide."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}
    shape |= {"d_ff": 44, "vocab_size": VOCAB, "max_seq_len": CONTEXT, "tie_embeddings": False}
    model = Transformer(ModelConfig(**shape | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 15.0)
    return model.to(dtype).eval()


def packed_model(dtype: torch.dtype = torch.float32, **fields: Any) -> Transformer:
    """A small model with its ternary layers packed; a dense model has none."""
    model = small_model(dtype, **fields)
    return model if fields.get("linear") == "fp" else as_transformer(pack(model))


def make_prompts(lengths: list[int]) -> list[list[int]]:
    """One prompt per length; its tokens also depend on the lengths before it."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def greedy_by_hand(model: Transformer, prompt: list[int], n: int) -> tuple[list[int], Tensor]:
    """n greedy tokens, each by running the whole sequence again without cache and batch; and their
    fp32 logits ``[n, V]``."""
    ids, logits = list(prompt), []
    for _ in range(n):
        logits.append(model(torch.tensor([ids]))[0, -1].float())
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@torch.no_grad()
def check_row(model: Transformer, ids: list[int], logits: Tensor) -> None:
    """Check a decoder's last logits ``[n, V]`` after the tokens ``ids``: they must equal the fp64
    model's, up to the rounding to fp32."""
    assert next(model.parameters()).dtype == torch.float64
    expected = model(torch.tensor([ids]))[0, -len(logits) :]
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def prefill(decoder: Any, prompts: list[list[int]], chunk: int) -> None:
    """Prefill in chunks; a row that has no tokens left gets 0."""
    for start in range(0, max(map(len, prompts)), chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        longest = max(map(len, pieces))
        padded = [piece + [0] * (longest - len(piece)) for piece in pieces]
        decoder.prefill(torch.tensor(padded), [len(piece) for piece in pieces])


def greedy(decoder: Decoder, prompts: list[list[int]], n: int) -> tuple[list[list[int]], Tensor]:
    """Tokens of each row, and logits ``[B, n, V]``."""
    b = len(prompts)
    prefill(decoder, prompts, decoder.chunk)
    chosen, logits = [decoder.chosen[:b].tolist()], [decoder.logits[:b].clone()]
    for _ in range(n - 1):
        decoder.step(b)
        chosen.append(decoder.chosen[:b].tolist())
        logits.append(decoder.logits[:b].clone())
    return [list(row) for row in zip(*chosen, strict=True)], torch.stack(logits, 1)
