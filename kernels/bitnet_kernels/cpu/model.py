"""A language model for ``native/step.c``: pointers to its tensors, laid out once.

``native/bitnet_cpu.h`` declares the same structures. Every tensor is checked here, when it is
bound: native code sees no other memory.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.packing import packed_columns, plane_words

_I64, _F32, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_KINDS = native.KINDS
_PACKED, _ADDSUB, _PACKED_ADDSUB = 4, 5, 6
MAX_HEAD_DIM = 256
"""BN_HEAD of ``native/internal.h``."""


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("eps", _F32))


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("n", _I64),
        ("k", _I64),
        ("kind", _I64),
        ("weight", _POINTER),
        ("scale", _POINTER),
        ("scale_stride", _I64),
    )


_NORMS = ("input_norm", "q_norm", "k_norm", "attn_norm", "mlp_norm", "ffn_norm")
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (*((name, _Norm) for name in _NORMS), *((name, _Matrix) for name in _MATRICES))


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim")),
        *((name, _I64) for name in ("d_ff", "vocab", "relu2", "embedding_kind")),
        ("embedding", _POINTER),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", _Norm),
        ("head", _Matrix),
        *((name, _I64) for name in ("rows", "columns", "max_len", "cache_kind")),
        *((name, _POINTER) for name in ("kv", "kv_scale", "cos", "sin", "tokens", "lengths")),
        *((name, _POINTER) for name in ("active", "logits", "chosen")),
        ("most", _I64),
        ("threads", _I64),
        ("workspace", _POINTER),
    )


class _Piece(ctypes.Structure):
    _fields_ = (("row", _I64), ("start", _I64), ("n", _I64))


class NormWeights(NamedTuple):
    """An RMSNorm: fp32 ``[K]`` and its eps."""

    weight: Tensor
    eps: float


class DenseWeights(NamedTuple):
    """A matrix ``[N, K]`` in fp32, bf16 or fp16, or int8 with a scale per row, fp32 ``[N]``."""

    weight: Tensor
    scale: Tensor | None = None


class TernaryWeights(NamedTuple):
    """A ternary matrix ``[N, K]``, in one of two layouts (:mod:`bitnet_kernels.packing`), and its
    scale, fp32 ``[]`` or ``[N]``.

    ``packed`` uint8 ``[N, ceil(K/64)*16]`` is for the family dot, or with ``addsub`` for the family
    addsub if that takes packed weights (:func:`native.families_share_layout`). ``planes`` int32
    ``[N, 2, words]`` is for addsub.
    """

    scale: Tensor
    packed: Tensor | None = None
    planes: Tensor | None = None
    addsub: bool = False


MatrixWeights = DenseWeights | TernaryWeights


@dataclass(frozen=True)
class Layer:
    """One layer; a norm is None where the model has none."""

    input_norm: NormWeights | None
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    attn_norm: NormWeights | None
    mlp_norm: NormWeights | None
    ffn_norm: NormWeights | None
    q: MatrixWeights
    k: MatrixWeights
    v: MatrixWeights
    o: MatrixWeights
    gate: MatrixWeights
    up: MatrixWeights
    down: MatrixWeights


@dataclass(frozen=True)
class Model:
    """A model and its rows.

    S rows, L columns, D d_model, G key-value heads, E head_dim, F d_ff, V vocabulary.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    relu2: bool
    embedding: Tensor
    """fp32, bf16 or fp16 ``[V, D]``."""
    layers: Sequence[Layer]
    norm: NormWeights
    head: MatrixWeights
    max_len: int
    """Most tokens of a row; less than L."""
    kv: Tensor
    """fp32, bf16, fp16 or int8 ``[n_layers, 2, S, G, L, E]``."""
    kv_scale: Tensor | None
    """fp32 ``[n_layers, 2, S, G, L]`` of an int8 cache."""
    cos: Tensor
    sin: Tensor
    """fp32 ``[L, E]``."""
    tokens: Tensor
    """int64 ``[S]``."""
    lengths: Tensor
    active: Tensor
    """int32 ``[S]``."""
    logits: Tensor
    """fp32 ``[S, V]``."""
    chosen: Tensor
    """int64 ``[S]``."""


def _require(fits: bool, message: str) -> None:
    """Native code reads what its pointers show: so these checks also hold under ``python -O``."""
    if not fits:
        raise ValueError(f"model: {message}")


@dataclass
class _Bound:
    """Tensors whose memory the structures point to."""

    tensors: list[Tensor] = field(default_factory=list)

    def pointer(self, tensor: Tensor | None, shape: Sequence[int], *dtypes: torch.dtype) -> int:
        """The address of a tensor that has this shape and one of these dtypes."""
        _require(tensor is not None, "a tensor is missing")
        assert tensor is not None
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, {tensor.stride()}"
        wanted = f"{' or '.join(map(str, dtypes))} {list(shape)} on cpu, contiguous"
        fits = tensor.device.type == "cpu" and tensor.layout == torch.strided
        fits = fits and tensor.dtype in dtypes and list(tensor.shape) == list(shape)
        fits = fits and tensor.is_contiguous() and not tensor.is_neg()
        _require(fits, f"expected a tensor of {wanted}; got {found}")
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def norm(self, norm: NormWeights | None, k: int) -> _Norm:
        if norm is None:
            return _Norm(None, 0.0)
        return _Norm(self.pointer(norm.weight, [k], torch.float32), norm.eps)

    def matrix(self, matrix: MatrixWeights, n: int, k: int) -> _Matrix:
        if isinstance(matrix, DenseWeights):
            weight = self.pointer(matrix.weight, [n, k], *_KINDS)
            kind, scale = _KINDS[matrix.weight.dtype], None
            if matrix.weight.dtype == torch.int8:
                scale = self.pointer(matrix.scale, [n], torch.float32)
            return _Matrix(n, k, kind, weight, scale, 1)
        per_row = matrix.scale.dim() == 1
        scale = self.pointer(matrix.scale, [n] if per_row else [], torch.float32)
        p = packed_columns(k)
        if matrix.packed is not None:
            weight = self.pointer(matrix.packed, [n, p], torch.uint8)
            kind = _PACKED_ADDSUB if matrix.addsub else _PACKED
            fits = native.families_share_layout() or not matrix.addsub
            _require(fits, "addsub needs bit planes on this CPU")
        else:
            words = plane_words(p)
            weight, kind = self.pointer(matrix.planes, [n, 2, words], torch.int32), _ADDSUB
        return _Matrix(n, k, kind, weight, scale, int(per_row))


def available() -> bool:
    """Whether there is a native library."""
    return native.library() is not None


class NativeModel:
    """A model bound to the native library.

    Arguments:
        model: its tensors, which are read and written where they are.
        most: most tokens at a time.
    Attributes:
        workspace: uint8, made anew when torch's number of threads grows.
    """

    def __init__(self, model: Model, most: int) -> None:
        library = native.library()
        if library is None:
            raise ValueError(f"model: {native.missing()}")
        self._library, self._bound = library, _Bound()
        self._model = self._bind(model, most)
        self.workspace = torch.empty(0, dtype=torch.uint8, device="cpu")

    def _bind(self, model: Model, most: int) -> _Model:
        bound, fp32 = self._bound, torch.float32
        (vocab, d), f = model.embedding.shape, model.d_ff
        n_layers, _, rows, g, columns, e = model.kv.shape
        _require(model.d_model == d == model.n_heads * e, "d_model is not n_heads * head_dim")
        _require(model.n_kv_heads == g and model.n_heads % g == 0, "n_kv_heads do not fit")
        _require(e % 2 == 0 and e <= MAX_HEAD_DIM, "head_dim is odd or too large")
        _require(len(model.layers) == n_layers, "the cache has another number of layers")
        _require(0 < model.max_len < columns, "max_len does not leave a column")
        _require(most > 0, "most is not positive")
        sizes = {
            "q": (d, d),
            "k": (g * e, d),
            "v": (g * e, d),
            "o": (d, d),
            "gate": (f, d),
            "up": (f, d),
            "down": (d, f),
        }
        norms = {"q_norm": e, "k_norm": e, "ffn_norm": f}
        layers = (_Layer * n_layers)()
        for layer, weights in zip(layers, model.layers, strict=True):
            for name in _NORMS:
                setattr(layer, name, bound.norm(getattr(weights, name), norms.get(name, d)))
            for name in _MATRICES:
                setattr(layer, name, bound.matrix(getattr(weights, name), *sizes[name]))
        self._layers = layers
        floats = (torch.float32, torch.bfloat16, torch.float16)
        shape = [n_layers, 2, rows, g, columns]
        pointers = {
            "embedding": bound.pointer(model.embedding, [vocab, d], *floats),
            "kv": bound.pointer(model.kv, [*shape, e], *_KINDS),
            "cos": bound.pointer(model.cos, [columns, e], fp32),
            "sin": bound.pointer(model.sin, [columns, e], fp32),
            "tokens": bound.pointer(model.tokens, [rows], torch.int64),
            "lengths": bound.pointer(model.lengths, [rows], torch.int32),
            "active": bound.pointer(model.active, [rows], torch.int32),
            "logits": bound.pointer(model.logits, [rows, vocab], fp32),
            "chosen": bound.pointer(model.chosen, [rows], torch.int64),
        }
        if model.kv.dtype == torch.int8:
            pointers["kv_scale"] = bound.pointer(model.kv_scale, shape, fp32)
        self._rows = rows
        return _Model(
            n_layers=n_layers,
            d_model=d,
            n_heads=model.n_heads,
            n_kv_heads=g,
            head_dim=e,
            d_ff=f,
            vocab=vocab,
            relu2=int(model.relu2),
            embedding_kind=_KINDS[model.embedding.dtype],
            layers=layers,
            norm=bound.norm(model.norm, d),
            head=bound.matrix(model.head, vocab, d),
            rows=rows,
            columns=columns,
            max_len=model.max_len,
            cache_kind=_KINDS[model.kv.dtype],
            most=most,
            **pointers,
        )

    def step(self, batch: int) -> None:
        """Feed the next token of each of the first ``batch`` rows, and advance the active ones.

        Raises:
            IndexError: a token is not in the vocabulary; nothing was done.
        """
        _require(1 <= batch <= min(self._rows, self._model.most), f"no batch of {batch}")
        threads = self._threads()
        row = self._library.bn_step(ctypes.byref(self._model), batch, threads)
        if row >= 0:
            raise IndexError(f"tokens: row {row} holds a token that is not in the vocabulary")

    def prefill(self, tokens: Tensor, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Append tokens to rows, without advancing their lengths.

        Arguments:
            tokens: int64 ``[M]``, the tokens of the pieces one after another.
            pieces: row, first column and number of tokens (>= 1) of each.
        Raises:
            IndexError: as :meth:`step`.
        """
        tokens, m = tokens.contiguous(), sum(n for _, _, n in pieces)
        pointer = _Bound().pointer(tokens, [m], torch.int64)
        _require(m <= self._model.most, f"at most {self._model.most} tokens at a time, got {m}")
        for row, start, n in pieces:
            fits = 0 <= row < self._rows and 0 <= start < start + n <= self._model.max_len
            _require(fits, f"no room for {n} tokens from column {start} of row {row}")
        array = (_Piece * len(pieces))(*(_Piece(*piece) for piece in pieces))
        model, threads = ctypes.byref(self._model), self._threads()
        bad = self._library.bn_prefill(model, pointer, array, len(pieces), threads)
        if bad >= 0:
            raise IndexError(f"tokens: {int(tokens[bad])} is not in the vocabulary")

    def _threads(self) -> int:
        """Torch's number of threads; the workspace is grown to it."""
        threads = native.threads()
        if threads > self._model.threads:
            self._model.threads = threads
            size = self._library.bn_workspace(ctypes.byref(self._model))
            self.workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._model.workspace = self.workspace.data_ptr()
        return threads

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a NativeModel is bound to its memory")
