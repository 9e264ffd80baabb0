"""The whole transformer: decoder-only, ternary or full precision from one config.

    tokens -> embedding -> n_layers x [x + attention(norm(x));  x + mlp(norm(x))] -> norm -> logits

RMSNorm, rotary positions, grouped-query attention, a gated MLP; no biases except those of Qwen2
with ``qkv_bias``. The matrices inside the layers are BitLinear (`linear = "ternary"`) or nn.Linear
(`"fp"`, the full-precision baseline). Everything else stays in high precision in both. Ternary
models add one structural choice, the placement of the norms:

    sub_norm   BitNet 2B4T (arXiv 2504.12285): pre-norms, plus a norm before each output projection
               (attn_sub_norm, ffn_sub_norm), which keeps the int8 activations there well scaled
    pre_norm   LLaMA: norms before attention and MLP only
    in_linear  Microsoft's Training Tips: a norm inside every linear and none outside

A training sequence may hold several documents. Attention sees the earlier documents too, unless
``document_separator`` keeps documents apart (:func:`apart`).

A parameter that Hugging Face's BitNet also has is named and used as there, so an export only
renames. ``depth`` alone chooses the whole shape (:meth:`ModelConfig.resolve`).

B batch, T tokens, D d_model, H query heads, G key-value heads, E head_dim, F d_ff, V vocabulary.
"""

import dataclasses
import math
from typing import Annotated, Literal, Protocol

import torch
from einops import rearrange
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.elementwise import RMSNorm, relu2_mul
from bitnet.linear import BitLinear, shared_input
from bitnet.loss import head_loss
from bitnet.quant import GradMask, Granularity, Int8Backward
from bitnet.schema import STRICT, Positive, UserError

Count = Annotated[int, Field(ge=0, le=2**24)]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The model's shape and arithmetic. 0: computed from ``depth``."""

    depth: Annotated[int, Field(ge=1, le=1000)] = 6
    """Sets layers, width, heads and FFN; their size sets learning rate, batch and tokens."""
    linear: Literal["ternary", "fp"] = "ternary"
    """Arithmetic of the layers' matrices; "fp" is the full-precision baseline."""
    n_layers: Count = 0
    """Layers. 0: depth."""
    d_model: Count = 0
    """Width of the residual stream. 0: 64 * depth, rounded up by width_multiple."""
    n_heads: Count = 0
    """Query heads; must divide d_model. 0: heads of 64 channels."""
    n_kv_heads: Count = 0
    """Key-value heads; must divide n_heads. 0: its largest divisor up to n_heads / 4."""
    d_ff: Count = 0
    """Width inside the gated MLP. 0: 8/3 of d_model, rounded up by width_multiple."""
    width_multiple: Annotated[int, Field(ge=1, le=2**16)] = 64
    """Computed widths (d_model, d_ff) are multiples of this; GGUF needs 256."""
    vocab_size: Count = 0
    """Rows of the embedding. 0: the tokenizer's."""
    max_seq_len: Count = 0
    """Longest context. 0: data.seq_len."""
    norm_placement: Literal["sub_norm", "pre_norm", "in_linear"] = "sub_norm"
    """Where the RMSNorms are; see the top of bitnet/model.py."""
    activation: Literal["relu2", "silu"] = "relu2"
    """Gate of the MLP: squared ReLU (BitNet 2B4T) or SiLU (LLaMA)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before the rotation."""
    qkv_bias: bool = False
    """Biases on q_proj, k_proj and v_proj, as in Qwen2."""
    tie_embeddings: bool = True
    """Use the embedding as the output head."""
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    """Added to the mean square in every RMSNorm."""
    granularity: Granularity = "tensor"
    """One weight scale per "tensor" (b1.58), "row" or "group" of columns."""
    group_size: Positive = 128
    """Columns per group, for granularity = "group"."""
    grad_mask: GradMask = "none"
    """Mask on the latent weights' gradients: "none", "clip" or "trust" (bitnet/quant.py)."""
    grad_mask_c: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Bound of the mask in units of the scale."""
    int8_backward: Int8Backward = "none"
    """An approximation, for speed: compute each matrix's "input" gradient, or "both" its input and
    its weight gradients, from gradients rounded stochastically to int8."""

    def resolve(self, vocab_size: int = 0, seq_len: int = 0) -> "ModelConfig":
        """Fill every 0 by the rules for ``depth`` and check the rest.

        Raises UserError, naming the key, for an impossible shape.
        """
        multiple = self.width_multiple
        d_model = self.d_model or multiple * math.ceil(64 * self.depth / multiple)
        if d_model % 2:
            raise UserError(f"model.d_model = {d_model} is odd; rotary positions turn pairs")
        fitting = _divisors(d_model // 2)
        n_heads = self.n_heads or max(n for n in fitting if n <= max(1, d_model // 64))
        if n_heads not in fitting:
            nearest = min(fitting, key=lambda n: abs(n - n_heads))
            raise UserError(
                f"model.n_heads = {n_heads} does not divide model.d_model = {d_model} into heads "
                f"of an even head_dim; the nearest that does is {nearest}"
            )
        n_kv_heads = self.n_kv_heads or max(
            n for n in _divisors(n_heads) if n <= max(1, n_heads // 4)
        )
        if n_heads % n_kv_heads:
            raise UserError(
                f"model.n_kv_heads = {n_kv_heads} does not divide model.n_heads = {n_heads}"
            )
        resolved = dataclasses.replace(
            self,
            n_layers=self.n_layers or self.depth,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_ff=self.d_ff or multiple * math.ceil(d_model * 8 / 3 / multiple),
            vocab_size=self.vocab_size or vocab_size,
            max_seq_len=self.max_seq_len or seq_len,
        )
        if self.int8_backward != "none" and self.linear == "fp":
            raise UserError(
                f'model.int8_backward = "{self.int8_backward}" needs model.linear = "ternary"; for '
                'the full-precision baseline it is "none"'
            )
        if self.int8_backward != "none" and self.granularity == "group":
            raise UserError(
                f'model.int8_backward = "{self.int8_backward}" has no group-wise scales; set '
                'model.granularity = "row"'
            )
        for key in ("vocab_size", "max_seq_len"):
            if getattr(resolved, key) < 1:
                raise UserError(f"model.{key} is not set")
        return resolved

    @property
    def head_dim(self) -> int:
        """Channels per head: d_model / n_heads."""
        return self.d_model // self.n_heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of one layer: name -> (out_features, in_features)."""
        d, kv = self.d_model, self.n_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (self.d_ff, d),
            "mlp.up_proj": (self.d_ff, d),
            "mlp.down_proj": (d, self.d_ff),
        }

    def num_parameters(self) -> dict[str, int]:
        """Parameters by kind: ``embedding`` (and an untied head), ``matrices`` (in the layers; a
        ternary model quantizes these), ``norms`` (and biases), and their ``total``."""
        d, inputs = self.d_model, sum(k for _, k in self.matrices().values())
        embedding = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        matrices = self.n_layers * sum(n * k for n, k in self.matrices().values())
        norms = {"sub_norm": 3 * d + self.d_ff, "pre_norm": 2 * d, "in_linear": inputs}
        norm = norms[self.norm_placement] + (2 * self.head_dim if self.qk_norm else 0)
        if self.qkv_bias:
            norm += d + 2 * self.n_kv_heads * self.head_dim
        counts = {"embedding": embedding, "matrices": matrices, "norms": self.n_layers * norm + d}
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs per token, forward and backward: ``6 N + 12 L D T`` (PaLM, arXiv
        2204.02311, appendix B), where N counts the weights of matrix products (layers and head).
        Attention counts as if it were not causal. A forward alone takes a third."""
        multiplied = self.num_parameters()["matrices"] + self.d_model * self.vocab_size
        return 6.0 * multiplied + 12.0 * self.n_layers * self.d_model * seq_len


def check_divides(config: ModelConfig, size: int) -> None:
    """Raise UserError, naming the key, if tensor parallelism over ``size`` processes cannot divide
    the matrices of a (resolved) model (:mod:`bitnet.training.tensor_parallel`)."""
    sizes = {key: getattr(config, key) for key in ("n_heads", "n_kv_heads", "d_ff")}
    for key, value in sizes.items():
        if value % size:
            largest = math.gcd(*sizes.values())
            raise UserError(
                f"distributed.tensor_parallel = {size} does not divide model.{key} = {value}; for "
                f"this model it can be {largest} or a divisor of that"
            )
    if size > 1 and config.linear == "fp" and config.norm_placement == "in_linear":
        raise UserError(
            f"distributed.tensor_parallel = {size} cannot divide the full-precision matrices of "
            'model.norm_placement = "in_linear", with a norm inside; "sub_norm" and "pre_norm" can'
        )
    if size > 1 and config.linear == "ternary" and config.granularity == "group":
        raise UserError(
            f"distributed.tensor_parallel = {size} cannot divide the columns of "
            'model.granularity = "group"; use "tensor" or "row"'
        )


def _divisors(n: int) -> list[int]:
    """The divisors of n >= 1, in ascending order."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return small + [n // i for i in reversed(small) if i * i != n]


class NormLinear(nn.Linear):
    """nn.Linear with a learned RMSNorm on its input: the full-precision form of in_linear."""

    def __init__(self, in_features: int, out_features: int, bias: bool, norm_eps: float) -> None:
        super().__init__(in_features, out_features, bias)
        self.rms_norm = RMSNorm(in_features, norm_eps)

    def forward(self, input: Tensor) -> Tensor:
        """float ``[..., in_features]`` -> ``[..., out_features]``."""
        return super().forward(self.rms_norm(input))


def make_linear(config: ModelConfig, name: str) -> nn.Module:
    """Make the layer for the matrix ``name``, a key of :meth:`ModelConfig.matrices`."""
    out_features, in_features = config.matrices()[name]
    norm = config.norm_placement == "in_linear"
    bias = config.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj"))
    if config.linear == "ternary":
        return BitLinear(
            in_features,
            out_features,
            bias=bias,
            granularity=config.granularity,
            group_size=config.group_size,
            norm=norm,
            norm_eps=config.norm_eps,
            grad_mask=config.grad_mask,
            grad_mask_c=config.grad_mask_c,
            int8_backward=config.int8_backward,
        )
    if norm:
        return NormLinear(in_features, out_features, bias, config.norm_eps)
    return nn.Linear(in_features, out_features, bias=bias)


def make_norm(config: ModelConfig, features: int, *placements: str) -> nn.Module:
    """An RMSNorm if the config's placement is one of ``placements``, else an identity."""
    if config.norm_placement in placements:
        return RMSNorm(features, config.norm_eps)
    return nn.Identity()


class Cache(Protocol):
    """The interface that attention needs from a cache."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values ``[B, G, T, E]``. Return the keys and values of all
        columns that the mask covers, ``[B, G, C, E]``."""
        ...


class KVCache:
    """Keys and values of the tokens seen so far, preallocated.

    All rows of a batch have the same length: shorter prompts are padded on the *left*, by ``pad``
    columns, so the newest token of every row is in the same column.

    Arguments:
        config: of the model. batch: rows. max_len: columns, including padding; rows of different
            lengths may need more than config.max_seq_len.
    Attributes:
        length: filled columns. pad: int64 ``[B]``, padding columns at the left of each row.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pad = torch.zeros(batch, device=device, dtype=torch.int64)
        self.length = 0

    @property
    def max_len(self) -> int:
        """Number of columns."""
        return self.k.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, G, T, E]`` after the filled columns; return all filled columns."""
        if k.shape[1] != self.k.shape[2]:  # tensor parallelism; one head would broadcast
            raise ValueError(
                f"cache: has {self.k.shape[2]} key-value heads, and this layer {k.shape[1]}"
            )
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end].to(k.dtype), self.v[layer, :, :, :end].to(v.dtype)

    def mask(self, n_tokens: int) -> Tensor:
        """Which columns each of the next tokens attends to: bool ``[B, 1, T, length + T]``."""
        columns = torch.arange(self.length + n_tokens, device=self.pad.device, dtype=torch.int64)
        queries = columns[self.length :]
        causal = columns <= queries[:, None]
        seen = rearrange(self.pad, "b -> b 1 1") <= columns
        itself = (
            columns == queries[:, None]
        )  # each token sees itself: else a padding token's row would be empty and give NaN
        return rearrange((causal & seen) | itself, "b t c -> b 1 t c")

    def positions(self, n_tokens: int) -> Tensor:
        """Rotary positions of the next tokens, not counting padding: int64 ``[B, T]``."""
        columns = torch.arange(
            self.length, self.length + n_tokens, device=self.pad.device, dtype=torch.int64
        )
        return (columns - self.pad[:, None]).clamp(min=0)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of RoPE (arXiv 2104.09864): int64 ``[..., T]`` -> fp32 ``[..., T, E]``."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float().unsqueeze(-1) * theta ** (-pairs / head_dim)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + E/2) by the angle of its position (rotate-half form)."""
    first, second = x_BHTE.chunk(2, -1)
    return (x_BHTE * cos + torch.cat((-second, first), -1) * sin).to(x_BHTE.dtype)


def apart(tokens_BT: Tensor, separator: int) -> tuple[Tensor, Tensor]:
    """Keep the documents of a sequence apart, as if each had its own row in the batch.

    The separator that ends a document counts as the first token of the next one. So a document's
    first token is predicted from the separator alone, as in generation and evaluation. The last
    token of a document still predicts the separator. So every token remains a target, and no token
    is predicted from another document. A document cut by the start of a sequence begins there.

    Arguments:
        tokens_BT: int64 ``[B, T]``. separator: the token that ends a document.
    Returns:
        Each token's position in its document, int64 ``[B, T]``, and which tokens each attends to,
        bool ``[B, 1, T, T]``.
    """
    places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device, dtype=torch.int64)
    begins_BT = torch.where(tokens_BT == separator, places, 0).cummax(-1).values
    mask_BTT = (begins_BT.unsqueeze(-1) <= places) & (places <= places.unsqueeze(-1))
    return places - begins_BT, mask_BTT.unsqueeze(1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = make_linear(config, "self_attn.q_proj")
        self.k_proj = make_linear(config, "self_attn.k_proj")
        self.v_proj = make_linear(config, "self_attn.v_proj")
        self.o_proj = make_linear(config, "self_attn.o_proj")
        self.attn_sub_norm = make_norm(config, config.d_model, "sub_norm")
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None
    ) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        projections = self.q_proj, self.k_proj, self.v_proj
        shared = shared_input(x_BTD, *projections)
        q, k, v = (
            rearrange(proj(shared), "b t (h e) -> b h t e", e=self.head_dim) for proj in projections
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        elif mask is not None and q.is_cuda:  # no fused kernel takes both a mask and enable_gqa
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(self.attn_sub_norm(rearrange(y, "b h t e -> b t (h e)")))


class MLP(nn.Module):
    """down(norm(act(gate(x)) * up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = make_linear(config, "mlp.gate_proj")
        self.up_proj = make_linear(config, "mlp.up_proj")
        self.down_proj = make_linear(config, "mlp.down_proj")
        self.ffn_sub_norm = make_norm(config, config.d_ff, "sub_norm")

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        shared = shared_input(x_BTD, self.gate_proj, self.up_proj)
        gate, up = self.gate_proj(shared), self.up_proj(shared)
        y = relu2_mul(gate, up) if self.activation == "relu2" else F.silu(gate) * up
        return self.down_proj(self.ffn_sub_norm(y))


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.d_model, "sub_norm", "pre_norm")
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.d_model, "sub_norm", "pre_norm")
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None
    ) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, cache, mask)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Transformer(nn.Module):
    """A language model from a resolved :class:`ModelConfig`.

    Matrices start at N(0, 0.02). The matrices that write to the residual stream (o_proj, down_proj)
    are divided by sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2). Biases
    start at 0.

    Attributes:
        config: resolved.
        document_separator: the token that ends a document, to keep documents apart in forwards
            without a cache (:func:`apart`). None (default): attention sees all earlier tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.document_separator: int | None = None
        self.config = config = config.resolve()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=residual_std if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits of the next token at every position, or the mean loss if ``targets`` are given.

        The forward computes the loss, so that a wrapper (DDP, FSDP2, ``torch.compile``) covers it.
        The loss never holds all logits (:func:`bitnet.loss.head_loss`).

        Arguments:
            tokens: int64 ``[B, T]``.
            targets: int64 ``[B, T]``, the token that follows each.
            cache: the earlier tokens; the new tokens are appended.
        Returns:
            Logits ``[B, T, V]``, fp32 or the autocast dtype; or the loss, fp32 ``[]``, in nats
            (fp64 for an fp64 model).
        Raises:
            ValueError: more tokens than the context (or the cache) holds; targets and tokens
            differ in shape.
        """
        if isinstance(targets, KVCache):
            raise TypeError("targets: got a cache, which is passed by keyword: cache=...")
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(
                f"targets: expected the shape of tokens, {list(tokens.shape)}, got "
                f"{list(targets.shape)}"
            )
        hidden_BTD = self.hidden(tokens, cache)
        if targets is None:
            return self.lm_head(hidden_BTD)
        hidden_MD, target_M = hidden_BTD.flatten(0, 1), targets.flatten()
        return head_loss(self.lm_head, hidden_MD, target_M, self.config.vocab_size)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The head's input, after the last norm: ``[B, T, D]``. Arguments and errors are as in the
        forward. A subclass may override it."""
        n_tokens = tokens.shape[1]
        start, limit = (
            (0, self.config.max_seq_len) if cache is None else (cache.length, cache.max_len)
        )
        if start + n_tokens > limit:
            raise ValueError(f"tokens: {start} + {n_tokens} tokens exceed the context of {limit}")
        mask = None
        if cache is None:
            positions = torch.arange(n_tokens, device=tokens.device, dtype=torch.int64)
        else:
            positions, mask = cache.positions(n_tokens), cache.mask(n_tokens)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        if cache is None and self.document_separator is not None:
            positions, mask = apart(tokens, self.document_separator)
            cos, sin = cos[positions], sin[positions]
        if mask is not None:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        x_BTD = self.embed_tokens(tokens)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos, sin, cache, mask)
        if cache is not None:
            cache.length += n_tokens
        return self.norm(x_BTD)


def as_transformer(module: nn.Module) -> Transformer:
    """Return the same module, typed as a Transformer."""
    assert isinstance(module, Transformer)
    return module
