"""The result of a Transformer step composed of bitnet_kernels.reference operators, and how far a
program with the same operators may be off: the oracle of fused steps in fp32.

The reference fixes the order of every operation to the last bit, except in the sums of attention
and of dense matrices, and in exp. There two correct programs differ in the last bits. If an
activation is that close to the border between two int8 codes, they differ by a whole code, and the
difference grows. So no bound on the final logits is both tight and sure.

Instead :func:`compare` bounds the difference step by step, for each token. Attention reads the keys
and values that the program itself holds, so no token inherits the errors of another; these keys and
values are compared with the reference's. Before the first inexact sum the bound is 0: results are
equal. After it, a token whose every activation is farther from a border than its bound has the same
codes, hence the same integer products: its logits must be within the bound. A token that may have
another code is only counted: its logits must be near.

With *hard attention* (:func:`hard_attention`) the sums of attention are exact: the largest score of
a query leads by so much that exp gives 0 for all others, and the output is that column's value.
Then codes, keys, values and the logits of a ternary head are equal to the last bit, in all layers
(with relu^2).

The bounds are of first order in u = 2^-24, the relative error of one fp32 operation. A sum of K
terms in any order errs by K u times the sum of the terms' sizes (Higham, Accuracy and Stability,
2002, section 4.2). Here the inexact sums are taken in fp64, so only the other program's errors
count.

Not a test module. T tokens, K inputs, N outputs, H query heads, G key-value heads, E head_dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet.engine.state import State
from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import MLP, Attention, Transformer, rotary
from bitnet_kernels import reference

U = 2.0**-24
SECOND_ORDER = 1.01
"""A factor for the products of errors, which the bounds leave out."""
EXP = 40
"""Operations that exp may be off by: torch's is by up to 20 units in the last place."""
LEAD = 110.0
"""A score that is smaller than the largest by this much has weight 0 in fp32: exp(-104) is below
the smallest number. (Or weight 1e-38 if exp is cut off, which is lost in any sum and code.)"""


class Near(NamedTuple):
    """Values of the reference, fp32, and how far the other program's may be from them, fp64."""

    x: Tensor
    off: Tensor

    def map(self, function: str, *arguments: int) -> "Near":
        """Apply a method that only moves elements to both tensors."""
        return Near(*(getattr(part, function)(*arguments) for part in self))


@torch.no_grad()
def hard_attention(model: Transformer) -> Transformer:
    """Multiply all scores of a model by 2^24, in place."""
    for block in model.layers:
        attention = block.self_attn
        layers = attention.q_proj, attention.k_proj
        if attention.q_norm is not None and attention.k_norm is not None:
            layers = attention.q_norm, attention.k_norm
        for layer in layers:
            (layer.scale if isinstance(layer, TernaryLinear) else layer.weight).mul_(2**12)
    return model


@torch.no_grad()
def compare(
    model: Transformer,
    ids: list[int],
    state: State,
    row: int,
    logits: Tensor,
    sure: float,
    int8_head: bool = False,
) -> None:
    """Compare a program's results for the tokens ``ids`` of one row, computed at any time and in
    any pieces, with the reference.

    Arguments:
        model: fp32, without biases and hooks, its scales per tensor or row.
        state: the program's; the row holds the keys and values of all tokens.
        logits: fp32 ``[n, V]``, after the last n tokens.
        sure: the least share of the n tokens whose codes must be sure to be equal, so that their
            logits are compared by the bound.
        int8_head: the inputs and weights of the head are rounded to int8.
    Raises:
        AssertionError: a value is off by more than its bound.
    """
    _Comparison(model, ids, state, row).logits(logits, sure, int8_head)


class _Comparison:
    """One row's tokens, layer after layer; ``sure`` are those whose codes are equal so far."""

    def __init__(self, model: Transformer, ids: list[int], state: State, row: int) -> None:
        self.model, self.cache = model, state.kv.dtype
        self.held = state.kv[:, :, row, :, : len(ids)].float()  # [n_layers, 2, G, T, E]
        if state.scale is not None:
            self.held = self.held * state.scale[:, :, row, :, : len(ids), None]
        self.sure = torch.ones(len(ids), dtype=torch.bool)
        cos, sin = rotary(torch.arange(len(ids)), model.config.head_dim, model.config.rope_theta)
        self.turn = cos.unsqueeze(1), sin.unsqueeze(1)
        x = model.embed_tokens.weight.detach()[torch.tensor(ids)]
        self.stream = Near(x, torch.zeros_like(x, dtype=torch.float64))
        for i, block in enumerate(model.layers):
            self._add(
                self._attention(i, block.self_attn, self._norm(block.input_layernorm, self.stream))
            )
            self._add(self._mlp(block.mlp, self._norm(block.post_attention_layernorm, self.stream)))

    def logits(self, logits: Tensor, least: float, int8_head: bool) -> None:
        """Compare the logits after the last n tokens."""
        n, x = len(logits), self._norm(self.model.norm, self.stream)
        if int8_head:
            x_q, s_x, relative = self._quantized(x)
            codes, scale = reference.absmax_int8(self.model.lm_head.weight)
            y = reference.int8_linear(x_q, s_x, codes, scale, None, torch.float32)
            expected = Near(y, relative.unsqueeze(-1) * y.double().abs())
        else:
            expected = self._product(self.model.lm_head, x)
        y, off, sure = expected.x[-n:], expected.off[-n:], self.sure[-n:]
        _within(logits[sure], y[sure], off[sure], "logits")
        error = (logits - y).norm(dim=-1) / y.norm(dim=-1)
        assert (error < 0.1).all(), f"logits of unsure tokens are off by {float(error.max()):.3g}"
        share = float(sure.float().mean())
        assert share >= least, f"only {share:.0%} of the tokens are sure to have the same codes"

    def _add(self, y: Near) -> None:
        x = self.stream.x + y.x
        off = self.stream.off + y.off
        self.stream = Near(x, off + (off > 0) * 2 * U * x.double().abs())

    def _attention(self, i: int, attention: Attention, x: Near) -> Near:
        e = attention.head_dim
        q, k, v = (
            self._product(projection, x).map("unflatten", -1, (-1, e))  # type: ignore[arg-type]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        q, k = self._rotated(q), self._rotated(k)
        for new, held in zip((k, v), self.held[i], strict=True):
            self._compare_held(new, held.transpose(0, 1), f"layers.{i} keys or values")
        y = self._attended(q, *self.held[i])
        return self._product(attention.o_proj, self._norm(attention.attn_sub_norm, y))

    def _rotated(self, x: Near) -> Near:
        cos, sin = self.turn
        y = reference.rotate_half(x.x, cos, sin)
        first, second = x.off.chunk(2, -1)
        off = x.off * cos.abs() + torch.cat((second, first), -1) * sin.abs()
        size = x.x.double().abs().amax(-1, keepdim=True)
        return Near(y, off + (off > 0) * 6 * U * size)

    def _compare_held(self, new: Near, held: Tensor, what: str) -> None:
        """Values that differ may be rounded to either side in a cache of fewer bits."""
        size, unit, expected = new.x.double().abs(), 0.0, new.x
        if self.cache == torch.bfloat16:
            unit, expected = 2**-7, new.x.bfloat16().float()
        elif self.cache == torch.int8:
            codes, scale = reference.absmax_int8(new.x)
            unit, size = 1 / 127, size.amax(-1, keepdim=True)
            expected = codes.float() * scale.unsqueeze(-1)
        slack = new.off + (new.off > 0) * (unit * size + 4 * U * size)
        _within(held[self.sure], expected[self.sure], slack[self.sure], what)

    def _attended(self, q: Near, keys: Tensor, values: Tensor) -> Near:
        """``softmax(a q.k) v``, a = E^-0.5, over keys and values ``[G, T, E]`` that are equal.

        A score errs by E + 2 operations on a |q|.|k|, and by the error of q. The relative error of
        a probability p comes from the error e of its score, the mean of e over p, the sum of C
        terms, exp above and below, and a division. The sum over C values errs by C u more. If only
        one column counts, p is 1 and has no error.
        """
        (t, h, e), g = q.x.shape, len(keys)
        k, v = (one.double().repeat_interleave(h // g, 0) for one in (keys, values))
        x, off = (part.double().transpose(0, 1) for part in q)  # [H, T, E]
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        scores = (x @ k.mT * e**-0.5).masked_fill(future, -torch.inf)
        p = scores.softmax(-1)
        error = ((e + 2) * U * (x.abs() @ k.abs().mT) + off @ k.abs().mT) * e**-0.5
        error = error.masked_fill(future, 0)
        behind = scores < (scores - 2 * error).amax(-1, keepdim=True) - LEAD
        hard = (~behind).sum(-1) == 1  # [H, T]; so is a single column
        columns = torch.arange(1, t + 1).unsqueeze(-1)
        error = error + (p * error).sum(-1, keepdim=True) + (2 * columns + 2 * EXP + 2) * U
        self.sure &= (hard | (error.amax(-1) < 0.01)).all(0)  # the bound is of first order
        slack = (p * error) @ v.abs() + U * (p @ v.abs())
        slack[hard] = 0
        y, slack = (part.transpose(0, 1).flatten(1) for part in (p @ v, slack))
        return Near(y.float(), slack)

    def _mlp(self, mlp: MLP, x: Near) -> Near:
        gate, up = self._product(mlp.gate_proj, x), self._product(mlp.up_proj, x)
        g, u = gate.x.double().abs() + gate.off, up.x.double().abs() + up.off
        if mlp.activation == "relu2":
            y = gate.x.relu().square() * up.x
            off, operations = 2 * g * gate.off * u + g * g * up.off, 3
        else:
            y = nn.functional.silu(gate.x.double()).float() * up.x
            off, operations = 1.1 * gate.off * u + g * up.off, EXP + 5
        inexact = (off > 0) | torch.tensor(mlp.activation == "silu")
        size = y.double().abs() + off
        # The smallest numbers have fewer digits.
        slack = off + inexact * (2 * operations * U * size + torch.finfo(torch.float32).tiny)
        return self._product(mlp.down_proj, self._norm(mlp.ffn_sub_norm, Near(y, slack)))

    def _norm(self, norm: nn.Module, x: Near) -> Near:
        """y = x w / r, r = sqrt(mean(x^2) + eps). An input off by d moves r by up to D, the root of
        the mean of d^2, so y by (d + |x| D / r) |w| / (r - D). Six operations are rounded."""
        if isinstance(norm, nn.Identity):
            return x
        assert isinstance(norm, nn.RMSNorm)
        assert norm.eps is not None
        weight, wide = norm.weight.detach(), x.x.double()
        r = (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        moved = x.off.square().mean(-1, keepdim=True).sqrt()
        self.sure &= (moved < r / 100).flatten(1).all(-1)  # the bound is of first order
        relative = (moved / r).clamp(max=0.5)
        off = (x.off + wide.abs() * relative) / r / (1 - relative) + 12 * U * wide.abs() / r
        return Near(reference.rmsnorm(x.x, weight, norm.eps), weight.abs() * off * (moved > 0))

    def _product(self, layer: nn.Module, x: Near) -> Near:
        if isinstance(layer, nn.Linear) and not isinstance(layer, BitLinear):
            weight = layer.weight.double().t()
            y, k = x.x.double() @ weight, len(weight)
            off = x.off @ weight.abs() + (k + 1) * U * (x.x.double().abs() @ weight.abs())
            return Near(y.float(), off)
        assert isinstance(layer, BitLinear | TernaryLinear)
        codes, scale = (
            layer.quantize() if isinstance(layer, BitLinear) else (layer.codes(), layer.scale)
        )
        x_q, s_x, relative = self._quantized(x)
        y = reference.int8_linear(x_q, s_x, codes, scale, None, torch.float32)
        return Near(y, relative.unsqueeze(-1) * y.double().abs())

    def _quantized(self, x: Near) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales, and the relative error of outputs with these codes: the scale's and the
        rescale's."""
        codes, scale = reference.absmax_int8(x.x)
        quotient = x.x.double() / scale.double().unsqueeze(-1)
        off = x.off / scale.double().unsqueeze(-1)  # in units of a code
        largest = off.amax(-1)
        relative = torch.where(largest > 0, largest / 127 + 6 * U, 0.0)
        slack = off + quotient.abs() * relative.unsqueeze(-1)
        from_border = (quotient - quotient.floor() - 0.5).abs()
        self.sure &= ((from_border > SECOND_ORDER * slack) | (slack == 0)).all(-1)
        return codes, scale, relative


def _within(ours: Tensor, theirs: Tensor, slack: Tensor, what: str) -> None:
    """Check ``|ours - theirs| <= slack``, element by element; equal where the slack is 0."""
    difference = (ours.double() - theirs.double()).abs()
    over = ~(difference <= SECOND_ORDER * slack)
    assert not over.any(), (
        f"{what}: {int(over.sum())} of {over.numel()} elements are off, by up to "
        f"{float((difference / slack.clamp(min=1e-300)).max()):.3g} times the bound"
    )
