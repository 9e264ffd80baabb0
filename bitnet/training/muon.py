"""Muon on one process, and for matrices whose rows are divided over processes.

The update of a matrix is its momentum with all singular values brought near 1 by Newton-Schulz
iterations (Jordan's Muon, https://kellerjordan.github.io/posts/muon/). ``torch.optim.Muon`` runs
them in bf16. On a GPU we call its function. On a CPU we run them in fp32: a CPU without matrix
tiles multiplies bf16 numbers at half the speed of fp32 (AVX-512 BF16) or far more slowly (AVX2),
and an iteration consists of products only.

Newton-Schulz iterations need the whole matrix. So one process orthogonalizes each divided matrix:
the others send it their rows of the update and get their rows of the result back, for all matrices
in one exchange each way. Each process does the elementwise work on its own rows: momentum, weight
decay and the update. The update enters and leaves the iterations in bf16, so the processes exchange
bf16, and any number of processes computes the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


def orthogonalize(
    update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iterations.

    With ``X = update / max(|update|, eps)`` in the Frobenius norm, transposed if it has more rows
    than columns, each of the ``steps`` is, with coefficients (a, b, c)::

        X <- (a I + b X X^T + c (X X^T)^2) X

    Arguments:
        update: float ``[N, K]``; it is rounded to bf16 first.
    Returns:
        bf16 ``[N, K]``: computed in fp32 on a CPU, in bf16 elsewhere.
    """
    update = update.bfloat16()
    if update.device.type != "cpu":
        return _zeropower_via_newtonschulz(update, coefficients, steps, eps)
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = (update.t() if tall else update).float()
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.t()
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, factor, x, beta=a)
    return (x.t() if tall else x).bfloat16()


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with :func:`orthogonalize`. Arguments and state are the same."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters once."""
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            params: list[Any] = []
            grads: list[Any] = []
            buffers: list[Any] = []
            self._init_group(group, params, grads, buffers)
            updates = []
            for grad, buffer in zip(grads, buffers, strict=True):
                g, b = own_rows(grad), own_rows(buffer)
                b.lerp_(g, 1 - group["momentum"])
                updates.append(g.lerp(b, group["momentum"]) if group["nesterov"] else b)
            newton_schulz = group["ns_coefficients"], group["ns_steps"], group["eps"]
            found = self._orthogonalized(params, updates, newton_schulz)
            for param, update in zip(params, found, strict=True):
                lr = _adjust_lr(group["lr"], group["adjust_lr_fn"], param.shape)
                rows = own_rows(param)
                rows.mul_(1 - group["lr"] * group["weight_decay"])
                rows.add_(update, alpha=-lr)

    def _orthogonalized(
        self, params: list[Any], updates: list[Tensor], newton_schulz: tuple[Any, ...]
    ) -> list[Tensor]:
        return [orthogonalize(update, *newton_schulz) for update in updates]


class ShardedMuon(Muon):
    """:class:`Muon`, with the same bits, for DTensors whose rows are divided over one dimension of
    their mesh. The state is divided like its parameter. All processes call ``step``."""

    def _orthogonalized(
        self, params: list[Any], updates: list[Tensor], newton_schulz: tuple[Any, ...]
    ) -> list[Tensor]:
        return _orthogonalized(params, [update.bfloat16() for update in updates], newton_schulz)


def own_rows(tensor: Any) -> Tensor:
    """This process's rows of a DTensor; any other tensor itself."""
    rows: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return rows


def _orthogonalized(
    params: list[Any], updates: list[Tensor], newton_schulz: tuple[Any, ...]
) -> list[Tensor]:
    """This process's rows of each orthogonalized update.

    Arguments:
        params: DTensors ``[N, K]``. updates: this process's rows of them, bf16 ``[n, K]``.
    """
    if not params:
        return []
    group = _rows_group(params[0])
    rank, size = group.rank(), group.size()
    owners = _owners([tuple(param.shape) for param in params], size)
    owned = [i for i, owner in enumerate(owners) if owner == rank]
    order = sorted(range(len(params)), key=owners.__getitem__)  # by owner, else unchanged
    sent = [sum(updates[i].numel() for i in order if owners[i] == to) for to in range(size)]
    shapes = {i: tuple(params[i].shape) for i in owned}
    rows = {i: [_rows(shapes[i][0], r, size) for r in range(size)] for i in owned}
    got = [sum(rows[i][r] * shapes[i][1] for i in owned) for r in range(size)]

    flat = torch.cat([updates[i].flatten() for i in order])
    parts = [
        iter(part.split(_sizes(shapes, rows, owned, r)))
        for r, part in enumerate(_exchange(flat, got, sent, group).split(got))
    ]
    whole = {i: torch.cat([next(parts[r]) for r in range(size)]).view(shapes[i]) for i in owned}
    whole = {i: orthogonalize(w, *newton_schulz) for i, w in whole.items()}

    split = {i: whole[i].split(rows[i]) for i in owned}
    flat = torch.cat([split[i][r].flatten() for r in range(size) for i in owned] or [flat[:0]])
    back = _exchange(flat, sent, got, group)
    pieces = back.split([updates[i].numel() for i in order])
    found = {i: piece.view(updates[i].shape) for i, piece in zip(order, pieces, strict=True)}
    return [found[i] for i in range(len(params))]


def _sizes(
    shapes: dict[int, tuple[int, ...]], rows: dict[int, list[int]], owned: list[int], rank: int
) -> list[int]:
    return [rows[i][rank] * shapes[i][1] for i in owned]


def _rows_group(param: Any) -> dist.ProcessGroup:
    """The processes among which the rows of a DTensor are divided.

    Raises ValueError for a DTensor that is divided differently.
    """
    divided = [dim for dim, placement in enumerate(param.placements) if placement.is_shard()]
    if len(divided) != 1 or not param.placements[divided[0]].is_shard(0):
        raise ValueError(
            f'optimizer "muon": expected matrices divided by rows, got {list(param.placements)}'
        )
    group: dist.ProcessGroup = param.device_mesh.get_group(divided[0])
    return group


def _rows(n: int, rank: int, size: int) -> int:
    """How many of ``n`` rows a process has: DTensor divides as ``torch.chunk`` does."""
    most = -(-n // size)
    return max(0, min(n, (rank + 1) * most) - rank * most)


def _owners(shapes: list[tuple[int, ...]], size: int) -> list[int]:
    """Assign each matrix to the process that orthogonalizes it: largest first, each to the process
    with the least work. An iteration's products take N K min(N, K) multiplications."""
    work, owners = [0] * size, [0] * len(shapes)
    cost = [n * k * min(n, k) for n, k in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: -cost[i]):
        owners[i] = work.index(min(work))
        work[owners[i]] += cost[i]
    return owners


def _exchange(
    flat: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all of bf16 numbers: ``send[r]`` of them to each process, ``receive[r]`` from it."""
    received = flat.new_empty(sum(receive))
    width = flat.element_size()
    dist.all_to_all_single(
        received.view(torch.uint8),  # gloo lacks bf16
        flat.view(torch.uint8),
        [n * width for n in receive],
        [n * width for n in send],
        group=group,
    )
    return received
