"""Muon for matrices whose rows are divided over processes, with the bits of ``torch.optim``.

Newton-Schulz iterations need the whole matrix. So each matrix has one process that orthogonalizes
it: the others send it their rows of the update and get their rows of the result back, all matrices
in one exchange each way. What is done per element, momentum, weight decay and the update, is done
on the rows where they are. The iterations run in bf16, so bf16 is what is sent.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class ShardedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` for parameters that are DTensors, divided by rows over one dimension of
    their mesh. Arguments and state are the same; the state is divided as its parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update; all processes call it."""
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            params: list[Any] = []
            grads: list[Any] = []
            buffers: list[Any] = []
            self._init_group(group, params, grads, buffers)
            updates = []
            for grad, buffer in zip(grads, buffers, strict=True):
                g, b = grad.to_local(), buffer.to_local()
                b.lerp_(g, 1 - group["momentum"])
                update = g.lerp(b, group["momentum"]) if group["nesterov"] else b
                updates.append(update.bfloat16())
            newton_schulz = group["ns_coefficients"], group["ns_steps"], group["eps"]
            found = _orthogonalized(params, updates, newton_schulz)
            for param, update in zip(params, found, strict=True):
                lr = _adjust_lr(group["lr"], group["adjust_lr_fn"], param.shape)
                rows = param.to_local()
                rows.mul_(1 - group["lr"] * group["weight_decay"])
                rows.add_(update, alpha=-lr)


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
    order = sorted(range(len(params)), key=owners.__getitem__)  # by owner, then as they come
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
    whole = {i: _zeropower_via_newtonschulz(w, *newton_schulz) for i, w in whole.items()}

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

    Raises ValueError for one that is divided in another way.
    """
    divided = [dim for dim, placement in enumerate(param.placements) if placement.is_shard()]
    if len(divided) != 1 or not param.placements[divided[0]].is_shard(0):
        raise ValueError(
            f'optimizer "muon": expected matrices divided by rows, got {list(param.placements)}'
        )
    group: dist.ProcessGroup = param.device_mesh.get_group(divided[0])
    return group


def _rows(n: int, rank: int, size: int) -> int:
    """Rows that a process has of ``n``: DTensor divides as ``torch.chunk`` does."""
    most = -(-n // size)
    return max(0, min(n, (rank + 1) * most) - rank * most)


def _owners(shapes: list[tuple[int, ...]], size: int) -> list[int]:
    """The process that orthogonalizes each matrix: the largest first, each to the one with the
    least to do. An iteration's products take N K min(N, K) multiplications."""
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
        received.view(torch.uint8),  # gloo knows no bf16
        flat.view(torch.uint8),
        [n * width for n in receive],
        [n * width for n in send],
        group=group,
    )
    return received
