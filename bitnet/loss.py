"""The next-token loss without all logits: head and cross-entropy on one chunk of tokens at a time.

    z = h @ W.T      loss = mean(logsumexp(z) - z[target])      dz = (softmax(z) - onehot) / M

All logits of a micro-batch are by far the largest tensor of a small model's step (2,048 tokens and
a vocabulary of 16,384: 134 MB in fp32), and plain autograd holds three such tensors at once. Here
the logits of a chunk are turned into their part of the loss and of the gradients of ``h`` and ``W``
while they are still in the cache, and then freed. So the gradients are computed in the *forward*,
and the backward only multiplies them by the incoming gradient.

The idea is Liger-Kernel's (arXiv 2410.10989). torch's own ``F.linear_cross_entropy`` exists only
since 2.13, and its chunked form does not compile.

The results equal ``F.cross_entropy(F.linear(h, W).float(), targets)`` except for the order of sums:
products in the autocast dtype, softmax in fp32, the gradient of W summed over chunks in fp32.

M tokens, D width of the hidden states, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitnet.modules import is_dtensor, is_plain
from bitnet.quant import output_dtype
from bitnet_kernels.cpu.training import cross_entropy_, takes

_CPU_CHUNK, _GPU_CHUNK = (2**22, 128), (2**27, 1024)
"""Logits per chunk, and the smallest number of tokens per chunk. CPU: 16 MiB in fp32 stay in a
level-3 cache, and glibc's malloc reuses such a block; it returns a block of 32 MiB to the system,
and the next use pays page faults. GPU: 512 MiB, enough for the products to fill the device. Chunks
with fewer tokens are slow for any vocabulary, since each adds to the whole gradient of W."""
_NO_TARGET = torch.iinfo(torch.int64).min
"""``ignore_index`` of ``F.cross_entropy``. With the default, -100, targets of -100 would be left
out of the mean; a plain head raises for them."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``hidden @ weight.T``, with only one chunk in memory at a time.

    Differentiable once, in ``hidden`` and ``weight``. If no gradient is needed (no_grad, or
    neither requires one), only the loss is computed.

    Arguments:
        hidden: float ``[M, D]``. weight: float ``[V, D]``. targets: int64 ``[M]`` in 0 .. V - 1.
    Returns:
        fp32 ``[]`` (fp64 for fp64), in nats. NaN if a hidden state or the weight holds NaN.
    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or device, or no tokens. On a CPU,
        torch's own RuntimeError for a target out of range (a GPU reports a failed assertion, as for
        any index).
    """
    matrices = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not matrices or not len(weight):
        raise ValueError(
            "hidden, weight: expected [M, D] and [V, D] with V >= 1, got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    _check_targets(hidden, targets)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    _check_device("weight", weight, hidden)
    dtype = output_dtype(hidden)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        of = hidden.requires_grad, weight.requires_grad
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, dtype, *of)[0]
        return loss
    return _loss_and_gradients(hidden, weight, targets, dtype, False, False)[0]


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross-entropy of ``head(hidden)``, in nats.

    For a plain ``nn.Linear`` without a bias the logits are computed in chunks
    (:func:`linear_cross_entropy`). Any other head (a bias, hooks, a parametrization, quantizers,
    adapters) is called as a module: on one chunk at a time if no gradient is needed, else on all
    tokens at once.

    Arguments:
        hidden: float ``[M, D]``. targets: int64 ``[M]``. vocab_size: logits per token.
    Returns:
        fp32 ``[]``; fp64 from a plain head in fp64.
    Raises:
        TypeError, ValueError: targets that :func:`linear_cross_entropy` rejects.
    """
    if is_plain(head, nn.Linear) and head.bias is None:
        assert isinstance(head, nn.Linear)
        weight: Tensor = head.weight
        if is_dtensor(weight):  # tensor parallelism keeps the head whole on every rank
            from bitnet.sharded import local

            weight = local(weight)
        return linear_cross_entropy(hidden, weight, targets)
    _check_targets(hidden, targets)
    if torch.is_grad_enabled():
        return F.cross_entropy(head(hidden).float(), targets, ignore_index=_NO_TARGET)
    rows = _chunk_rows(hidden.device, vocab_size)
    losses = [
        F.cross_entropy(head(h_MD).float(), target_M, ignore_index=_NO_TARGET, reduction="none")
        for h_MD, target_M in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses).mean()


def _check_targets(hidden: Tensor, targets: Tensor) -> None:
    if targets.shape != hidden.shape[:1] or not len(targets):
        raise ValueError(
            f"targets: expected one for each of the {len(hidden)} hidden states, and at least one, "
            f"got {list(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    _check_device("targets", targets, hidden)


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(
            f"{name}: expected on {hidden.device}, where hidden is, got {tensor.device}"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Returns the loss and the gradients before the division by M: torch.func needs a forward
    without ctx, which can keep only its outputs for the backward."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        of_hidden: bool,
        of_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _loss_and_gradients(hidden, weight, targets, dtype, of_hidden, of_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, *_ = inputs
        _, *gradients = output
        ctx.mark_non_differentiable(*(g for g in gradients if g is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.dtypes, ctx.share = (hidden.dtype, weight.dtype), 1 / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        share = dloss * ctx.share
        scaled = (
            None if gradient is None else (gradient.to(share.dtype) * share).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def _chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Tokens in a chunk."""
    n_logits, n_least = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    return max(n_least, n_logits // vocab_size)


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mean loss, fp32 ``[]``, and M times the requested gradients: ``[M, D]`` in ``dtype`` and
    fp32 ``[V, D]`` (fp64 if ``dtype`` is fp64). Without the factor M they could underflow in
    fp16."""
    n_tokens, rows = len(hidden), _chunk_rows(hidden.device, len(weight))
    precise = torch.promote_types(dtype, torch.float32)
    h, w = hidden.to(dtype), weight.to(dtype)
    # one tensor for all chunks: if each chunk kept a small tensor, malloc could not reuse the
    # blocks before it (0.9 GB more for 32 chunks)
    losses = torch.empty(n_tokens, dtype=precise, device=h.device)
    dh = torch.empty_like(h) if of_hidden else None
    dw = torch.zeros_like(weight, dtype=precise) if of_weight else None
    for start in range(0, n_tokens, rows):
        chunk = slice(start, start + rows)
        dh_MD = None if dh is None else dh[chunk]
        _add_chunk(h[chunk], w, targets[chunk], losses[chunk], dh_MD, dw)
    return losses.mean(), dh, dw


def _add_chunk(
    h_MD: Tensor,
    w_VD: Tensor,
    target_M: Tensor,
    loss_M: Tensor,
    dh_MD: Tensor | None,
    dw_VD: Tensor | None,
) -> None:
    """Fill a chunk's ``loss_M`` and ``dh_MD``, and add to ``dw_VD``."""
    dtype, precise = h_MD.dtype, loss_M.dtype
    z_MV = h_MD @ w_VD.t()
    if takes(z_MV):
        cross_entropy_(z_MV, target_M, loss_M)
        dz_MV = z_MV
    else:
        target_M1 = target_M.unsqueeze(1)
        p_MV = z_MV.softmax(1, dtype=precise)
        # logsumexp(z) = max(z) - log(max(p)): one pass of exponentials, and no overflow
        below_top_M = z_MV.amax(1).to(precise) - z_MV.gather(1, target_M1).squeeze(1).to(precise)
        loss_M.copy_(below_top_M - p_MV.amax(1).log())
        if dh_MD is None and dw_VD is None:
            return
        dz_MV = p_MV.scatter_add_(1, target_M1, p_MV.new_full(target_M1.shape, -1)).to(dtype)
    if dh_MD is not None:
        torch.mm(dz_MV, w_VD, out=dh_MD)
    if dw_VD is not None and dtype == precise:
        dw_VD.addmm_(dz_MV.t(), h_MD)
    elif dw_VD is not None:
        dw_VD.add_(dz_MV.t() @ h_MD)
