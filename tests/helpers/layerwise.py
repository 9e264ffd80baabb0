"""A decoder on a CPU against the model it was made from, one layer at a time.

Two correct programs may add up fp32 sums in different orders. Their results then differ in the last
bits, and where an activation lies that close to the border of two int8 codes, by a whole code, from
which differences grow. So logits at the end can be compared by no bound that is both tight and
sure. This compares layer by layer instead: each layer of the model gets the very input that the
decoder's layer had, and hands on the very output that the decoder's had. Between two layers stand
one or two of: a norm, attention, a gate; the difference that these can make is bounded below for
any order of sums. Equal inputs have equal codes, and integer products of equal codes are equal to
the last bit, which is asserted. So no code can flip from one layer to the next; a norm *inside* a
layer can flip one, and only where its value lies within rounding distance of a border.

The bounds are of first order in u = 2^-24, the relative error of one fp32 operation, and hold for
two programs that each err by as much (hence the factors of 2). A sum of K terms in any order errs
by K u times the sum of the terms' sizes (Higham, Accuracy and Stability, 2002, section 4.2).
torch's sin and cos err by one unit in the last place, 2 u, and its exp by up to 20 (the fast one
for AVX-512).

Not a test module. T positions, K inputs, N outputs of a layer; float64 throughout.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bitnet.engine.cpu import CpuRunner
from bitnet.engine.decoder import Decoder
from bitnet.engine.engine import Engine
from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import MLP, Attention, Transformer, rotary, rotate
from bitnet.quant import dequantize

U = 2.0**-24
SECOND_ORDER = 1.01
"""For the products of errors that the bounds leave out: U times the largest count is below 1e-3."""

Place = tuple[int, int]
"""Row and position."""


class Seen(NamedTuple):
    """What one matrix of the decoder read and gave for one token: ``[K]`` and ``[N]``."""

    read: Tensor
    gave: Tensor


@contextmanager
def watched(decoder: Decoder) -> Iterator[dict[str, dict[Place, Seen]]]:
    """Record what every matrix of a decoder reads and gives, by its name and the token's place; for
    a token that is copied to another row, there too.

    The decoder must not have run a step yet, as it records its calls once.
    """
    runner: Any = decoder._runner
    assert isinstance(runner, CpuRunner)
    assert not runner._steps
    names = {id(decoder._weights.head): "lm_head"}
    for i, layer in enumerate(decoder._weights.layers):
        for kind in ("qkv", "o", "gate_up", "down"):
            names[id(getattr(layer, kind))] = f"layers.{i}.{kind}"
    seen: dict[str, dict[Place, Seen]] = {name: {} for name in names.values()}
    step, chunk, product = runner._step, runner._chunk, runner._product
    places: Callable[[], list[Place]]
    last: Callable[[], list[Place]]

    def watched_step(batch: int, columns: int) -> Any:
        nonlocal places, last
        places = last = lambda: list(enumerate(decoder.lengths[:batch].tolist()))
        return step(batch, columns)

    def watched_chunk(tokens: Tensor, pieces: Any) -> Any:
        nonlocal places, last
        places = lambda: [(row, start + i) for row, start, n in pieces for i in range(n)]  # noqa: E731
        last = lambda: [(row, start + n - 1) for row, start, n in pieces]  # noqa: E731
        return chunk(tokens, pieces)

    def watched_product(calls: Any, matrix: Any, y: Tensor, out: Tensor) -> None:
        name = names[id(matrix)]
        where, read = last if name == "lm_head" else places, torch.empty_like(y)

        def record() -> None:
            for place, x, result in zip(where(), read, out, strict=True):
                seen[name][place] = Seen(x.clone(), result.clone())

        calls.add(read.copy_, y)
        product(calls, matrix, y, out)
        calls.add(record)

    set_length, copy_prefix = decoder.set_length, decoder.copy_prefix

    def forgetting(row: int, n: int) -> None:
        set_length(row, n)
        for places in seen.values():
            for place in [place for place in places if place[0] == row and place[1] >= n]:
                del places[place]

    def copying(source: int, target: int, n: int) -> None:
        forgetting(target, 0)
        copy_prefix(source, target, n)
        for places in seen.values():
            for at in range(n):
                if (source, at) in places:  # the head's, only of the last of a chunk
                    places[target, at] = places[source, at]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_step", watched_step)
        patch.setattr(runner, "_chunk", watched_chunk)
        patch.setattr(runner, "_product", watched_product)
        patch.setattr(decoder, "set_length", forgetting)
        patch.setattr(decoder, "copy_prefix", copying)
        yield seen


def generate_and_compare(
    engine: Engine,
    model: Transformer,
    seen: dict[str, dict[Place, Seen]],
    prompts: list[list[int]],
    n: int,
) -> list[list[int]]:
    """Greedy texts of an engine whose decoder is :func:`watched`, each compared with the model when
    it ends: layer by layer, and its tokens with the largest logits."""
    texts: list[list[int]] = [[] for _ in prompts]
    compared = set()

    def check(index: int, reason: str) -> None:
        compare_text(engine, model, seen, prompts[index], texts[index])
        compared.add(index)

    found = engine.generate(prompts, n, on_token=lambda i, t: texts[i].append(t), on_stop=check)
    assert found == texts
    assert len(compared) == len(prompts)
    return texts


def compare_text(
    engine: Engine,
    model: Transformer,
    seen: dict[str, dict[Place, Seen]],
    prompt: list[int],
    tokens: list[int],
) -> None:
    """Compare the row that holds a greedy text, and the text with the row's largest logits."""
    ids = prompt + tokens[:-1]  # the last is not fed
    row = engine._held.index(ids)
    compare(model, seen, row, torch.tensor(ids))
    for at, token in enumerate(tokens, len(prompt) - 1):
        assert int(seen["lm_head"][row, at].gave.argmax()) == token


def compare(model: Transformer, seen: dict[str, dict[Place, Seen]], row: int, ids: Tensor) -> None:
    """Assert that a row of a decoder computed what the model does for ``ids`` (int64 ``[T]``), the
    tokens that the row has been fed.

    Arguments:
        seen: by :func:`watched`, of all these tokens; of the head, of any of them.
    """
    with ExitStack() as hooks, torch.no_grad():
        for i, block in enumerate(model.layers):
            qkv, o, gate_up, down = (
                _stack(seen[f"layers.{i}.{kind}"], row, range(len(ids)))
                for kind in ("qkv", "o", "gate_up", "down")
            )
            attention, mlp = block.self_attn, block.mlp
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            attended = _attended(attention, model.config.rope_theta, qkv)
            _force(hooks, block.input_layernorm, projections, qkv, _no_slack)
            _force(hooks, attention.attn_sub_norm, [attention.o_proj], o, attended)
            halves = [mlp.gate_proj, mlp.up_proj]
            _force(hooks, block.post_attention_layernorm, halves, gate_up, _no_slack)
            _force(hooks, mlp.ffn_sub_norm, [mlp.down_proj], down, _gated(mlp))
        at = sorted(position for r, position in seen["lm_head"] if r == row)
        _force(hooks, model.norm, [model.lm_head], _stack(seen["lm_head"], row, at), _no_slack, at)
        model(ids.unsqueeze(0))


def _stack(seen: dict[Place, Seen], row: int, positions: Any) -> Seen:
    reads, gaves = zip(*(seen[row, position] for position in positions), strict=True)
    return Seen(torch.stack(reads), torch.stack(gaves))


def _force(
    hooks: ExitStack,
    norm: nn.Module,
    layers: list[nn.Module],
    seen: Seen,
    slack: Callable[[Tensor], Tensor],
    positions: list[int] | None = None,
) -> None:
    """Compare what ``layers`` read (after ``norm``) and give with what the decoder's matrix did,
    and hand on the decoder's.

    Arguments:
        slack: of the norm's input ``[T, K]``, how far it may be off.
        positions: those that ``seen`` has; None: all.
    """
    at = slice(None) if positions is None else positions
    before: list[Tensor] = []

    def keep(module: nn.Module, args: Any) -> None:
        before[:] = [args[0][0].double()]

    def read(module: nn.Module, args: Any) -> Any:
        x, wanted = args[0][0], seen.read
        bound = norm_slack(norm, before[0], slack(before[0]))
        assert_within(wanted, x[at], bound[at], "input")
        forced = x.clone()
        forced[at] = wanted
        return (forced.unsqueeze(0),)

    gave = seen.gave.split([int(layer.out_features) for layer in layers], -1)  # type: ignore[arg-type]
    outputs = dict(zip(layers, gave, strict=True))

    def give(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        wanted = outputs[module]
        assert_within(wanted, output[0][at], product_slack(module, seen.read), "output")
        forced = output.clone()
        forced[0, at] = wanted
        return forced

    hooks.callback(norm.register_forward_pre_hook(keep).remove)
    for layer in layers:
        hooks.callback(layer.register_forward_pre_hook(read).remove)
        hooks.callback(layer.register_forward_hook(give).remove)


def assert_within(ours: Tensor, theirs: Tensor, slack: Tensor, what: str) -> None:
    """``|ours - theirs| <= slack``, element by element; equal where the slack is 0."""
    difference = (ours.double() - theirs.double()).abs()
    over = difference > SECOND_ORDER * slack
    assert not over.any(), (
        f"{what}: {int(over.sum())} of {over.numel()} elements are off, by up to "
        f"{float((difference / slack.clamp(min=1e-300)).max()):.3g} times the bound"
    )


def norm_slack(norm: nn.Module, x: Tensor, off: Tensor) -> Tensor:
    """How far a norm's output may be off, its input ``x`` ``[T, K]`` being off by ``off``.

    y = x w / r, r = sqrt(mean(x^2) + eps). The sum of K squares errs by K + 1 operations, the
    division and eps by one each, of which the root halves the relative error; root, reciprocal and
    two products add one each: K / 2 + 6 for each program. An input off by up to D moves r by up to
    D, so y by (off + |x| D / r) |w| / (r - D).
    """
    if isinstance(norm, nn.Identity):
        return off
    assert isinstance(norm, nn.RMSNorm)
    assert norm.eps is not None
    weight, k = norm.weight.double(), x.shape[-1]
    r = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    largest = off.amax(-1, keepdim=True)
    assert (largest < r).all()
    moved = (off + x.abs() * largest / r) / (r - largest)
    return weight.abs() * (moved + (k + 12) * U * x.abs() / r)


def product_slack(layer: nn.Module, x: Tensor) -> Tensor:
    """How far the output ``[T, N]`` of a layer may be off, its input being equal."""
    norm, k = getattr(layer, "rms_norm", None), x.shape[-1]
    y = (x if norm is None else norm(x)).double()
    relative = 0.0 if norm is None else (k + 12) * U  # as norm_slack has it
    if isinstance(layer, BitLinear):
        weight = dequantize(*layer.quantize(), layer.group_size)
    else:
        assert isinstance(layer, TernaryLinear | nn.Linear)
        weight = layer.weight + 0  # of a packed layer, the values
    size = weight.double().abs().t()
    if not isinstance(layer, BitLinear | TernaryLinear):
        return (relative + 2 * k * U) * (y.abs() @ size)
    if norm is None and layer.granularity != "group":
        return torch.zeros(len(x), len(weight), dtype=torch.float64)  # integers
    s = y.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    # The scales of tokens and groups are multiplied and added up in fp32.
    slack = (relative + 2 * (k + 4) * U) * ((y.abs() + s) @ size)
    if norm is None:
        return slack
    # A code is round(y / s), of two divisions; the codes of a y that is off by rounding may differ
    # by one where y / s is that close to the border of two.
    from_border = (y / s - (y / s).floor() - 0.5).abs()
    may_flip = from_border <= 127 * (2 * relative + 4 * U) * SECOND_ORDER
    return slack + (may_flip * s) @ size


def _no_slack(x: Tensor) -> Tensor:
    """The residual stream: the same sums of the same terms."""
    return torch.zeros_like(x)


def _gated(mlp: MLP) -> Callable[[Tensor], Tensor]:
    """``act(gate) * up``: for silu exp (40 u), a sum, a quotient and a product; less for relu^2."""
    operations = 43 if mlp.activation == "silu" else 2
    return lambda x: 2 * operations * U * x.abs() + torch.finfo(torch.float32).tiny


def _attended(attention: Attention, theta: float, qkv: Seen) -> Callable[[Tensor], Tensor]:
    """Attention over equal projections, ``softmax(a q.k) v`` with a = E^-0.5.

    A rotated query or key errs by E / 2 + 6 operations of its norm, if there is one, and by 8 of
    the rotation (sine or cosine 2, product, sum; of two terms up to the pair's length each). So a
    score, the largest subtracted, errs by e = (2 E + 33) u a |q| |k|. A probability p errs, in
    units of itself, by e, by the mean of e over p, and by (C + 85) u: the sum of C terms, and exp
    above and below. The sum over C values errs by C u more.
    """

    def slack(x: Tensor) -> Tensor:
        e, t = attention.head_dim, len(qkv.gave)
        heads = qkv.gave.unflatten(-1, (-1, e)).transpose(0, 1)
        g = int(attention.k_proj.out_features) // e  # type: ignore[arg-type]
        q, k, v = heads.split((len(heads) - 2 * g, g, g))
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (part.double().repeat_interleave(len(q) // len(part), 0) for part in (q, k, v))
        cos, sin = rotary(torch.arange(t), e, theta)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        p = (q @ k.mT * e**-0.5).masked_fill(future, -torch.inf).softmax(-1)
        size = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).unsqueeze(1) * e**-0.5
        off = (2 * e + 33) * U * size.masked_fill(future, 0)
        assert off.max() < 5e-3, "the bound is of first order"
        columns = torch.arange(1, t + 1).unsqueeze(-1)
        off = off + (p * off).sum(-1, keepdim=True) + (2 * columns + 85) * U
        return ((2 * p * off) @ v.abs()).transpose(0, 1).flatten(1)

    return slack
